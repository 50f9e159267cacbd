package guest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

// A process is the guest's half of a Run: what the reading goroutine knows of it.
type process struct {
	number int // 0, or 1 for one that runs beside another
	output *wire.Inbox
	credit *wire.Credit  // for input; nil if there is none
	exit   sandbox.Exit  // valid when exited is closed
	exited chan struct{} // closed by receive
}

// receive takes a frame of the process. The caller holds Client.mu.
func (r *process) receive(t wire.Type, p []byte) error {
	if isClosed(r.exited) {
		return fmt.Errorf("%w: type %d after the exit", wire.ErrFrame, t)
	}
	switch t {
	case wire.InputGrant:
		n, err := wire.ParseUint32(p)
		if err != nil || r.credit == nil || !r.credit.Add(n) {
			return fmt.Errorf("%w: grant of more input than was sent", wire.ErrFrame)
		}
		return nil
	case wire.Exit:
		status, signal, err := wire.ParseExit(p)
		if err != nil {
			return fmt.Errorf("exit: %w", err)
		}
		r.exit = sandbox.Exit{Code: int(status), Signal: int(signal)}
		if signal != 0 {
			r.exit.Code = 128 + int(signal)
		}
		close(r.exited)
		return nil
	}
	if _, _, err := wire.ParseStamp(p); err != nil {
		return fmt.Errorf("output: %w", err)
	}
	if !r.output.Put(t, p) {
		return fmt.Errorf("%w: more output than was granted", wire.ErrFrame)
	}
	return nil
}

// Run implements sandbox.Sandbox. The guest cannot see why the kernel killed a
// process: a runtime that can sets Exit.OOM. Both outputs are called by the
// calling goroutine, and Run does not return before they do. A second Run while
// one is under way is ErrBusy, unless it is one that runs beside. If the guest dies, what it had sent is delivered
// before ErrDied is returned.
func (c *Client) Run(ctx context.Context, p sandbox.Process) (sandbox.Exit, error) {
	if ctx.Err() != nil {
		return sandbox.Exit{}, context.Cause(ctx)
	}
	if p.Grace == 0 {
		p.Grace = c.grace
	}
	if p.Grace < 0 || p.Grace > maxGrace {
		return sandbox.Exit{}, fmt.Errorf("run: grace %v is not between 0 and %v", p.Grace, maxGrace)
	}
	if p.Dir == "" {
		p.Dir = sandbox.Workspace
	}
	if startSize(p) > wire.MaxStart {
		return tooLong(p)
	}
	r := &process{output: wire.NewInbox(), exited: make(chan struct{})}
	if p.Beside {
		r.number = 1
	}
	command := command(p)
	if command.Input != wire.Nothing {
		r.credit = wire.NewCredit()
	}
	if err := c.adopt(r); err != nil {
		return sandbox.Exit{}, err
	}
	defer c.abandon(r)
	if err := c.sendTo(r.number, wire.AppendStart(nil, command)); err != nil {
		return sandbox.Exit{}, err
	}
	f := follower{client: c, process: r, spec: p, stopping: make(chan struct{})}
	return f.follow(ctx)
}

// command is p in the words of the protocol.
func command(p sandbox.Process) wire.Command {
	c := wire.Command{Dir: p.Dir, Args: p.Args, Env: p.Env, Alone: p.Alone, User: p.User}
	switch {
	case p.TTY != nil:
		c.Input, c.Size = wire.Terminal, wire.Size(p.TTY.Size)
	case p.Stdin != nil:
		c.Input = wire.Pipe
	}
	return c
}

// startSize is the size of the payload of a Start for p.
func startSize(p sandbox.Process) int {
	size := wire.StartHead + 4 + len(p.User) + 4 + len(p.Dir) + 4
	for _, s := range p.Args {
		size += 4 + len(s)
	}
	for _, s := range p.Env {
		size += 4 + len(s)
	}
	return size
}

// tooLong answers for a process that no Linux could start, as a shell does.
func tooLong(p sandbox.Process) (sandbox.Exit, error) {
	exit := sandbox.Exit{Code: 126}
	if p.Stderr == nil {
		return exit, nil
	}
	if err := p.Stderr(time.Now(), []byte("mayfly: argument list too long\n")); err != nil {
		return exit, fmt.Errorf("output: %w", err)
	}
	return exit, nil
}

// adopt makes r the process of the box.
func (c *Client) adopt(r *process) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	if c.processes[r.number] != nil {
		return ErrBusy
	}
	c.processes[r.number] = r
	return nil
}

// abandon makes room for the next process after r.
func (c *Client) abandon(r *process) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.processes[r.number] = nil
}

// A follower is the agent's half of a Run.
type follower struct {
	client   *Client
	process  *process
	spec     sandbox.Process
	spare    []byte // memory to hand back to the inbox
	unpaid   int    // bytes read and not granted again
	broken   error  // of an output: the rest is discarded
	deadline time.Time

	once     sync.Once
	cause    error         // why the process is being stopped; valid when stopping is closed
	stopping chan struct{} // the guest has been told
}

