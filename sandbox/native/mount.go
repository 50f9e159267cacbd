package native

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
	"github.com/mayfly-ci/mayfly/sandbox/mountpoint"
)

var _ sandbox.Mounter = (*box)(nil)

// Mount implements sandbox.Mounter, from outside: the guest gave up the right to
// mount, and idles. A box with a kernel of its own does not see what is mounted
// after that has started, and without root nobody may enter a box.
func (b *box) Mount(_ context.Context, mounts []sandbox.Mount) error {
	if b.keeper != nil || b.disk == nil {
		return fmt.Errorf("native: box %s: mounts in a box that is there: %w", b.name, sandbox.ErrUnsupported)
	}
	if len(mounts) == 0 {
		return nil
	}
	err := kernel.CheckMounts(mounts)
	if err == nil {
		err = b.mount(mounts)
	}
	if err != nil {
		return fmt.Errorf("native: box %s: %w", b.name, err)
	}
	return nil
}

func (b *box) mount(mounts []sandbox.Mount) error {
	// Process 1 is our child, and not waited for while it lives: its number is
	// no other's.
	process, err := unix.PidfdOpen(b.process.Pid, 0)
	if err != nil {
		return fmt.Errorf("process 1: %w", err)
	}
	defer unix.Close(process)
	ns, err := os.Open("/proc/" + strconv.Itoa(b.process.Pid) + "/ns/user")
	if err != nil {
		return fmt.Errorf("user namespace: %w", err)
	}
	defer ns.Close() // the mounts have their own
	trees, err := kernel.OpenMounts(mounts, ns)
	defer func() {
		for _, fd := range trees {
			_ = unix.Close(fd) // the box has it, or nobody
		}
	}()
	if err != nil {
		return err
	}
	return kernel.In(process, unix.CLONE_NEWNS, func() error {
		root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("root of the box: %w", err)
		}
		// What is made on the way is made by root of the box: ours has no id in it.
		if err := asOwner(b.first); err != nil {
			return errors.Join(err, unix.Close(root))
		}
		for i, m := range mounts {
			err = errors.Join(err, mountpoint.Attach(trees[i], root, m.Target, int(b.first), int(b.first)))
		}
		return errors.Join(err, unix.Close(root))
	})
}

// asOwner has this thread make files as that user and group (setfsuid(2)).
func asOwner(id uint32) error {
	return errors.Join(unix.Setfsgid(int(id)), unix.Setfsuid(int(id)))
}
