// Package keeper is what of gVisor runs in a box. Where a box has a kernel of its
// own, process 1 of the namespaces is no guest but a keeper: what would be the root
// of the box is a directory of a small root that only runsc sees, the yard, and the
// guest is process 1 of a kernel that runsc runs there. So the box has both walls:
// whoever gets out of that kernel is in namespaces, control groups and user ids that
// hold nothing else (docs/adr/0016).
//
// It is linked into the guest program. Runtimes that make the yard from outside use
// its names.
package keeper

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// Root is where the yard has the root of the box.
	Root = "/rootfs"
	// YardOptions are those of the yard's tmpfs. They bound what runsc writes beside
	// the box: its state, some KiB.
	YardOptions = "mode=755,nr_inodes=1024,size=16m"
	// Privileges are what runsc needs beyond those of the box, over the box's user
	// namespace, as bits (linux/capability.h): to make the namespaces and mounts that
	// it puts its kernel into, and to give up the rest.
	Privileges = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_SYS_CHROOT | 1<<unix.CAP_SYS_PTRACE |
		1<<unix.CAP_SETPCAP | 1<<unix.CAP_DAC_READ_SEARCH

	// tmpMark keeps runsc from covering an empty /tmp with memory: what is written
	// there belongs on the disk, whose size is limited.
	tmpMark = "/tmp/.mayfly"
)

// Descriptors of runsc: it hands the stream to the guest, as its descriptor 3, and
// executes the guest from one.
const (
	passFD    = 3
	execFD    = 4
	controlFD = 3
)

// Yard makes in dir, where the yard's file system is mounted, what runsc needs. It
// belongs to root of the box, who has those ids here. proc, devices and Root are
// mounted by the caller.
func Yard(dir string, bundle []byte, uid, gid int) error {
	for _, name := range []string{"proc", "dev", "tmp", Root, "state", "bundle"} {
		p := filepath.Join(dir, name)
		if err := errors.Join(os.Mkdir(p, 0o755), os.Chown(p, uid, gid)); err != nil {
			return fmt.Errorf("yard: %w", err)
		}
	}
	file := filepath.Join(dir, "bundle", "config.json")
	if err := errors.Join(os.WriteFile(file, bundle, 0o600), os.Chown(file, uid, gid)); err != nil {
		return fmt.Errorf("yard: %w", err)
	}
	return nil
}

// MarkTmp makes the file that the guest removes (Enter), for root of the box. The
// root is that of the box. One without a /tmp gets runsc's.
func MarkTmp(uid, gid int) error {
	err := os.WriteFile(tmpMark, nil, 0o600)
	if err == nil {
		err = os.Chown(tmpMark, uid, gid)
	}
	if err == nil || absent(err) {
		return nil
	}
	return fmt.Errorf("temporary directory of the box: %w", err)
}

func absent(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) }

// A Kernel is what a keeper starts, by descriptors of its own, and waits for. The
// yard is its root.
type Kernel struct {
	Control int // the stream to the guest
	Life    int // a socket at whose other end the agent says nothing; its end is the box's
	Guest   int // the guest program
	Runsc   int // gVisor's program

	Platform string // how runsc catches system calls
	Host     string // name of the box
	Expires  uint64 // Unix seconds; 0 is never
	// Linger is how long the keeper waits for the end of Life when the kernel has
	// ended: while it is there, so are the control groups that say why.
	Linger time.Duration
}

// Keep starts the box's kernel and returns when the box is over: when the kernel
// has ended, the agent is gone, or the time is up. Then the keeper exits, and
// all else that is in the namespaces is killed with it.
func (k Kernel) Keep() error {
	over, ended := make(chan error, 2), make(chan error, 1)
	if k.Expires != 0 {
		time.AfterFunc(time.Until(time.Unix(int64(k.Expires), 0)), func() { over <- nil })
	}
	go func() {
		_, _ = unix.Read(k.Life, make([]byte, 1)) // the agent says no more: this is its end
		over <- nil
	}()
	if err := k.start(); err != nil {
		return err
	}
	go func() { ended <- reap() }()
	select {
	case err := <-over:
		return err
	case err := <-ended:
		select {
		case <-over:
		case <-time.After(k.Linger):
		}
		return err
	}
}

// start starts the kernel. It runs below the keeper, detached from the runsc that
// made it. If it cannot be started, the descriptors stay, so that nobody sees their
// end before the reason is told.
func (k Kernel) start() error {
	// When memory runs out the host takes it before the agent, as it takes what
	// any other guest starts (proc_pid_oom_score_adj(5)).
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0); err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	guest, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", k.Guest), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("guest program: %w", err) // only what cannot be written is mapped
	}
	_, err = syscall.ForkExec(fmt.Sprintf("/proc/self/fd/%d", k.Runsc), []string{
		"runsc", "--root=/state", "--platform=" + k.Platform, "--network=host", "--ignore-cgroups",
		"--overlay2=none", "--host-uds=none", "--host-fifo=none", "--net-raw=false",
		"run", "--detach", "--bundle=/bundle", fmt.Sprintf("--pass-fd=%d:%d", passFD, controlFD), fmt.Sprintf("--exec-fd=%d", execFD),
		k.Host,
	}, &syscall.ProcAttr{
		Dir: "/", Env: []string{"PATH=/"},
		Files: []uintptr{0, 1, 2, passFD: uintptr(k.Control), execFD: uintptr(guest)},
	})
	if err == nil {
		err = errors.Join(unix.Close(guest), unix.Close(k.Control), unix.Close(k.Guest), unix.Close(k.Runsc))
	}
	if err != nil {
		return fmt.Errorf("start runsc: %w", err)
	}
	return nil
}

// reap waits until no process is left. One of them that fails is the runsc that
// starts the kernel: the others are not ours to judge.
func reap() error {
	for {
		var status unix.WaitStatus
		_, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ECHILD):
			return nil
		case err != nil:
			return fmt.Errorf("wait for runsc: %w", err)
		}
	}
}