// follow delivers output until the process has exited, and stops it when ctx
// ends or an output fails. The end of ctx has a goroutine of its own, and so has
// the input, since an output may be what blocks.
func (f *follower) follow(ctx context.Context) (exit sandbox.Exit, err error) {
	told := make(chan struct{})
	watched := context.AfterFunc(ctx, func() {
		defer close(told)
		f.stop(context.Cause(ctx))
	})
	var fed sync.WaitGroup
	if f.process.credit != nil {
		fed.Go(f.feed)
	}
	exit, err = f.loop()
	fed.Wait()
	if !watched() {
		<-told
	}
	if isClosed(f.stopping) {
		return exit, join(f.cause, err)
	}
	return exit, join(f.broken, err)
}

// join is errors.Join, but leaves a single error as it is.
func join(a, b error) error {
	switch {
	case a == nil:
		return b
	case b == nil:
		return a
	}
	return errors.Join(a, b)
}

func (f *follower) loop() (sandbox.Exit, error) {
	c, r, stopping := f.client, f.process, f.stopping
	var overdue <-chan time.Time
	for {
		// Looked at before the output is taken, so that the last of it is.
		exited, died := isClosed(r.exited), isClosed(c.done)
		f.deliver()
		switch {
		case exited:
			return r.exit, nil
		case died:
			return sandbox.Exit{}, c.Err()
		}
		select {
		case <-r.output.Wake():
		case <-r.exited:
		case <-c.done:
		case <-stopping:
			stopping = nil
			f.deadline = time.Now().Add(2*f.spec.Grace + c.wait)
			overdue = time.After(time.Until(f.deadline))
		case <-overdue:
			left := time.Until(f.deadline)
			if left <= 0 {
				c.kill(errors.New("the guest did not stop the process in time"))
			}
			overdue = time.After(max(left, 0))
		}
	}
}

// feed sends the process what it is to read, until it has exited.
func (f *follower) feed() {
	in := f.spec.Stdin
	var sizes <-chan sandbox.Size
	if f.spec.TTY != nil {
		sizes = f.spec.TTY.Resize
	}
	for {
		var frame []byte
		select {
		case b, more := <-in:
			if more {
				if !f.input(b) {
					return
				}
				continue
			}
			in, frame = nil, wire.AppendHeader(nil, wire.InputEnd, 0)
		case size, more := <-sizes:
			if !more {
				sizes = nil
				continue
			}
			frame = wire.AppendResize(nil, wire.Size(size))
		case <-f.process.exited:
			return
		case <-f.client.done:
			return
		}
		if f.client.sendTo(f.process.number, frame) != nil {
			return
		}
	}
}

// input sends bytes as the guest grants it. It reports false if there is no
// point in it any more.
func (f *follower) input(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), wire.MaxData)
		for !f.process.credit.Try(wire.HeaderSize + n) {
			select {
			case <-f.process.credit.Wake():
			case <-f.process.exited:
				return false
			case <-f.client.done:
				return false
			}
		}
		frame := append(wire.AppendHeader(make([]byte, 0, wire.HeaderSize+n), wire.Input, n), b[:n]...)
		if f.client.sendTo(f.process.number, frame) != nil {
			return false
		}
		b = b[n:]
	}
	return true
}

// stop tells the guest to stop the process, once. A process that has exited is
// not stopped any more.
func (f *follower) stop(cause error) {
	f.once.Do(func() {
		if isClosed(f.process.exited) {
			return
		}
		f.cause = cause
		close(f.stopping)
		f.tell(wire.Stop, int(f.spec.Grace.Milliseconds()))
	})
}

// deliver gives what has arrived to the outputs and grants as much again. The
// time that the outputs take is not held against the guest.
func (f *follower) deliver() {
	batch := f.process.output.Take(f.spare)
	f.spare = batch
	for t, p, rest, ok := wire.Cut(batch); ok; t, p, rest, ok = wire.Cut(rest) {
		f.unpaid += wire.HeaderSize + len(p)
		began := time.Now()
		f.output(t, p)
		f.deadline = f.deadline.Add(time.Since(began))
		if f.unpaid >= wire.GrantAt && !isClosed(f.process.exited) {
			f.tell(wire.Grant, f.unpaid)
			f.unpaid = 0
		}
	}
}

// output calls the output that a frame is for. An error of it ends the process.
func (f *follower) output(t wire.Type, p []byte) {
	out := f.spec.Stdout
	if t == wire.Stderr {
		out = f.spec.Stderr
	}
	nanos, b, err := wire.ParseStamp(p)
	if f.broken != nil || out == nil || err != nil || len(b) == 0 {
		return // err was checked when the frame arrived
	}
	if err := out(time.Unix(0, nanos), b); err != nil {
		f.broken = fmt.Errorf("output: %w", err)
		f.stop(f.broken)
	}
}

// tell sends a number. If that fails the client is dead, which follow sees.
func (f *follower) tell(t wire.Type, n int) {
	_ = f.client.sendTo(f.process.number, wire.AppendUint32(nil, t, uint32(n)))
}
