// Package serve is the guest's side of a box: what process 1 of every box does.
// It starts processes when the agent says so, streams what they print, moves
// files in and out, reaps orphans, and ends, and with it the box, as soon as
// the agent's stream does.
//
// The agent is trusted here and the processes are not: they share the box, its
// user ids and its /proc with the guest. [Harden] is what keeps them out of it.
//
// It works with the capabilities CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETUID,
// SETGID, KILL and NET_BIND_SERVICE, under no_new_privs and a seccomp filter; it
// drops nothing itself and the processes inherit what the runtime left. It
// needs the /proc of its own pid namespace.
package serve

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

var (
	// ErrExpired reports that the box has reached the end of its life.
	ErrExpired = errors.New("the box has expired")

	// ErrProtocol reports an agent that does not keep to the protocol, for
	// example by a Start while a process runs.
	ErrProtocol = errors.New("protocol broken by the agent")
)

// Options are what a guest is told when it starts.
type Options struct {
	// Expires is when Serve ends whatever the agent does. It is turned into a
	// duration once, so that a clock that jumps does not move it. Zero is never.
	Expires time.Time
	// Direct refuses entries of archives behind links, also of those that do not
	// leave the directory. It is for a kernel that follows a link in spite of
	// O_NOFOLLOW if it is given O_DIRECTORY as well, as gVisor's does: what
	// os.Root promises does not hold there.
	Direct bool
}

// Serve says hello on conn and does what the agent asks until conn ends, which
// is not an error, or breaks, or the box expires. Then it closes conn, kills
// the process that it was running, and returns. Process 1 exits after it: the
// kernel then kills all that is left.
func Serve(conn io.ReadWriteCloser, o Options) error {
	starter, err := newStarter()
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	defer starter.close()
	g := newGuest(conn, "/", starter.start)
	g.files.direct = o.Direct
	if !o.Expires.IsZero() {
		timer := time.AfterFunc(time.Until(o.Expires), func() { g.end(ErrExpired) })
		defer timer.Stop()
	}
	return g.serve()
}

// A guest is the state of process 1.
type guest struct {
	conn     io.ReadWriteCloser
	files    tree
	start    startFunc
	children *children
	tails    *tails
	buffers  [wire.Processes][2][]byte // of a step's stdout and stderr, made for the first
	scratch  []byte                    // of the Put under way, made for the first
	topic    topic
	done     chan struct{} // closed when the stream has ended
	tasks    sync.WaitGroup

	mu       sync.Mutex            // guards what follows
	err      error                 // why the stream has ended
	steps    [wire.Processes]*step // the processes that run, or nil
	transfer *transfer             // the Put or Get under way, or nil
	probing  bool
}

// A tree is where the files of transfers are.
type tree struct {
	root   string // what their paths are below: "/"
	direct bool   // Options.Direct
}

// topic is what the stream is about at the moment.
type topic struct {
	write    sync.Mutex // held for one write
	selected int        // the step that frames from us are about; write guards it
	about    int        // the step that frames from the agent are about; serve alone uses it
}

func newGuest(conn io.ReadWriteCloser, root string, start startFunc) *guest {
	return &guest{
		conn:     conn,
		files:    tree{root: root},
		start:    start,
		children: newChildren(),
		tails:    &tails{},
		done:     make(chan struct{}),
	}
}

// serve reads the stream to its end. Nothing that a frame asks for is waited
// for here, so that a Stop or a Cancel always arrives.
func (g *guest) serve() error {
	g.say(wire.AppendHello(nil))
	r := wire.NewReader(g.conn, wire.FromAgent)
	for {
		t, p, err := r.Next()
		if err == nil {
			err = g.dispatch(t, p)
		}
		if err != nil {
			g.end(err)
			break
		}
	}
	g.children.close()
	g.tails.close()
	g.tasks.Wait()
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err == io.EOF {
		return nil
	}
	return g.err
}

