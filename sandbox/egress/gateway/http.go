package gateway

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/http/httputil"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

const (
	// headerLimit bounds the header of a request; servers take 8 to 64 KiB.
	headerLimit = 128 << 10
	// streams bounds the requests at a time on one HTTP/2 connection (RFC 9113
	// section 6.5.2 recommends no less), and each may have as many bytes on the
	// way as the library's windows are wide.
	streams = 100
)

// An exchange is a connection that carries HTTP requests. net/http parses them
// and writes them anew, so what was checked is what the destination gets.
type exchange struct {
	session *session
	proxy   *httputil.ReverseProxy
	out     *http.Transport
	wg      sync.WaitGroup // requests that took the connection over
	pending atomic.Bool    // bytes of a request came, and its line is not written
	in      *framed        // the job's end; nil with HTTP/2

	mu    sync.Mutex
	first net.Conn // dialled, not yet used
	to    string   // the address that was judged; all connections go there
}

// serveHTTP serves the requests of the connection. conn is the job's, or TLS on
// top of it; h2 says that HTTP/2 was agreed on.
func (c *session) serveHTTP(ctx context.Context, conn net.Conn, h2 bool) {
	c.known()
	x := &exchange{session: c}
	silent := log.New(io.Discard, "", 0) // the ledger says what happened
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(h2)
	x.out = x.transport(protocols)
	x.proxy = &httputil.ReverseProxy{
		Rewrite:        x.rewrite,
		Transport:      x.out,
		ModifyResponse: x.inspect,
		FlushInterval:  -1,
		BufferPool:     c.gateway.buffers,
		ErrorLog:       silent,
		ErrorHandler:   func(w http.ResponseWriter, r *http.Request, err error) { x.hangUp(w, r, err) },
	}
	if !h2 {
		x.in = newFramed(conn, false)
		conn = x.in
	}
	ended := make(chan struct{})
	server := &http.Server{
		Handler:           http.HandlerFunc(x.serve),
		Protocols:         protocols,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: streams},
		ReadHeaderTimeout: c.gateway.cfg.Hello,
		IdleTimeout:       c.gateway.cfg.Idle,
		MaxHeaderBytes:    headerLimit,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnState:         x.watch(ended, h2),
		ErrorLog:          silent,
		// OPTIONS * is the destination's to answer.
		DisableGeneralOptionsHandler: true,
	}
	// Serve returns when the one connection was accepted.
	_ = server.Serve(&single{conn: conn})
	<-ended
	x.wg.Wait()
	x.out.CloseIdleConnections()
	if x.first != nil {
		_ = x.first.Close() // net/http may have done so
	}
}

// transport reaches the destination, with the protocol that the job chose where
// that can be: only so is an upgrade passed on, and translating costs.
func (x *exchange) transport(p *http.Protocols) *http.Transport {
	c := x.session
	dial := func(ctx context.Context, network, _ string) (net.Conn, error) {
		if conn := x.take(); conn != nil {
			return conn, nil
		}
		return x.redial(ctx, network, p)
	}
	t := &http.Transport{
		DialContext:           dial,
		Protocols:             p,
		DisableCompression:    true,
		MaxConnsPerHost:       1,
		IdleConnTimeout:       c.gateway.cfg.Idle,
		ResponseHeaderTimeout: c.gateway.cfg.Idle,
		ExpectContinueTimeout: time.Second,
	}
	if c.line.Protocol == egress.HTTPS {
		t.DialTLSContext = dial
		if p.HTTP2() { // several requests of the job may meet a destination that has HTTP/1 only
			t.MaxConnsPerHost = streams
		}
	}
	return t
}

// watch closes ended when the connection is over, and refuses in the ledger
// what net/http answered without asking the handler.
func (x *exchange) watch(ended chan struct{}, h2 bool) func(net.Conn, http.ConnState) {
	// An HTTP/2 connection becomes active and idle once before its first request.
	greeted := !h2
	return func(conn net.Conn, state http.ConnState) {
		switch state {
		case http.StateActive:
			x.pending.Store(true)
		case http.StateIdle:
			if x.pending.Swap(false) && greeted {
				x.malformed()
			}
			greeted = true
		case http.StateClosed, http.StateHijacked:
			if x.pending.Load() || x.in.why() != "" {
				x.malformed()
			}
			close(ended)
		}
	}
}

func (x *exchange) malformed() {
	l := x.session.line
	l.Verdict, l.Reason = egress.Refused, "not a whole HTTP request"
	if why := x.in.why(); why != "" {
		l.Reason = why
	}
	_ = x.session.book().line(l) // it was refused already
}

