package gateway

import (
	"context"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// headerLimit bounds the header of a request; servers take 8 to 64 KiB.
const headerLimit = 128 << 10

// An exchange is a connection that carries HTTP requests. net/http parses them
// and writes them anew, so what was checked is what the destination gets.
type exchange struct {
	session *session
	proxy   *httputil.ReverseProxy
	wg      sync.WaitGroup // requests that took the connection over to reset it
	pending atomic.Bool    // bytes of a request came, and its line is not written

	mu    sync.Mutex
	first net.Conn // dialled, not yet used
	to    string   // the address that was judged; all connections go there
}

// serveHTTP serves the requests of the connection.
func (c *session) serveHTTP(ctx context.Context) {
	x := &exchange{session: c}
	silent := log.New(io.Discard, "", 0) // the ledger says what happened
	transport := &http.Transport{
		DialContext:           x.dial,
		Protocols:             new(http.Protocols),
		DisableCompression:    true,
		MaxConnsPerHost:       1,
		IdleConnTimeout:       c.gateway.cfg.Idle,
		ResponseHeaderTimeout: c.gateway.cfg.Idle,
		ExpectContinueTimeout: time.Second,
	}
	transport.Protocols.SetHTTP1(true)
	x.proxy = &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", net.JoinHostPort(c.line.Name, strconv.Itoa(int(c.line.Port)))
			r.Out.URL.RawQuery = r.In.URL.RawQuery
			r.Out.Host = r.In.Host
		},
		Transport:     transport,
		FlushInterval: -1,
		ErrorLog:      silent,
		ErrorHandler:  func(w http.ResponseWriter, _ *http.Request, err error) { x.hangUp(w, err) },
	}
	ended := make(chan struct{})
	server := &http.Server{
		Handler:           http.HandlerFunc(x.serve),
		Protocols:         transport.Protocols,
		ReadHeaderTimeout: c.gateway.cfg.Hello,
		IdleTimeout:       c.gateway.cfg.Idle,
		MaxHeaderBytes:    headerLimit,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ConnState:         x.watch(ended),
		ErrorLog:          silent,
		// OPTIONS * is the destination's to answer.
		DisableGeneralOptionsHandler: true,
	}
	// Serve returns when the one connection was accepted.
	_ = server.Serve(&single{conn: c.job})
	<-ended
	x.wg.Wait()
	transport.CloseIdleConnections()
	if x.first != nil {
		_ = x.first.Close() // net/http may have done so
	}
}

// watch closes ended when the connection is over, and refuses in the ledger
// what net/http answered without asking the handler.
func (x *exchange) watch(ended chan struct{}) func(net.Conn, http.ConnState) {
	return func(_ net.Conn, state http.ConnState) {
		switch state {
		case http.StateActive:
			x.pending.Store(true)
		case http.StateClosed, http.StateHijacked:
			if x.pending.Load() {
				l := x.session.line
				l.Verdict, l.Reason = egress.Refused, "not a whole HTTP request"
				_ = x.session.book().line(l) // it was refused already
			}
			close(ended)
		}
	}
}

// serve decides on one request and forwards it.
func (x *exchange) serve(w http.ResponseWriter, r *http.Request) {
	x.wg.Add(1)
	defer x.wg.Done()
	x.pending.Store(false)
	c := x.session
	line := c.line
	line.Time = time.Now()
	err := checkRequest(r, line.Name, line.Port)
	if err == nil {
		line.Dialled, err = x.connect(r.Context())
	}
	line.Verdict = egress.Allowed
	if err != nil {
		line.Verdict, line.Reason = verdict(err)
	}
	if c.book().line(line) != nil || err != nil {
		x.hangUp(w, err)
		return
	}
	body := &counted{ReadCloser: r.Body}
	r.Body = body
	answer := &answered{ResponseWriter: w}
	defer func() {
		line.Verdict, line.Sent, line.Received = egress.Ended, body.n.Load(), answer.n
		line.Duration = time.Since(line.Time)
		switch {
		case r.Context().Err() != nil:
			line.Reason = context.Cause(r.Context()).Error()
		case answer.err != nil:
			line.Reason = answer.err.Error()
		case !answer.whole:
			line.Reason = "the answer broke off"
		}
		if !answer.whole {
			_ = c.job.SetLinger(0) // so that the end does not look like the end of the answer
		}
		_ = c.book().line(line) // nothing is left to refuse; Close tells of it
	}()
	x.proxy.ServeHTTP(answer, r) // panics to break the connection off, which net/http does
	answer.whole = answer.err == nil
}

// checkRequest refuses a request that is not plainly one to name and port.
func checkRequest(r *http.Request, name string, port uint16) error {
	host, given := r.Host, ""
	if h, p, err := net.SplitHostPort(host); err == nil {
		host, given = h, p
	}
	switch {
	case r.ProtoMajor != 1:
		return refused("HTTP/%d is not carried; use HTTP/1.1", r.ProtoMajor)
	case r.Method == http.MethodConnect:
		return refused("CONNECT is not carried; connect to the name that is meant")
	case r.URL.Scheme != "" && r.URL.Scheme != "http", r.URL.User != nil, r.URL.Opaque != "":
		return refused("the request's target is not one of this connection")
	case !strings.EqualFold(host, name):
		return refused("the request is for host %s on a connection to %s", printable(host), name)
	case given != "" && given != strconv.Itoa(int(port)):
		return refused("the request is for port %s on a connection to port %d", printable(given), port)
	case len(r.Header["Upgrade"]) > 0:
		return refused("an upgrade to another protocol is not carried; the rule needs protocol: tcp")
	}
	return nil
}

// connect dials the destination before the first request, so that its line can
// name the address, and returns that address.
func (x *exchange) connect(ctx context.Context) (string, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.to != "" {
		return x.to, nil
	}
	conn, err := x.session.gateway.reach(ctx, x.session.grant.Rule)
	if err != nil {
		return "", err
	}
	x.first, x.to = conn, conn.RemoteAddr().String()
	return x.to, nil
}

// dial gives the transport the connection that was made already. If the
// destination has closed that, it is dialled again at the same address, which
// was judged.
func (x *exchange) dial(ctx context.Context, network, _ string) (net.Conn, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if conn := x.first; conn != nil {
		x.first = nil
		return conn, nil
	}
	ctx, cancel := context.WithTimeout(ctx, x.session.gateway.cfg.Dialling)
	defer cancel()
	return x.session.gateway.cfg.Dial(ctx, network, x.to)
}

// hangUp resets the connection in place of an answer: an answer of the
// gateway's could be taken for the destination's.
func (x *exchange) hangUp(w http.ResponseWriter, why error) {
	if a, ok := w.(*answered); ok {
		a.err = why
	}
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		conn = x.session.job
	}
	reset(conn)
}

// counted counts the bytes of a request's body.
type counted struct {
	io.ReadCloser
	n atomic.Int64
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.ReadCloser.Read(b)
	c.n.Add(int64(n))
	return n, err
}

// answered counts the bytes of an answer's body.
type answered struct {
	http.ResponseWriter
	n     int64
	err   error // why there is no answer
	whole bool
}

func (a *answered) Write(b []byte) (int, error) {
	n, err := a.ResponseWriter.Write(b)
	a.n += int64(n)
	return n, err
}

// Unwrap is for http.ResponseController.
func (a *answered) Unwrap() http.ResponseWriter { return a.ResponseWriter }

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
