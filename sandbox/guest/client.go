// Package guest is the agent's side of a box: it drives the guest, process 1 of
// the box, over one stream (see wire for the protocol and serve for the other
// end) and carries the guest program for runtimes to put into the box.
//
// A runtime embeds a [*Client] in its box and adds Attach to get a
// sandbox.Sandbox.
//
// Everything that comes out of a box is hostile input. A guest that breaks the
// protocol, sends more than it may, or neither reads nor answers is dead to the
// agent: the stream is closed, all calls return sandbox.ErrDied, and nothing
// but that box is concerned.
package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

var (
	// ErrBusy reports a Run while another process of the same box runs, or one
	// beside it while there is one. Waiting would hide a mistake of the caller.
	ErrBusy = errors.New("a process of this box is running")

	// ErrRefused reports a transfer that the contract forbids: an entry that
	// would leave its directory, a file that is no regular file or too large.
	ErrRefused = errors.New("refused")

	// errClosed is the end of a guest whose agent closed it.
	errClosed = errors.New("closed by the agent")
)

const (
	// DefaultGrace is the time between interrupt, terminate and kill. GitHub's
	// runner gives 7.5 s and 2.5 s; ten in all, as there.
	DefaultGrace = 5 * time.Second

	// DefaultPatience is how long a guest may take to read a frame of at most
	// a few megabytes, or to answer when it has been told to stop. The guest
	// always reads, so only a box that is starved or hostile comes near it.
	DefaultPatience = 10 * time.Second

	// maxGrace keeps a mistaken unit from making a box that cannot be stopped.
	maxGrace = 10 * time.Minute
)

// A Config says how patient a Client is. The zero value is the default.
type Config struct {
	Grace    time.Duration // between interrupt, terminate and kill; 0 is DefaultGrace
	Patience time.Duration // how long the guest may keep the agent waiting; 0 is DefaultPatience
}

func (c Config) validate() (Config, error) {
	if c.Grace == 0 {
		c.Grace = DefaultGrace
	}
	if c.Patience == 0 {
		c.Patience = DefaultPatience
	}
	if c.Grace < 0 || c.Grace > maxGrace || c.Patience < 0 {
		return c, fmt.Errorf("guest config: grace %v (0 to %v) or patience %v out of range", c.Grace, maxGrace, c.Patience)
	}
	return c, nil
}

// A Client drives one guest. Its methods may be called by several goroutines:
// one Run, one beside it and one Probe at a time, and beside them Put and Get,
// which wait for each other.
type Client struct {
	conn     io.ReadWriteCloser
	reader   *wire.Reader
	grace    time.Duration
	wait     time.Duration
	write    sync.Mutex    // held for the time of one write; guards selected
	selected int           // the process that frames from us are about
	about    int           // the process that frames from the guest are about; of the reading goroutine
	lane     chan struct{} // holds a token while a transfer is under way
	done     chan struct{} // closed when the guest is dead
	ended    chan struct{} // closed when the reading goroutine has returned

	mu        sync.Mutex               // guards what follows
	err       error                    // why the guest is dead
	processes [wire.Processes]*process // what Run is following, or nil
	transfer  *transfer                // what Put or Get is waiting for, or nil
	probed    chan []wire.Outcome      // what Probe is waiting for, or nil
}

// New waits for the hello of the guest at the other end of conn and returns its
// client, which owns conn. If it fails, or ctx ends first, conn is closed.
//
// Closing conn must end a Read and a Write that are under way, as it does for
// sockets, pipes and net.Pipe: it is the only way to be rid of a stuck guest.
func New(ctx context.Context, conn io.ReadWriteCloser, cfg Config) (*Client, error) {
	cfg, err := cfg.validate()
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	c := &Client{
		conn:   conn,
		reader: wire.NewReader(conn, wire.FromGuest),
		grace:  cfg.Grace,
		wait:   cfg.Patience,
		lane:   make(chan struct{}, 1),
		done:   make(chan struct{}),
		ended:  make(chan struct{}),
	}
	stop := context.AfterFunc(ctx, func() { c.kill(context.Cause(ctx)) })
	err = c.hello()
	if !stop() {
		err = context.Cause(ctx)
	}
	if err != nil {
		c.kill(err)
		return nil, c.Err()
	}
	go c.read()
	return c, nil
}

