package boxinit

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Under gVisor the program that was started stays process 1 of the namespaces,
// as a keeper: what would be the root of the box becomes a directory of a small
// root that only runsc sees, and the guest is process 1 of a kernel that runsc
// runs there. So the box has both walls. Whoever gets out of that kernel is in
// namespaces, control groups and user ids that hold nothing else.

const (
	// yard is where the keeper's root is built: an empty directory of the disk.
	yard = stage + "/empty"
	// yardBytes bounds what runsc writes beside the box: its state, some KiB.
	yardBytes = "16m"
)

// Keeper's descriptors when runsc starts: it hands the stream to the guest, and
// executes the guest from a descriptor.
const (
	passFD = 3
	execFD = 4
)

// tmpMark keeps runsc from covering an empty /tmp with memory: what is written
// there belongs on the disk, whose size is limited.
const tmpMark = "/tmp/.mayfly"

// privileges are what runsc needs beyond those of the box, over the box's user
// namespace: to make the namespaces and mounts that it puts its kernel into, and
// to give up the rest.
const privileges = kept | 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_SYS_CHROOT | 1<<unix.CAP_SYS_PTRACE |
	1<<unix.CAP_SETPCAP | 1<<unix.CAP_DAC_READ_SEARCH

// outside makes the root that runsc sees, with the box's at /rootfs.
func (b *builder) outside() error {
	if err := mount("yard", yard, "tmpfs", plain, "mode=755,nr_inodes=1024,size="+yardBytes); err != nil {
		return err
	}
	for _, dir := range []string{"proc", "dev", "tmp", "rootfs", "state", "bundle"} {
		if err := os.Mkdir(yard+"/"+dir, 0o755); err != nil {
			return fmt.Errorf("yard: %w", err)
		}
	}
	if err := mount("proc", yard+"/proc", "proc", data, ""); err != nil {
		return err
	}
	for _, name := range []string{"null", "zero", "urandom"} {
		p := yard + "/dev/" + name
		if err := os.WriteFile(p, nil, 0o666); err != nil {
			return fmt.Errorf("yard: %w", err)
		}
		if err := mount("/dev/"+name, p, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	if err := os.WriteFile(yard+"/bundle/config.json", b.Bundle, 0o600); err != nil {
		return fmt.Errorf("yard: %w", err)
	}
	return mount(newRoot, yard+"/rootfs", "", unix.MS_MOVE, "")
}

// inside takes steps while the root of the box is the root, so that links of its
// files lead to places in it.
func inside(steps ...func() error) error {
	yard, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("yard: %w", err)
	}
	err = errors.Join(unix.Chroot("/rootfs"), unix.Chdir("/"))
	for _, step := range steps {
		if err == nil {
			err = step()
		}
	}
	return errors.Join(err, unix.Fchdir(yard), unix.Chroot("."), unix.Close(yard))
}

// markTmp makes the file that the guest removes. A root without a /tmp gets
// runsc's.
func markTmp() error {
	err := os.WriteFile(tmpMark, nil, 0o600)
	if err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	return fmt.Errorf("temporary directory of the box: %w", err)
}

// keep starts the box's kernel and returns when the box is over: when the kernel
// has ended, the agent is gone, or the time is up. Then the keeper exits, and
// all else that is in the namespaces is killed with it.
func keep(s *Setup) error {
	over := make(chan error, 3)
	if s.Expires != 0 {
		time.AfterFunc(time.Until(time.Unix(int64(s.Expires), 0)), func() { over <- nil })
	}
	go func() {
		_, _ = unix.Read(SetupFD, make([]byte, 1)) // the agent says no more: this is its end
		over <- nil
	}()
	if err := runsc(s); err != nil {
		return err
	}
	go func() { over <- reap() }()
	return <-over
}

// runsc starts the kernel. It runs below the keeper, detached from the runsc
// that made it.
func runsc(s *Setup) error {
	// When memory runs out the host takes it before the agent, as it takes what
	// any other guest starts (proc_pid_oom_score_adj(5)).
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0); err != nil {
		return fmt.Errorf("keeper: %w", err)
	}
	guest, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", GuestFD), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("guest program: %w", err) // only what cannot be written is mapped
	}
	_, err = syscall.ForkExec(fmt.Sprintf("/proc/self/fd/%d", RunscFD), []string{
		"runsc", "--root=/state", "--platform=" + s.Platform, "--network=host", "--ignore-cgroups",
		"--overlay2=none", "--host-uds=none", "--host-fifo=none", "--net-raw=false",
		"run", "--detach", "--bundle=/bundle", fmt.Sprintf("--pass-fd=%d:%d", passFD, ControlFD), fmt.Sprintf("--exec-fd=%d", execFD),
		Host,
	}, &syscall.ProcAttr{
		Dir: "/", Env: []string{"PATH=/"},
		Files: []uintptr{0, 1, 2, passFD: ControlFD, execFD: uintptr(guest)},
	})
	err = errors.Join(err, unix.Close(guest), unix.Close(ControlFD), unix.Close(GuestFD), unix.Close(RunscFD))
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

// Enter is what the guest does in a kernel of its own before it serves: there it
// gives up what a step must not have, beyond what runsc left. The filter comes
// in the environment, which nobody but the guest reads.
func Enter() error {
	unix.Umask(0o022)
	if err := unix.Unlink(tmpMark); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("temporary directory: %w", err)
	}
	program, err := hex.DecodeString(os.Getenv(FilterVariable))
	if err != nil {
		return fmt.Errorf("system call filter: %w", err)
	}
	os.Clearenv()
	return filter(program, unix.SECCOMP_FILTER_FLAG_TSYNC)
}

// FilterVariable is where Enter finds struct sock_filter array, as hexadecimal
// digits.
const FilterVariable = "MAYFLY_FILTER"
