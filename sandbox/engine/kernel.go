package engine

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/gvisor"
	"github.com/mayfly-ci/mayfly/sandbox/gvisor/keeper"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

// A box with a kernel of its own is a container as any other, whose process 1 is a
// keeper in place of the guest (docs/adr/0016). It may make namespaces and mounts
// in its user namespace, as runsc has to, and is under no filter of system calls,
// which runsc brings. What the agent makes the root of the container then is the
// keeper's yard, with the root of the box in it.

// A Kernel is what such a box needs from the agent.
type Kernel struct {
	platform  string
	runsc     *os.File // the program, until the box has begun
	complaint *os.File // what it said
	life      *os.File // whose end is the box's
	theirs    *os.File // the other end of it, until the box has begun
	bundle    []byte
}

// checkKernel refuses a wall that boxes cannot have here.
func checkKernel(ctx context.Context, runsc *gvisor.Runsc, wall sandbox.Isolation) error {
	switch wall {
	case sandbox.Kernel:
		return nil
	case sandbox.GVisor:
		f, _, err := runsc.Open(ctx)
		if err != nil {
			return err
		}
		return f.Close()
	}
	return fmt.Errorf("isolation %q: this runtime has %q: %w", wall, sandbox.GVisor, sandbox.ErrUnsupported)
}

// OpenKernel is what the wall of a completed spec needs: nil if that is the kernel
// of the machine.
func OpenKernel(ctx context.Context, runsc *gvisor.Runsc, s sandbox.Spec) (k *Kernel, err error) {
	if s.Isolation == sandbox.Kernel {
		return nil, nil
	}
	filter, err := kernel.Filter(runtime.GOARCH)
	if err != nil {
		return nil, err
	}
	k = &Kernel{platform: runsc.Platform()}
	if k.runsc, _, err = runsc.Open(ctx); err != nil {
		return nil, err
	}
	about := gvisor.Box{Host: Host, Filter: filter, RunBytes: runBytes, ShmBytes: ShmBytes, Files: MaxFiles}
	if !s.Expires.IsZero() {
		about.Expires = uint64(max(s.Expires.Unix(), 1))
	}
	ends := [2]int{-1, -1}
	k.complaint, err = gvisor.NewComplaint()
	if err == nil {
		k.bundle, err = about.Bundle()
	}
	if err == nil {
		ends, err = unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	}
	k.life, k.theirs = file(ends[0], "life"), file(ends[1], "life")
	if err != nil {
		return nil, errors.Join(fmt.Errorf("kernel of the box: %w", err), k.Close())
	}
	return k, nil
}

// Close lets go of it, and so ends the box. It may be called again, and of nil.
func (k *Kernel) Close() error {
	if k == nil {
		return nil
	}
	var all error
	for _, f := range []**os.File{&k.runsc, &k.complaint, &k.life, &k.theirs} {
		if *f != nil {
			all = errors.Join(all, (*f).Close())
			*f = nil
		}
	}
	return all
}

// said is why there is no box.
func (k *Kernel) said() error {
	if k == nil {
		return nil
	}
	return gvisor.Said(k.complaint)
}

// word tells the process that waits at conn that its box is finished.
func (k *Kernel) word(conn net.Conn) error {
	if k == nil {
		_, err := conn.Write([]byte{0})
		return err
	}
	rights := unix.UnixRights(int(k.runsc.Fd()), int(k.theirs.Fd()), int(k.complaint.Fd()))
	_, _, err := conn.(*net.UnixConn).WriteMsgUnix([]byte(k.platform), rights, nil)
	err = errors.Join(err, k.runsc.Close(), k.theirs.Close())
	k.runsc, k.theirs = nil, nil
	return err
}

// yard makes the keeper's root, with what is the root now in it.
func (b *builder) yard(bundle []byte) error {
	if err := keeper.MarkTmp(b.uid, b.gid); err != nil {
		return err
	}
	const yard = sandbox.Run
	if err := attach("yard", yard, "tmpfs", fmt.Sprintf("%s,uid=%d,gid=%d", keeper.YardOptions, b.uid, b.gid)); err != nil {
		return err
	}
	if err := keeper.Yard(yard, bundle, b.uid, b.gid); err != nil {
		return err
	}
	for _, p := range []string{"/proc", "/dev"} {
		if err := move(unix.AT_FDCWD, p, yard+p); err != nil {
			return err
		}
	}
	if err := unix.Unmount("/sys", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount /sys: %w", err)
	}
	if err := unix.Chdir(yard); err != nil {
		return fmt.Errorf("yard: %w", err)
	}
	if err := unix.PivotRoot(".", "."+keeper.Root); err != nil {
		return fmt.Errorf("yard: pivot_root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("yard: %w", err)
	}
	return nil
}

// Fail ends a box that could not be made, and adds to the error what its own kernel
// said.
func (b *Box) Fail(err error) error { return errors.Join(err, b.Kernel.said(), b.Kill()) }