// hello reads the first frame.
func (c *Client) hello() error {
	t, p, err := c.reader.Next()
	if err != nil {
		return fmt.Errorf("hello: %w", err)
	}
	if t != wire.Hello {
		return fmt.Errorf("hello: %w: type %d", wire.ErrFrame, t)
	}
	version, err := wire.ParseHello(p)
	if err != nil {
		return fmt.Errorf("hello: %w", err)
	}
	if version != wire.Version {
		return fmt.Errorf("hello: guest speaks version %d, this agent %d: run `make build` so that both come from one build", version, wire.Version)
	}
	return nil
}

// Done is closed when the guest is dead, by its own doing or by Close.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err returns nil while the guest lives, and then why it died: an error that is
// sandbox.ErrDied.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Close closes the stream, which ends the box, and waits until nothing of the
// client runs any more. Calls that are under way return sandbox.ErrDied. The
// error is that of closing the stream; a second Close has none.
func (c *Client) Close() error {
	err := c.die(errClosed)
	<-c.ended
	return err
}

// die declares the guest dead and closes the stream. The first reason stays.
func (c *Client) die(reason error) error {
	c.mu.Lock()
	first := c.err == nil
	if first {
		c.err = fmt.Errorf("%w: %w", sandbox.ErrDied, reason)
		close(c.done)
	}
	c.mu.Unlock()
	if !first {
		return nil
	}
	return c.conn.Close()
}

// kill is die for a guest that has failed us: why is what matters then, and
// nobody is left to tell that its stream did not close well.
func (c *Client) kill(reason error) {
	_ = c.die(reason)
}

// read takes frames from the guest until it is dead. It never waits for
// anything but the stream.
func (c *Client) read() {
	defer close(c.ended)
	for {
		t, p, err := c.reader.Next()
		if err == io.EOF {
			err = errors.New("the guest closed the stream")
		}
		if err == nil {
			err = c.dispatch(t, p)
		}
		if err != nil {
			c.kill(err)
			return
		}
	}
}

// dispatch hands a frame to the call that it belongs to. A frame that belongs
// to none is an error.
func (c *Client) dispatch(t wire.Type, p []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch t {
	case wire.Select:
		n, err := wire.ParseSelect(p)
		c.about = n
		return err
	case wire.Stdout, wire.Stderr, wire.Exit, wire.InputGrant:
		r := c.processes[c.about]
		if r == nil {
			return fmt.Errorf("%w: type %d, but no process runs", wire.ErrFrame, t)
		}
		return r.receive(t, p)
	case wire.Grant, wire.FileData, wire.Result:
		if c.transfer == nil {
			return fmt.Errorf("%w: type %d, but no transfer is under way", wire.ErrFrame, t)
		}
		return c.transfer.receive(t, p)
	case wire.Probed:
		return c.receiveProbed(p)
	default:
		return fmt.Errorf("%w: second hello", wire.ErrFrame)
	}
}

// sendTo is send for frames about a process.
func (c *Client) sendTo(process int, frames []byte) error {
	c.write.Lock()
	defer c.write.Unlock()
	if c.selected != process {
		if err := c.emit(wire.AppendSelect(nil, process)); err != nil {
			return err
		}
		c.selected = process
	}
	return c.emit(frames)
}

// send writes whole frames. A guest that does not read them in time is dead.
func (c *Client) send(frames []byte) error {
	c.write.Lock()
	defer c.write.Unlock()
	return c.emit(frames)
}

// emit is send for who holds the lock.
func (c *Client) emit(frames []byte) error {
	guard := time.AfterFunc(c.wait, func() {
		c.kill(fmt.Errorf("the guest has not read for %v", c.wait))
	})
	_, err := c.conn.Write(frames)
	guard.Stop()
	if err != nil {
		c.kill(fmt.Errorf("write: %w", err))
		return c.Err()
	}
	return nil
}

// isClosed reports whether a channel that carries nothing is closed.
func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