// A visit is one request, from its line to its last line.
type visit struct {
	line   egress.Line
	grant  *grant
	narrow *narrow   // nil: the rule says nothing of requests
	use    *injected // nil: the rule has no credential
	leave  func()    // gives back what admit took; not nil after it
	sent   *counted
	answer *answered
	up     atomic.Pointer[framed] // the connection with the destination, of HTTP/1
}

// visitKey finds the visit in the context of its request.
type visitKey struct{}

func visitOf(ctx context.Context) *visit {
	v, _ := ctx.Value(visitKey{}).(*visit)
	return v
}

// serve decides on one request and forwards it.
func (x *exchange) serve(w http.ResponseWriter, r *http.Request) {
	x.wg.Add(1)
	defer x.wg.Done()
	x.pending.Store(false)
	c := x.session
	v := &visit{line: c.line}
	v.line.Time = time.Now()
	v.line.Request = egress.Exchange{Method: printable(r.Method), Path: shape(r.URL.EscapedPath())}
	ctx, cancel := context.WithCancelCause(context.WithValue(r.Context(), visitKey{}, v))
	defer cancel(nil)
	r = r.WithContext(ctx)
	err := x.admit(r, v)
	defer v.leave()
	if err == nil {
		// The request may be one of a step's, on a connection that outlives it.
		if !c.box.enter(v.grant.scope, v, func() { cancel(errWithdrawn) }) {
			err = refused("%v", errWithdrawn)
		} else {
			defer c.box.leave(v.grant.scope, v)
			if v.grant.answers == nil {
				v.line.Dialled, err = x.connect(ctx)
			}
		}
	}
	if err == nil {
		v.line.Verdict = v.grant.verdict()
	} else {
		v.line.Verdict, v.line.Reason = verdict(err)
	}
	if lost := v.book(c).line(v.line); lost != nil || err != nil {
		x.turnAway(w, r, err, lost)
		return
	}
	x.forward(w, r, v)
}

// book is where the lines of the request go.
func (v *visit) book(c *session) *book {
	if v.grant != nil {
		return v.grant.scope.book
	}
	return c.book()
}

// admit decides on a request, and holds it back where its rule has a rate.
func (x *exchange) admit(r *http.Request, v *visit) error {
	c := x.session
	v.leave = func() {}
	if err := checkRequest(r, c.line); err != nil {
		return err
	}
	p, err := c.allow(r)
	var use *injected
	if p != nil {
		use, v.grant, v.line.Rule = p.use, p.grant, p.grant.ID
	}
	if lease := c.box.tripped(r, use); lease != "" {
		v.line.Request.Lease = lease
		return denied("tripwire: the placeholder of lease %s is in a request, or in a place of it, that it is not for", lease)
	}
	if err != nil {
		return err
	}
	v.narrow, v.use = p.narrow, use
	if v.leave, err = use.verify(r, c.box.held); err != nil {
		return err
	}
	if use != nil && use.puts() {
		v.line.Request.Lease = use.Lease
	}
	if v.narrow != nil {
		v.line.Request.Path = v.narrow.Path
		if err := v.narrow.pass(r.Context()); err != nil {
			return err
		}
	}
	if use != nil && use.puts() {
		return use.uses.take(use.Lease)
	}
	return nil
}

// turnAway ends a request that does not pass.
func (x *exchange) turnAway(w http.ResponseWriter, r *http.Request, err, lost error) {
	if why := (*refusal)(nil); lost == nil && errors.As(err, &why) && why.answer {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		w.WriteHeader(http.StatusForbidden)
		_, _ = io.WriteString(w, "Refused by the policy of this job: "+why.reason+"\n") // the job may be gone
		return
	}
	x.hangUp(w, r, err)
}

// forward passes a request on, and its answer back.
func (x *exchange) forward(w http.ResponseWriter, r *http.Request, v *visit) {
	c := x.session
	v.sent = &counted{ReadCloser: r.Body}
	v.answer = &answered{ResponseWriter: w, sent: v.sent}
	if v.use != nil && v.use.As != egress.Certificate {
		v.answer.scrub = newScrub(v.use.injection, w)
	}
	if v.narrow != nil {
		v.sent.limit, v.answer.limit = v.narrow.Sent, v.narrow.Received
	}
	r.Body = v.sent
	r = r.WithContext(httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) {
		if f, ok := i.Conn.(*framed); ok {
			f.bodily.Store(r.Method != http.MethodHead)
			v.up.Store(f)
		}
	}}))
	defer func() {
		line := v.line
		line.Verdict, line.Sent, line.Received = egress.Ended, v.sent.n.Load(), v.answer.n.Load()
		line.Duration, line.Request.Status = time.Since(line.Time), v.answer.status
		switch {
		case v.up.Load().why() != "":
			line.Reason = v.up.Load().why()
		case v.answer.err != nil && r.Context().Err() == nil:
			line.Reason = v.answer.err.Error()
		case r.Context().Err() != nil:
			line.Reason = context.Cause(r.Context()).Error()
		case !v.answer.whole:
			line.Reason = "the answer broke off"
		}
		if v.use != nil {
			line.Reason = v.use.hidden.Mask(line.Reason)
		}
		if !v.answer.whole && r.ProtoMajor == 1 {
			reset(c.job) // so that the end does not look like the end of the answer
		}
		_ = v.book(c).line(line) // nothing is left to refuse; Close tells of it
	}()
	if v.grant.answers != nil {
		x.answer(v, r)
	} else {
		x.proxy.ServeHTTP(v.answer, r) // panics to break the connection off, which net/http does
	}
	if v.answer.err == nil {
		v.answer.err = v.answer.finish()
	}
	v.answer.whole = v.answer.err == nil
}

