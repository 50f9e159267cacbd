package native

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

// A box is one sandbox that this process made. Put and Get are the client's.
type box struct {
	*guest.Client
	name    string
	groups  hierarchy
	process *os.Process
	dead    chan struct{} // closed when process 1 has been reaped, and everything of the box with it
	disk    *kernel.Disk
	first   uint32 // who root of the box is outside of it

	// With a kernel of its own.
	runsc     *os.File // the program, until the box is made
	complaint *os.File // what it said
	keeper    io.Closer

	mu      sync.Mutex
	sockets sandbox.Sockets // until Attach
	oom     int64           // kills of the kernel already reported
}

var _ sandbox.Sandbox = (*box)(nil)

// reap waits for process 1. The kernel lets it go after every other process of
// its pid namespace, so nothing runs in the box once dead is closed.
func (b *box) reap() {
	_, _ = b.process.Wait() // the guest's status says nothing that the stream does not
	close(b.dead)
}

// Attach implements sandbox.Sandbox. The guest made the network before it gave
// up the right to, so this only hands the sockets over.
func (b *box) Attach(context.Context) (sandbox.Sockets, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.sockets
	if s.TCP == nil {
		return s, fmt.Errorf("native: box %s is attached already", b.name)
	}
	b.sockets = sandbox.Sockets{}
	if b.keeper == nil && b.process != nil { // a kernel of the box's own has the sockets of all its processes
		s.Init = b.process.Pid
	}
	return s, nil
}

// Run implements sandbox.Sandbox. Exit.OOM means that the kernel killed a
// process of the box for its memory limit since the last Run. Where that process
// is the box's own kernel (gVisor) the box has died of it.
func (b *box) Run(ctx context.Context, p sandbox.Process) (sandbox.Exit, error) {
	exit, err := b.Client.Run(ctx, p)
	if b.groups == nil {
		return exit, err
	}
	n, countErr := b.groups.kills(b.name)
	if countErr != nil {
		return exit, errors.Join(err, fmt.Errorf("native: box %s: %w", b.name, countErr))
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	exit.OOM, b.oom = n > b.oom, n
	if exit.OOM && errors.Is(err, sandbox.ErrDied) {
		err = fmt.Errorf("native: box %s: killed: out of memory: its limit was reached: %w", b.name, err)
	}
	return exit, err
}

// withDisk puts the disk of the box, if it has one, before its layers.
func (b *box) withDisk(layers []int) []int {
	if b.disk == nil {
		return layers
	}
	return append([]int{b.disk.Mount}, layers...)
}

// kill ends the box at once. It does not wait.
func (b *box) kill() error {
	if b.process == nil {
		return nil
	}
	if err := b.process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill: %w", err)
	}
	return nil
}

// end kills the box, waits until it is gone, and lets go of what the agent has
// of it. It may be called again after an error.
func (b *box) end(ctx context.Context) error {
	if err := b.kill(); err != nil {
		return err
	}
	if b.process != nil {
		select {
		case <-b.dead:
		case <-ctx.Done():
			return fmt.Errorf("wait for the end of process 1: %w", context.Cause(ctx))
		}
	}
	var all error
	if b.Client != nil {
		all = b.Close()
	}
	if b.keeper != nil {
		all = errors.Join(all, b.keeper.Close(), b.complaint.Close())
		b.keeper = nil
	}
	s, err := b.Attach(ctx)
	if err == nil {
		all = errors.Join(all, closeAll([]*os.File{s.TCP, s.DNS, s.Log}))
	}
	if b.disk != nil && b.disk.Root != nil {
		all = errors.Join(all, b.disk.Discard())
		b.disk.Root = nil
	}
	return all
}
