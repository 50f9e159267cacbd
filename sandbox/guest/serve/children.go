package serve

import (
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// children waits for the processes that end. Process 1 inherits every orphan of
// the box and reaps all of them; any other process (a test) leaves alone what
// the guest did not start.
type children struct {
	init bool // we are process 1

	// mu is held while a process is started or reaped, so that no process is
	// reaped before it is known what it is, and for the time of a kill, so
	// that process ids keep their meaning.
	mu     sync.Mutex
	change *sync.Cond
	some   bool // there may be a child to wait for
	closed bool
	pid    int // of the step, 0 if none or reaped
	exited chan unix.WaitStatus
}

func newChildren() *children {
	c := &children{init: os.Getpid() == 1}
	c.change = sync.NewCond(&c.mu)
	go c.reap()
	return c
}

// begin starts a step. Its status arrives in the channel.
func (c *children) begin(start func() (pid int, err error)) (pid int, exited <-chan unix.WaitStatus, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	pid, err = start()
	if err != nil {
		return 0, nil, err
	}
	c.pid, c.exited, c.some = pid, make(chan unix.WaitStatus, 1), true
	c.change.Signal()
	return pid, c.exited, nil
}

// close lets reap return when the last child has ended. It does not wait for
// that: process 1 exits and takes its children with it.
func (c *children) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	c.change.Signal()
}

// reap waits for children until close. It sleeps in waitid without reaping, and
// takes the lock before it does.
func (c *children) reap() {
	for {
		c.mu.Lock()
		for !c.some && !c.closed {
			c.change.Wait()
		}
		kind, id, finished := unix.P_ALL, 0, !c.some
		if !c.init {
			kind, id = unix.P_PID, c.pid
		}
		c.mu.Unlock()
		if finished {
			return
		}
		err := unix.Waitid(kind, id, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		c.collect()
	}
}

// collect reaps every child that has ended.
func (c *children) collect() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		which := -1
		if !c.init {
			which = c.pid
		}
		if which == 0 {
			c.some = false
			return
		}
		var status unix.WaitStatus
		pid, err := unix.Wait4(which, &status, unix.WNOHANG, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			c.some = false // ECHILD
			return
		case pid == 0:
			return
		case pid == c.pid:
			c.pid = 0
			c.exited <- status
		}
	}
}
