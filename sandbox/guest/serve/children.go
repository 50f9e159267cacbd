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
	mu      sync.Mutex
	change  *sync.Cond
	some    bool // there may be a child to wait for
	closed  bool
	running map[int]chan unix.WaitStatus // steps that are not reaped, by their pid
}

func newChildren() *children {
	c := &children{init: os.Getpid() == 1, running: make(map[int]chan unix.WaitStatus)}
	c.change = sync.NewCond(&c.mu)
	if c.init {
		go c.reap()
	}
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
	status := make(chan unix.WaitStatus, 1)
	c.running[pid], c.some = status, true
	if c.init {
		c.change.Signal()
	} else {
		go c.reapOne(pid)
	}
	return pid, status, nil
}

// runs reports whether the process is a step's that has not been reaped. The
// caller holds mu.
func (c *children) runs(pid int) bool { return c.running[pid] != nil }

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
		finished := !c.some
		c.mu.Unlock()
		if finished {
			return
		}
		if wait(unix.P_ALL, 0) {
			c.collect(-1)
		}
	}
}

// reapOne is reap for one child of a process that has others.
func (c *children) reapOne(pid int) {
	for !wait(unix.P_PID, pid) {
	}
	c.collect(pid)
}

// wait sleeps until a child has ended. It reports false if it was woken early.
func wait(kind, id int) bool {
	return !errors.Is(unix.Waitid(kind, id, nil, unix.WEXITED|unix.WNOWAIT, nil), unix.EINTR)
}

// collect reaps every child that has ended, or the one.
func (c *children) collect(which int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(which, &status, unix.WNOHANG, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			c.some = false // ECHILD
			return
		case pid == 0:
			return
		case c.running[pid] != nil:
			c.running[pid] <- status
			delete(c.running, pid)
		}
	}
}