// rewrite makes the request that the destination gets. What it is was decided.
func (x *exchange) rewrite(r *httputil.ProxyRequest) {
	c := x.session
	r.Out.URL.Scheme, r.Out.URL.Host = string(c.line.Protocol), net.JoinHostPort(c.line.Name, strconv.Itoa(int(c.line.Port)))
	r.Out.URL.RawQuery = r.In.URL.RawQuery
	r.Out.Host = r.In.Host
	r.Out.Trailer = r.In.Trailer // filled when the body has been read
	if use := visitOf(r.In.Context()).use; use != nil {
		use.apply(r.Out, r.In)
	}
}

// inspect sees the header of each answer before the job does.
func (x *exchange) inspect(r *http.Response) error {
	v := visitOf(r.Request.Context())
	v.answer.status = r.StatusCode
	if limit := v.answer.limit; limit > 0 && r.ContentLength > limit && r.Request.Method != http.MethodHead {
		return denied("the answer has %d bytes, the rule allows %d", r.ContentLength, limit)
	}
	if v.use == nil {
		return nil
	}
	if v.answer.opaque = v.use.opaque(r.StatusCode); v.answer.opaque {
		return nil
	}
	if err := scrubbable(r); err != nil || v.use.As != egress.OCIToken || r.StatusCode/100 != 2 {
		return err
	}
	return x.session.exchange(v, r)
}

// connect dials the destination before the first request, so that its line can
// name the address and say that nobody was there, and returns that address.
func (x *exchange) connect(ctx context.Context) (string, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.to != "" {
		return x.to, nil
	}
	c := x.session
	conn, to, err := c.gateway.reach(ctx, c.grant)
	if err != nil {
		return "", err
	}
	if conn, err = c.secure(ctx, conn, x.out.Protocols); err != nil {
		return "", err
	}
	x.first, x.to = conn, to
	return x.to, nil
}

// take gives the transport the connection that was made already, once.
func (x *exchange) take() net.Conn {
	x.mu.Lock()
	defer x.mu.Unlock()
	conn := x.first
	x.first = nil
	return conn
}

// redial connects again, to the same address, which was judged.
func (x *exchange) redial(ctx context.Context, network string, p *http.Protocols) (net.Conn, error) {
	x.mu.Lock()
	to := x.to
	x.mu.Unlock()
	g := x.session.gateway
	ctx, cancel := g.soon(ctx)
	defer cancel()
	var conn net.Conn
	var err error
	if rule := x.session.grant; g.cfg.Parent != nil && g.cfg.Parent.Covers(rule.Name) {
		conn, err = g.tunnel(ctx, rule)
	} else {
		conn, err = g.cfg.Dial(ctx, network, to)
	}
	if err != nil {
		return nil, err
	}
	return x.session.secure(ctx, conn, p)
}

// hangUp breaks a request off in place of an answer: an answer of the gateway's
// could be taken for the destination's. Of HTTP/2 it ends the stream alone.
func (x *exchange) hangUp(w http.ResponseWriter, r *http.Request, why error) {
	if a, ok := w.(*answered); ok {
		a.err = why
		w = a.ResponseWriter // what it does when a connection becomes something else is not for this
	}
	control := http.NewResponseController(w)
	if r.ProtoMajor == 2 {
		_ = control.SetWriteDeadline(time.Unix(1, 0)) // resets the stream at once
		return
	}
	conn, _, err := control.Hijack()
	reset(x.session.job)
	if err == nil {
		_ = conn.Close() // as it is
	}
}

// single is a listener with one connection.
type single struct{ conn net.Conn }

func (s *single) Accept() (net.Conn, error) {
	if conn := s.conn; conn != nil {
		s.conn = nil
		return conn, nil
	}
	return nil, errOnce
}

func (s *single) Close() error   { return nil }
func (s *single) Addr() net.Addr { return &net.TCPAddr{} }

// errOnce ends http.Server.Serve.
var errOnce = errors.New("one connection only")
