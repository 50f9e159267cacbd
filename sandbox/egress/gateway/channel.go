package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// A channel is a session of a job's SSH connection (RFC 4254 section 6).
type channel struct {
	*session
	ssh.Channel
	user     string
	requests <-chan *ssh.Request
	terminal []byte // what the job said of it; nil: it wants none
}

// failed is the exit status of what did not run: that of ssh itself.
const failed = 255

// serveChannel waits for what the channel is for, and does it.
func (c *session) serveChannel(ctx context.Context, user string, offer ssh.NewChannel) {
	ch, requests, err := offer.Accept()
	if err != nil {
		return // the connection is gone
	}
	defer ch.Close()
	stop := context.AfterFunc(ctx, func() { _ = ch.Close() })
	defer stop()
	x := &channel{session: c, Channel: ch, user: user, requests: requests}
	for r := range requests {
		switch r.Type {
		case "exec", "shell", "subsystem":
			x.start(ctx, r)
			_ = ch.Close()            // the job may have closed it
			for r := range requests { // until the job has closed it too
				answer(r, false)
			}
			return
		case "pty-req":
			if x.mayShell() {
				x.terminal = r.Payload
			} else {
				c.say("request", r.Type, "the rule allows no terminal: shell: true is needed")
			}
			answer(r, x.terminal != nil)
		case "x11-req", "auth-agent-req@openssh.com":
			c.say("request", r.Type, "an SSH connection carries sessions only: nothing is forwarded")
			answer(r, false)
		default: // env, and what nobody knows
			answer(r, false)
		}
	}
}

// answer replies if that is wanted. The connection may be gone.
func answer(r *ssh.Request, ok bool) {
	if r.WantReply {
		_ = r.Reply(ok, nil)
	}
}

// mayShell says whether some rule allows a terminal.
func (x *channel) mayShell() bool {
	return slices.ContainsFunc(x.box.offers(x.line.Name, x.line.Port), func(g grant) bool {
		return g.Session != nil && g.Session.Shell && g.inject.User == x.user
	})
}

// errPayload is a request that says too little, or too much.
var errPayload = errors.New("the request is malformed")

// wanted is what a request asks to be run: a command, or a subsystem.
func wanted(r *ssh.Request) (string, error) {
	if r.Type == "shell" {
		return "", nil
	}
	var p struct{ What string }
	if err := ssh.Unmarshal(r.Payload, &p); err != nil {
		return "", errPayload
	}
	return p.What, nil
}

// allow finds the rule for a request, and how the ledger names what is run.
func (x *channel) allow(kind, what string) (g grant, shape, why string) {
	shape, why = what, "no rule allows this"
	if kind == "exec" {
		shape = egress.CommandShape(what)
	}
	shape = printable(shape)
	for _, g := range x.box.offers(x.line.Name, x.line.Port) {
		s := g.Session
		if s == nil {
			continue
		}
		pattern, ok := shape, false
		switch kind {
		case "exec":
			i := slices.IndexFunc(s.Commands, func(p string) bool { return egress.MatchCommand(p, what) })
			if ok = i >= 0; ok && s.Commands[i] != "*" {
				pattern = s.Commands[i]
			}
		case "shell":
			ok = s.Shell
		case "subsystem":
			ok = s.SFTP && what == "sftp"
		}
		if ok && g.inject.User != x.user {
			why = fmt.Sprintf("the lease is for user %s, and the job asks for %s", g.inject.User, printable(x.user))
			ok = false
		}
		if ok && x.terminal != nil && !s.Shell {
			why, ok = "the rule allows no terminal", false
		}
		if ok {
			return g, pattern, ""
		}
	}
	return grant{}, shape, why
}

// start runs what the job asked for, to its end.
func (x *channel) start(ctx context.Context, r *ssh.Request) {
	line := x.line
	line.Time = time.Now()
	what, err := wanted(r)
	g, shape, why := x.allow(r.Type, what)
	if err != nil {
		why = err.Error()
	}
	line.Request = egress.Exchange{Method: r.Type, Path: shape}
	answer(r, true) // so that the reason, if it does not run, is heard
	if why != "" {
		line.Verdict, line.Reason = egress.Refused, why
		x.over(line, x.book())
		return
	}
	line.Rule, line.Request.Lease = g.ID, g.inject.Lease
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if !x.box.enter(g.scope, x, func() { cancel(errWithdrawn) }) {
		line.Verdict, line.Reason = egress.Refused, errWithdrawn.Error()
		x.over(line, x.book())
		return
	}
	defer x.box.leave(g.scope, x)
	// A job that takes nothing any more would hold the channel; not the connection.
	stop := context.AfterFunc(ctx, func() { reset(x.job) })
	defer stop()
	if err := g.inject.uses.take(g.inject.Lease); err != nil {
		line.Verdict, line.Reason = verdict(err)
		x.over(line, g.scope.book)
		return
	}
	up, events, hangUp, err := x.reachSSH(ctx, g, &line)
	if err != nil {
		line.Verdict, line.Reason = verdict(cmp.Or(context.Cause(ctx), err))
		x.over(line, g.scope.book)
		return
	}
	defer hangUp()
	end, err := x.open(line, g)
	if err != nil {
		x.tell("it could not be written down")
		return
	}
	b := &bridge{job: x.Channel, up: up, hangUp: hangUp}
	if err = b.ask(r); err == nil {
		err = b.run(x.requests, events, &line)
	} else {
		x.tell(err.Error())
	}
	end(line, cmp.Or(context.Cause(ctx), err))
}

