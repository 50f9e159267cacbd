package boxinit

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/gvisor/keeper"
)

// kept are the capabilities of a box, over its own user namespace only: what
// tar, install, su and a package's scripts need as root.
const kept = 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FOWNER | 1<<unix.CAP_FSETID |
	1<<unix.CAP_SETUID | 1<<unix.CAP_SETGID | 1<<unix.CAP_KILL | 1<<unix.CAP_NET_BIND_SERVICE

// confine gives up what no step may have, for the calling thread and what it
// executes. It cannot be undone.
func confine(s *Setup) error {
	if err := unix.Sethostname([]byte(Host)); err != nil {
		return fmt.Errorf("host name: %w", err)
	}
	unix.Umask(0o022)
	if err := limits(s); err != nil {
		return err
	}
	if s.GVisor() { // runsc takes the rest from its kernel, and the guest from itself
		return errors.Join(capabilities(kept|keeper.Privileges), keeper.NoNewPrivileges())
	}
	if err := capabilities(kept); err != nil {
		return err
	}
	return keeper.Filter(s.Filter, 0)
}

func limits(s *Setup) error {
	set := func(name string, which int, n uint64) error {
		if err := unix.Setrlimit(which, &unix.Rlimit{Cur: n, Max: n}); err != nil {
			return fmt.Errorf("limit of %s to %d: %w", name, n, err)
		}
		return nil
	}
	var had unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &had); err != nil {
		return fmt.Errorf("limit of files: %w", err)
	}
	err := errors.Join(
		set("core", unix.RLIMIT_CORE, 0),
		set("files", unix.RLIMIT_NOFILE, min(s.Files, had.Max)),
	)
	if s.Processes != 0 {
		err = errors.Join(err, set("processes", unix.RLIMIT_NPROC, s.Processes))
	}
	return err
}

// capabilities drops all but some from the bounding set, which is what a program
// executed by root gets, and from this thread.
func capabilities(some uint32) error {
	for c := uintptr(0); c < 64; c++ {
		if some&(1<<c) != 0 {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) {
			break // the kernel has no more
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("ambient capabilities: %w", err)
	}
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	body := [2]unix.CapUserData{{Effective: some, Permitted: some}}
	if err := unix.Capset(&head, &body[0]); err != nil {
		return fmt.Errorf("capabilities: %w", err)
	}
	return nil
}
