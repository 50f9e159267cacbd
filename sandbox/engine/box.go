package engine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/gvisor"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

// A Box is one sandbox that this process made. Put and Get are the client's.
type Box struct {
	*guest.Client
	Name    string
	Process *Process // nil until Enter
	Disk    *kernel.Disk
	Kernel  *Kernel // of its own; nil is that of the machine

	// Layers are directories of the host, the topmost first, which become the
	// lower part of the root instead of the root of the container. Their files
	// belong to the ids of its user namespace.
	Layers []string

	groups groups
	conn   net.Conn // to the guest, until Begin

	mu      sync.Mutex
	sockets sandbox.Sockets // until Attach
	oom     int64           // kills of the kernel already reported
}

var _ sandbox.Sandbox = (*Box)(nil)

// A Standard is what the boxes of a runtime have where a spec says nothing, and what
// their own kernels are made of.
type Standard struct {
	Limits sandbox.Limits
	Image  string
	Runsc  *gvisor.Runsc
}

// Complete is the spec with what the runtime has where it says nothing. It
// refuses what no box of an engine can be.
func Complete(ctx context.Context, s sandbox.Spec, standard Standard) (sandbox.Spec, error) {
	var err error
	if s.Limits, err = kernel.Limits(s.Limits, standard.Limits); err != nil {
		return s, err
	}
	if err := checkKernel(ctx, standard.Runsc, s.Isolation); err != nil {
		return s, err
	}
	s.Image = cmp.Or(s.Image, standard.Image)
	return s, kernel.CheckMounts(s.Mounts)
}

// Enter takes the process with that number of the host, of the container with
// that id, for process 1 of the box. It looks in the kernel whether it is what
// the engine was asked for, and finishes the box from inside its namespaces.
func (b *Box) Enter(ctx context.Context, pid int, id string, s sandbox.Spec) (err error) {
	if b.Process, err = FindProcess(pid, id); err != nil {
		return err
	}
	if b.groups, err = b.Process.groups(); err != nil {
		return err
	}
	if err := errors.Join(b.Process.confined(s.Isolation), b.groups.limited(s.Limits)); err != nil {
		return err
	}
	b.conn, err = b.enter(ctx, s.Mounts)
	return err
}

// Begin gives the guest of an entered box the word that it waits for.
func (b *Box) Begin(ctx context.Context) (err error) {
	conn := b.conn
	b.conn = nil
	if err := b.Kernel.word(conn); err != nil {
		return errors.Join(fmt.Errorf("guest: %w", err), conn.Close())
	}
	b.Client, err = guest.New(ctx, conn, guest.Config{})
	return err
}

// Attach implements sandbox.Sandbox. The network was made before the guest got
// the word to begin, so this only hands the sockets over.
func (b *Box) Attach(context.Context) (sandbox.Sockets, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := b.sockets
	if s.TCP == nil {
		return s, fmt.Errorf("box %s is attached already", b.Name)
	}
	b.sockets = sandbox.Sockets{}
	if b.Process != nil {
		s.Init = b.Process.pid
	}
	return s, nil
}

// Run implements sandbox.Sandbox. Exit.OOM means that the kernel killed a
// process of the box for its memory limit since the last Run. Where that process
// is the box's own kernel the box has died of it.
func (b *Box) Run(ctx context.Context, p sandbox.Process) (sandbox.Exit, error) {
	exit, err := b.Client.Run(ctx, p)
	n, countErr := b.groups.kills()
	if countErr != nil {
		if b.Err() == nil { // the groups end with the box
			err = errors.Join(err, fmt.Errorf("box %s: %w", b.Name, countErr))
		}
		return exit, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	exit.OOM, b.oom = n > b.oom, n
	if exit.OOM && errors.Is(err, sandbox.ErrDied) {
		err = fmt.Errorf("box %s: killed: out of memory: its limit was reached: %w", b.Name, err)
	}
	return exit, err
}

// Kill ends the box at once. It does not wait.
func (b *Box) Kill() error {
	if b.Process == nil {
		return nil
	}
	return b.Process.Kill()
}

// End kills the box, waits until nothing of it runs, and lets go of what the
// agent has of it. It needs no daemon and may be called again after an error.
func (b *Box) End(ctx context.Context) error {
	if err := b.Kill(); err != nil {
		return err
	}
	var all error
	if b.Process != nil {
		if err := b.Process.wait(ctx); err != nil {
			return err
		}
		all = b.Process.Close()
		b.Process = nil
	}
	if b.conn != nil {
		all = errors.Join(all, b.conn.Close())
		b.conn = nil
	}
	if b.Client != nil {
		all = errors.Join(all, b.Close())
	}
	all = errors.Join(all, b.Kernel.Close())
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, f := range []*os.File{b.sockets.TCP, b.sockets.DNS, b.sockets.Log} {
		if f != nil {
			all = errors.Join(all, f.Close())
		}
	}
	b.sockets = sandbox.Sockets{}
	if b.Disk != nil && b.Disk.Root != nil {
		all = errors.Join(all, b.Disk.Discard())
		b.Disk.Root = nil
	}
	return all
}
