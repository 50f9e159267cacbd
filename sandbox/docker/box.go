package docker

import (
	"context"
	"errors"
	"fmt"
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
	process *process // nil until the container has started
	groups  groups
	disk    *kernel.Disk

	mu      sync.Mutex
	sockets sandbox.Sockets // until Attach
	oom     int64           // kills of the kernel already reported
}

var _ sandbox.Sandbox = (*box)(nil)

// Attach implements sandbox.Sandbox. The network was made before the guest got
// the word to begin, so this only hands the sockets over.
func (b *box) Attach(context.Context) (sandbox.Sockets, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.sockets
	if s.TCP == nil {
		return s, fmt.Errorf("docker: box %s is attached already", b.name)
	}
	b.sockets = sandbox.Sockets{}
	return s, nil
}

// Run implements sandbox.Sandbox. Exit.OOM means that the kernel killed a
// process of the box for its memory limit since the last Run.
func (b *box) Run(ctx context.Context, p sandbox.Process) (sandbox.Exit, error) {
	exit, err := b.Client.Run(ctx, p)
	n, countErr := b.groups.kills()
	if countErr != nil {
		if b.Err() == nil { // the groups end with the box
			err = errors.Join(err, fmt.Errorf("docker: box %s: %w", b.name, countErr))
		}
		return exit, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	exit.OOM, b.oom = n > b.oom, n
	return exit, err
}

// kill ends the box at once. It does not wait.
func (b *box) kill() error {
	if b.process == nil {
		return nil
	}
	return b.process.kill()
}

// end kills the box, waits until nothing of it runs, and lets go of what the
// agent has of it. It needs no daemon and may be called again after an error.
func (b *box) end(ctx context.Context) error {
	if err := b.kill(); err != nil {
		return err
	}
	var all error
	if b.process != nil {
		if err := b.process.wait(ctx); err != nil {
			return err
		}
		all = b.process.close()
		b.process = nil
	}
	if b.Client != nil {
		all = errors.Join(all, b.Close())
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, f := range []*os.File{b.sockets.TCP, b.sockets.DNS, b.sockets.Log} {
		if f != nil {
			all = errors.Join(all, f.Close())
		}
	}
	b.sockets = sandbox.Sockets{}
	if b.disk != nil && b.disk.Root != nil {
		all = errors.Join(all, b.disk.Discard())
		b.disk.Root = nil
	}
	return all
}
