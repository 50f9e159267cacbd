package gateway

import (
	"bytes"
	"cmp"
	"context"
	"crypto/subtle"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// A cancelKey is what a CancelRequest names: a session, and that it was told.
type cancelKey struct {
	name   string
	port   uint16
	secret string // the number of the process, and its secret
}

// servePostgres ends the job's side of a session, and logs in on the other.
func (c *session) servePostgres(ctx context.Context) {
	hurry := time.AfterFunc(c.gateway.cfg.Hello, func() { reset(c.job) })
	defer hurry.Stop()
	conn, code, body, err := c.beginPostgres(ctx)
	switch {
	case err != nil:
		c.fail(cmp.Or(context.Cause(ctx), err))
		return
	case code == codeCancel:
		hurry.Stop()
		c.cancel(ctx, body)
		return
	}
	defer conn.Close()
	wants, err := parseStartup(code, body)
	if err != nil {
		c.fail(refused("%v", err))
		return
	}
	c.line.Request = egress.Exchange{Method: "login", Path: printable(wants.database)}
	g, err := c.admitPostgres(conn, wants)
	if hurry.Stop(); err != nil {
		c.end(conn, cmp.Or(context.Cause(ctx), err))
		return
	}
	c.line.Rule, c.line.Request.Lease = g.ID, g.inject.Lease
	if err := g.inject.uses.take(g.inject.Lease); err != nil {
		c.end(conn, err)
		return
	}
	// The rule may be another than that of the connection, and end before it.
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if !c.box.enter(g.scope, &wants, func() { cancel(errWithdrawn) }) {
		c.end(conn, refused("%v", errWithdrawn))
		return
	}
	defer c.box.leave(g.scope, &wants)
	stop := context.AfterFunc(ctx, func() { reset(conn) })
	defer stop()
	c.bridgePostgres(ctx, conn, wants, g)
}

// beginPostgres reads up to what the job wants, and ends its TLS if it has any.
func (c *session) beginPostgres(ctx context.Context) (net.Conn, uint32, []byte, error) {
	head := &replayed{Conn: c.job, head: make([]byte, 1)}
	if _, err := c.job.Read(head.head); err != nil {
		return nil, 0, nil, refused("%v: %v", errStartup, err)
	}
	if head.head[0] == 0x16 { // a ClientHello at once (sslnegotiation=direct, PostgreSQL 17)
		return c.securePostgres(ctx, head)
	}
	for range 3 { // GSSAPI, TLS, and the startup, in any order
		code, body, err := readPacket(head) // which leaves nothing in the head
		if err != nil {
			return nil, 0, nil, refused("%v", err)
		}
		answer := byte('N')
		switch code {
		case codeTLS:
			answer = 'S'
		case codeGSS:
		default:
			return c.job, code, body, nil
		}
		if _, err := c.job.Write([]byte{answer}); err != nil {
			return nil, 0, nil, err
		}
		if code == codeTLS {
			return c.securePostgres(ctx, c.job)
		}
	}
	return nil, 0, nil, refused("%v", errStartup)
}

// securePostgres ends the TLS of a job, and reads what it wants.
func (c *session) securePostgres(ctx context.Context, conn net.Conn) (net.Conn, uint32, []byte, error) {
	config, err := c.box.authority.config(c.line.Name)
	if err != nil {
		return nil, 0, nil, err
	}
	config = config.Clone()
	config.NextProtos = []string{"postgresql"}
	t := tls.Server(conn, config)
	if err := t.HandshakeContext(ctx); err != nil {
		return nil, 0, nil, fmt.Errorf("TLS with the job: %w; does the program trust the job's authority, %s?", err, caFile)
	}
	if name := t.ConnectionState().ServerName; name != "" && !strings.EqualFold(name, c.line.Name) {
		return nil, 0, nil, refused("the ClientHello asks for %s on a connection to %s", printable(name), c.line.Name)
	}
	code, body, err := readPacket(t)
	if err == nil && (code == codeGSS || code == codeTLS) {
		err = errStartup
	}
	if err != nil {
		return nil, 0, nil, refused("%v", err)
	}
	return t, code, body, nil
}

// admitPostgres finds the lease that a job means, and compares the password with
// its placeholder.
func (c *session) admitPostgres(conn net.Conn, wants startup) (grant, error) {
	if _, ok := wants.settings["replication"]; ok {
		return grant{}, refused("a session for replication is not carried")
	}
	var g grant
	found := slices.ContainsFunc(c.box.offers(c.line.Name, c.line.Port), func(o grant) bool {
		g = o
		return o.inject != nil && o.inject.User == wants.user && o.inject.Name == wants.database
	})
	if !found {
		return grant{}, refused("no lease is for user %s at database %s", printable(wants.user), printable(wants.database))
	}
	// The placeholder is worth something in this box alone: it needs no SCRAM.
	var hello []byte
	if wants.older || len(wants.unknown) > 0 {
		hello, _ = (&pgproto3.NegotiateProtocolVersion{NewestMinorProtocol: codeThree, UnrecognizedOptions: wants.unknown}).Encode(nil)
	}
	hello, err := (&pgproto3.AuthenticationCleartextPassword{}).Encode(hello)
	if err != nil {
		return grant{}, err
	}
	if _, err := conn.Write(hello); err != nil {
		return grant{}, err
	}
	password, err := readPassword(conn)
	if err != nil {
		return grant{}, refused("%v", err)
	}
	if subtle.ConstantTimeCompare([]byte(password), []byte(g.inject.Placeholder)) != 1 {
		return grant{}, refused("the password is not the placeholder of lease %s", g.inject.Lease)
	}
	return g, nil
}

// end writes the line of a session that came to nothing, and tells the job: what
// the policy says, or the destination. All else is for the log.
func (c *session) end(conn net.Conn, err error) {
	e := &pgproto3.ErrorResponse{Severity: "FATAL", SeverityUnlocalized: "FATAL", Code: "08001"} // sqlclient_unable_to_establish_sqlconnection
	e.Message = "mayfly: the gateway could not log in; the log of the job says why"
	if p := (*pgconn.PgError)(nil); errors.As(err, &p) {
		e = &pgproto3.ErrorResponse{Severity: p.Severity, SeverityUnlocalized: p.SeverityUnlocalized, Code: p.Code, Message: p.Message, Detail: p.Detail, Hint: p.Hint}
	}
	if r := (*refusal)(nil); errors.As(err, &r) {
		e.Code, e.Message = "28000", "mayfly: refused by the policy of this job: "+r.reason // invalid_authorization_specification
	}
	tell(conn, e)
	l := c.line
	l.Verdict, l.Reason = verdict(err)
	l.Duration = time.Since(c.started)
	_ = c.book().line(l) // as in fail
}

// tell sends the job what ends its session. It may have gone.
func tell(conn net.Conn, e *pgproto3.ErrorResponse) {
	b, err := e.Encode(nil)
	if err == nil {
		_ = conn.SetWriteDeadline(time.Now().Add(DefaultHello))
		_, _ = conn.Write(b)
	}
}

// bridgePostgres logs in at the destination and passes what follows.
func (c *session) bridgePostgres(ctx context.Context, conn net.Conn, wants startup, g grant) {
	up, to, err := c.gateway.reach(ctx, &g)
	if err != nil {
		c.end(conn, err)
		return
	}
	defer up.Close()
	c.line.Dialled = to
	in, err := c.loginPostgres(ctx, up, wants, g)
	if err != nil {
		c.end(conn, cmp.Or(context.Cause(ctx), err))
		return
	}
	line := c.line
	end, err := c.open(line, g)
	if err != nil {
		tell(conn, &pgproto3.ErrorResponse{Severity: "FATAL", SeverityUnlocalized: "FATAL", Code: "08001", Message: "mayfly: the session could not be written down"})
		return
	}
	key := cancelKey{c.line.Name, c.line.Port, in.secret}
	c.box.logins.keep(key)
	defer c.box.logins.forget(key)
	p := newPipe(conn, in.conn, c.gateway.cfg.Idle)
	stop := context.AfterFunc(ctx, func() { p.abort(errWithdrawn) })
	defer stop()
	if _, err = conn.Write(in.greeting); err == nil {
		err = p.run(nil)
	}
	line.Sent, line.Received = p.sent, p.received
	end(line, cmp.Or(context.Cause(ctx), err))
}

// cancel passes a CancelRequest for a session of this box.
func (c *session) cancel(ctx context.Context, body []byte) {
	c.line.Request = egress.Exchange{Method: "cancel"}
	key := cancelKey{c.line.Name, c.line.Port, string(body)}
	if len(body) < 8 || len(body) > cancelMax || !c.box.logins.has(key) {
		c.fail(refused("the job has no such session to cancel"))
		return
	}
	up, to, err := c.gateway.reach(ctx, c.grant)
	if err != nil {
		c.fail(err)
		return
	}
	defer up.Close()
	line := c.line
	line.Dialled = to
	end, err := c.open(line, *c.grant)
	if err != nil {
		reset(c.job)
		return
	}
	end(line, cmp.Or(context.Cause(ctx), c.sendCancel(ctx, up, body)))
}

func (l *logins) keep(k cancelKey) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cancels == nil {
		l.cancels = map[cancelKey]bool{}
	}
	l.cancels[k] = true
}

func (l *logins) forget(k cancelKey) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.cancels, k)
}

func (l *logins) has(k cancelKey) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cancels[k]
}

// encode appends messages of a destination to what the job is greeted with.
func encode(b *bytes.Buffer, messages ...pgproto3.BackendMessage) error {
	for _, m := range messages {
		text, err := m.Encode(nil)
		if err != nil {
			return err
		}
		b.Write(text)
	}
	return nil
}
