package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// A session is one connection of a job.
type session struct {
	gateway *Gateway
	box     *box
	job     *net.TCPConn
	started time.Time
	line    egress.Line         // what is known so far
	grant   *grant              // nil: no rule allows the connection
	asked   chan egress.Process // gives the process once; nil: it is in line, or was not asked for
}

// A refusal is an error that the rules are the reason of.
type refusal struct {
	reason string
	answer bool // the job hears the reason, as an answer to its request
}

func (r *refusal) Error() string { return r.reason }

// refused makes a refusal.
func refused(format string, args ...any) error {
	return &refusal{reason: fmt.Sprintf(format, args...)}
}

// denied makes a refusal of a request that is plain, and that no rule allows: its
// client may hear so. All others are reset, because an answer could be taken for
// the destination's.
func denied(format string, args ...any) error {
	return &refusal{reason: fmt.Sprintf(format, args...), answer: true}
}

// serve decides on the connection and serves it to its end.
func (c *session) serve() {
	if reason := c.decide(); reason != "" {
		c.refuse(reason)
		return
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	if !c.box.enter(c.grant.scope, c, func() { cancel(errWithdrawn) }) {
		c.refuse(errWithdrawn.Error())
		return
	}
	defer c.box.leave(c.grant.scope, c)
	stop := context.AfterFunc(ctx, func() { reset(c.job) })
	defer stop()
	defer c.job.Close()
	switch c.grant.Protocol {
	case egress.HTTP:
		c.serveHTTP(ctx, c.job, false)
	case egress.HTTPS:
		c.terminate(ctx)
	case egress.SSH:
		c.serveSSH(ctx)
	case egress.Postgres:
		c.servePostgres(ctx)
	case egress.TLS:
		hello, err := c.hello()
		if err != nil {
			c.fail(cmp.Or(context.Cause(ctx), err))
			return
		}
		c.pass(ctx, hello)
	case egress.TCP:
		c.pass(ctx, nil)
	default:
		c.learn(ctx)
	}
}

// decide finds the rule, or says why there is none.
func (c *session) decide() (reason string) {
	if g := c.grant; g != nil {
		c.line.Name, c.line.Port, c.line.Rule, c.line.Protocol = g.Name, g.Port, g.ID, g.Protocol
		c.line.Address = c.job.LocalAddr().String()
		c.ask(addrPort(c.job.LocalAddr()))
		return ""
	}
	to, err := original(c.job)
	if err != nil {
		return "the connection was not made to a virtual address"
	}
	c.line.Address, c.line.Port = to.Addr().String(), to.Port()
	c.ask(to)
	if !egress.Virtual.Contains(to.Addr()) {
		return "the connection was not made to a virtual address; connect to a name"
	}
	name, g := c.box.decide(to)
	if name == "" {
		return "no name has this virtual address; connect to a name"
	}
	c.line.Name, c.line.Address = name, ""
	if g == nil {
		return fmt.Sprintf("no rule for port %d of this name", to.Port())
	}
	c.grant = g
	c.line.Rule, c.line.Protocol = g.ID, g.Protocol
	return ""
}

// book is where the lines of the connection go.
func (c *session) book() *book {
	if c.grant != nil {
		return c.grant.scope.book
	}
	return c.box.root.book
}

// refuse writes the line of a refused connection and resets it.
func (c *session) refuse(reason string) {
	c.fail(&refusal{reason: reason})
}

// fail writes the line of a connection that came to nothing and resets it. A
// line that cannot be written changes nothing for the job.
func (c *session) fail(err error) {
	c.known()
	l := c.line
	l.Verdict, l.Reason = verdict(err)
	l.Duration = time.Since(c.started)
	_ = c.book().line(l)
	reset(c.job)
}

// verdict tells a refusal from a failure.
func verdict(err error) (egress.Verdict, string) {
	if r := (*refusal)(nil); errors.As(err, &r) {
		return egress.Refused, r.reason
	}
	return egress.Failed, err.Error()
}

// reset closes a connection so that the peer sees that it did not end well.
func reset(conn net.Conn) {
	for {
		inner, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		conn = inner.NetConn()
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // closed already, or closed below
	}
	_ = conn.Close()
}

// reach connects to where the rule leads: outside, or into another box. It
// returns what the ledger calls that.
func (c *session) reach(ctx context.Context) (net.Conn, string, error) {
	if c.grant.into == nil {
		return c.gateway.reach(ctx, c.grant)
	}
	ctx, cancel := c.gateway.soon(ctx)
	defer cancel()
	conn, err := c.grant.into.dial(ctx, c.line.Port)
	if err != nil {
		return nil, "", err
	}
	return conn, c.grant.Service + " " + conn.RemoteAddr().String(), nil
}

// pass dials the destination and passes bytes: first, which the job sent
// already, then all others.
func (c *session) pass(ctx context.Context, first []byte) {
	up, to, err := c.reach(ctx)
	if err != nil {
		c.fail(err)
		return
	}
	defer up.Close()
	c.line.Dialled = to
	c.known()
	allowed := c.line
	allowed.Verdict = c.grant.verdict()
	if c.book().line(allowed) != nil {
		reset(c.job)
		return
	}
	p := newPipe(c.job, up, c.gateway.cfg.Idle)
	stop := context.AfterFunc(ctx, func() { p.abort(errWithdrawn) })
	defer stop()
	end := c.line
	end.Verdict = egress.Ended
	if err := p.run(first); ctx.Err() != nil {
		end.Reason = context.Cause(ctx).Error()
	} else if err != nil {
		end.Reason = err.Error()
	}
	end.Sent, end.Received, end.Duration = p.sent, p.received, time.Since(c.started)
	_ = c.book().line(end) // nothing is left to refuse; Close tells of it
}

// errWithdrawn ends what a closed scope allowed.
var errWithdrawn = errors.New("the rule was withdrawn")