// end closes the stream, and with it everything. The first reason stays.
func (g *guest) end(reason error) {
	g.mu.Lock()
	first := g.err == nil
	if first {
		g.err = reason
		close(g.done)
		if g.transfer != nil {
			g.transfer.stop(errCanceled)
		}
	}
	g.mu.Unlock()
	if !first {
		return
	}
	if err := g.conn.Close(); err != nil {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.err = errors.Join(g.err, fmt.Errorf("stream: %w", err))
	}
}

// tell is say for a frame about a step.
func (g *guest) tell(s *step, frame []byte) {
	g.topic.write.Lock()
	defer g.topic.write.Unlock()
	if g.topic.selected != s.number {
		g.topic.selected = s.number
		g.emit(wire.AppendSelect(nil, s.number))
	}
	g.emit(frame)
}

// say writes whole frames. An error ends the guest.
func (g *guest) say(frames []byte) {
	g.topic.write.Lock()
	defer g.topic.write.Unlock()
	g.emit(frames)
}

// emit is say for who holds the lock.
func (g *guest) emit(frames []byte) {
	if _, err := g.conn.Write(frames); err != nil {
		g.end(fmt.Errorf("stream: %w", err))
	}
}

// dispatch does what a frame asks for. A frame for a process or a transfer that
// has ended crossed the end on its way and is dropped.
func (g *guest) dispatch(t wire.Type, p []byte) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch t {
	case wire.Select:
		n, err := wire.ParseSelect(p)
		if err != nil {
			return fmt.Errorf("%w: select", ErrProtocol)
		}
		g.topic.about = n
	case wire.Start:
		c, err := wire.ParseStart(p)
		if err != nil || g.steps[g.topic.about] != nil || g.err != nil {
			return fmt.Errorf("%w: start", ErrProtocol)
		}
		s := newStep(g.topic.about, c)
		g.steps[g.topic.about] = s
		g.tasks.Go(func() { g.run(s) })
	case wire.Stop:
		n, err := wire.ParseUint32(p)
		if err != nil {
			return fmt.Errorf("%w: stop", ErrProtocol)
		}
		if s := g.steps[g.topic.about]; s != nil {
			s.stopAfter(time.Duration(n) * time.Millisecond)
		}
	case wire.Grant:
		n, err := wire.ParseUint32(p)
		if s := g.steps[g.topic.about]; err != nil || (s != nil && !s.credit.Add(n)) {
			return fmt.Errorf("%w: grant", ErrProtocol)
		}
	case wire.Input, wire.InputEnd, wire.Resize:
		return g.dispatchInput(t, p)
	case wire.Probe:
		wait, attempts, err := wire.ParseProbe(p)
		if err != nil || g.probing || g.err != nil {
			return fmt.Errorf("%w: probe", ErrProtocol)
		}
		g.probing = true
		g.tasks.Go(func() { g.probe(time.Duration(wait)*time.Millisecond, attempts) })
	default:
		return g.dispatchTransfer(t, p)
	}
	return nil
}

// dispatchTransfer is dispatch for Put and Get. The caller holds g.mu.
func (g *guest) dispatchTransfer(t wire.Type, p []byte) error {
	switch t {
	case wire.PutOpen, wire.GetOpen:
		if g.transfer != nil || g.err != nil {
			return fmt.Errorf("%w: second transfer", ErrProtocol)
		}
		x := newTransfer()
		if t == wire.PutOpen {
			dir := string(p)
			g.tasks.Go(func() { g.put(x, dir) })
		} else {
			name, most, err := wire.ParseGet(p)
			if err != nil {
				return fmt.Errorf("%w: get", ErrProtocol)
			}
			g.tasks.Go(func() { g.get(x, name, most) })
		}
		g.transfer = x
		return nil
	}
	x := g.transfer
	if x == nil {
		return nil
	}
	switch t {
	case wire.PutData:
		if !x.inbox.Put(t, p) {
			return fmt.Errorf("%w: more than was granted", ErrProtocol)
		}
	case wire.PutEnd:
		x.stop(io.EOF)
	case wire.Cancel:
		x.stop(errCanceled)
	}
	return nil
}