// over writes the line of something that did not run, and tells the job.
func (x *channel) over(line egress.Line, to *book) {
	line.Duration = time.Since(line.Time)
	_ = to.line(line) // it did not run anyway
	switch line.Verdict {
	case egress.Refused:
		x.tell("refused by the policy of this job: " + line.Reason)
	default:
		x.tell("the destination was not reached; the log of the job says why")
	}
}

// tell says why something did not run, on its standard error.
func (x *channel) tell(why string) {
	_, _ = fmt.Fprintf(x.Stderr(), "mayfly: %s\r\n", why) // the job may have gone
	_, _ = x.SendRequest("exit-status", false, ssh.Marshal(struct{ Status uint32 }{failed}))
}

// reachSSH opens a session at the destination, and the terminal that the job
// wants. hangUp closes the connection, which is for this session alone.
func (x *channel) reachSSH(ctx context.Context, g grant, line *egress.Line) (up ssh.Channel, events <-chan *ssh.Request, hangUp func(), err error) {
	conn, to, err := x.gateway.reach(ctx, &g)
	if err != nil {
		return nil, nil, nil, err
	}
	line.Dialled = to
	stop := context.AfterFunc(ctx, func() { reset(conn) })
	hangUp = func() {
		stop()
		_ = conn.Close() // it may be closed already
	}
	client, err := x.dialSSH(ctx, conn, g)
	if err == nil {
		up, events, err = client.OpenChannel("session", nil)
	}
	if err == nil && x.terminal != nil {
		var ok bool
		if ok, err = up.SendRequest("pty-req", true, x.terminal); err == nil && !ok {
			err = errors.New("the destination gives no terminal")
		}
	}
	if err != nil {
		hangUp()
		return nil, nil, nil, err
	}
	return up, events, hangUp, nil
}

// A bridge passes what moves on two channels that are for the same.
type bridge struct {
	job, up        ssh.Channel
	hangUp         func() // closes the connection to the destination
	sent, received tally
}

// A tally counts what is written.
type tally struct{ n atomic.Int64 }

func (t *tally) to(w io.Writer) io.Writer { return io.MultiWriter(w, t) }

// Write implements io.Writer.
func (t *tally) Write(b []byte) (int, error) {
	t.n.Add(int64(len(b)))
	return len(b), nil
}

// ask has the destination run what the job asked for.
func (b *bridge) ask(r *ssh.Request) error {
	ok, err := b.up.SendRequest(r.Type, true, r.Payload)
	if err == nil && !ok {
		err = errors.New("the destination refuses it")
	}
	return err
}

// run returns when the destination has closed its channel, or the job has.
func (b *bridge) run(asked, events <-chan *ssh.Request, line *egress.Line) error {
	// What the job sends, and asks, is not waited for: it ends with the job's
	// channel, which the job closes when it likes.
	go func() {
		_, _ = io.Copy(b.sent.to(b.up), b.job)
		_ = b.up.CloseWrite() // it may be closed already
	}()
	go func() {
		for r := range asked {
			b.pass(r)
		}
		b.hangUp()
	}()
	var output sync.WaitGroup
	output.Go(func() { _, _ = io.Copy(b.received.to(b.job), b.up) })
	output.Go(func() { _, _ = io.Copy(b.received.to(b.job.Stderr()), b.up.Stderr()) })
	ended := make(chan struct{})
	go func() { // ends with the channel to the destination
		output.Wait()
		_ = b.job.CloseWrite() // it may be closed already
		close(ended)
	}()
	known := false
	for r := range events {
		if r.Type == "exit-status" || r.Type == "exit-signal" {
			<-ended // what came before is delivered first
			known = true
			_, _ = b.job.SendRequest(r.Type, false, r.Payload) // the job may have gone
			note(r, line)
		}
		answer(r, false)
	}
	<-ended
	line.Sent, line.Received = b.sent.n.Load(), b.received.n.Load()
	if !known {
		return errors.New("ended without an exit status")
	}
	return nil
}

// pass is for what the job asks of something that runs.
func (b *bridge) pass(r *ssh.Request) {
	ok := false
	if r.Type == "window-change" || r.Type == "signal" {
		sent, err := b.up.SendRequest(r.Type, r.WantReply, r.Payload)
		ok = err == nil && sent
	}
	answer(r, ok)
}

// note keeps how it ended.
func note(r *ssh.Request, line *egress.Line) {
	var status struct{ Status uint32 }
	if r.Type == "exit-status" && ssh.Unmarshal(r.Payload, &status) == nil {
		line.Request.Status = int(status.Status)
		return
	}
	line.Request.Status = failed
}
