package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/gvisor/keeper"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

// A Process is process 1 of a container. The descriptor names it for ever; its
// number may become another's when it has ended.
type Process struct {
	pid int
	fd  int // pidfd
}

// FindProcess opens the process with that number and makes sure that it is the
// container's: the daemon may count in another pid namespace than ours, or on
// another machine.
func FindProcess(pid int, id string) (*Process, error) {
	if pid <= 1 {
		return nil, fmt.Errorf("process 1 has ended: %w", sandbox.ErrDied)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err == nil {
		unix.CloseOnExec(fd)
	}
	var groups []byte
	if err == nil {
		groups, err = os.ReadFile(proc(pid, "cgroup"))
	}
	p := &Process{pid, fd}
	if err == nil && p.ended() {
		return nil, errors.Join(fmt.Errorf("process 1 has ended: %w", sandbox.ErrDied), p.Close())
	}
	if err != nil || !strings.Contains(string(groups), id) {
		return nil, errors.Join(fmt.Errorf("process %d of container %.12s is not in our /proc: the daemon is on another machine or has a pid namespace of its own: %w", pid, id, sandbox.ErrUnsupported), err, p.Close())
	}
	return p, nil
}

func proc(pid int, parts ...string) string {
	return filepath.Join(append([]string{"/proc", strconv.Itoa(pid)}, parts...)...)
}

// ended reports that the process is gone, and so all that ran in the container:
// the kernel lets process 1 go last.
func (p *Process) ended() bool {
	fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n == 1
}

// Kill ends the process at once. It does not wait.
func (p *Process) Kill() error {
	if err := unix.PidfdSendSignal(p.fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill: %w", err)
	}
	return nil
}

// wait returns when the process has ended.
func (p *Process) wait(ctx context.Context) error {
	return kernel.Poll(ctx, "wait for the end of process 1", func() (bool, error) { return p.ended(), nil })
}

// Close lets go of the descriptor, and not of the process.
func (p *Process) Close() error {
	if p.fd < 0 {
		return nil
	}
	return unix.Close(p.fd)
}

// status are lines of /proc/PID/status by their names.
func (p *Process) status() (map[string]string, error) {
	b, err := os.ReadFile(proc(p.pid, "status"))
	if err != nil {
		return nil, fmt.Errorf("process 1: %w", err)
	}
	out := map[string]string{}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		out[name] = strings.TrimSpace(value)
	}
	return out, nil
}

// Capabilities are what tar, install, su and a package's scripts need as root,
// without the prefix CAP_, and with a kernel of its own what that is made with.
func Capabilities(wall sandbox.Isolation) []string {
	names := strings.Fields("CHOWN DAC_OVERRIDE FOWNER FSETID SETUID SETGID KILL NET_BIND_SERVICE")
	if wall == sandbox.GVisor {
		names = append(names, strings.Fields("SYS_ADMIN SYS_CHROOT SYS_PTRACE SETPCAP DAC_READ_SEARCH")...)
	}
	return names
}

// allowed are the first of them as bits (linux/capability.h).
const allowed = 1<<unix.CAP_CHOWN | 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_FOWNER | 1<<unix.CAP_FSETID |
	1<<unix.CAP_SETUID | 1<<unix.CAP_SETGID | 1<<unix.CAP_KILL | 1<<unix.CAP_NET_BIND_SERVICE

// confined looks in the kernel whether the process is what the engine was asked
// for: an OCI runtime may do without what it does not know. With a kernel of its
// own it has more privileges, over a user namespace that must be its own.
func (p *Process) confined(wall sandbox.Isolation) error {
	s, err := p.status()
	if err != nil {
		return err
	}
	bits, flags := uint64(allowed), map[string]string{"NoNewPrivs": "1", "Seccomp": "2"}
	namespaces := []string{"mnt", "pid", "net", "ipc", "uts", "cgroup"}
	if wall == sandbox.GVisor {
		bits |= keeper.Privileges
		delete(flags, "Seccomp")
		namespaces = append(namespaces, "user")
	}
	for name, want := range flags {
		if s[name] != want {
			return fmt.Errorf("process 1 has %s %q, want %s: the daemon does not do what it was asked: %w", name, s[name], want, sandbox.ErrUnsupported)
		}
	}
	for _, name := range []string{"CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"} {
		if has, err := strconv.ParseUint(s[name], 16, 64); err != nil || has&^bits != 0 {
			return fmt.Errorf("process 1 has %s %s: more than was asked for: %w", name, s[name], sandbox.ErrUnsupported)
		}
	}
	for _, name := range namespaces {
		theirs, err := os.Readlink(proc(p.pid, "ns", name))
		ours, ownErr := os.Readlink("/proc/self/ns/" + name)
		if err := errors.Join(err, ownErr); err != nil {
			return fmt.Errorf("process 1: %w", err)
		}
		if theirs == ours {
			return fmt.Errorf("process 1 is in our %s namespace: %w", name, sandbox.ErrUnsupported)
		}
	}
	return nil
}

// Root is who root of the box is outside of it: 0 if the daemon has no user
// namespace for its containers.
func (p *Process) Root() (uid, gid int, err error) {
	for file, id := range map[string]*int{"uid_map": &uid, "gid_map": &gid} {
		b, err := os.ReadFile(proc(p.pid, file))
		if err != nil {
			return 0, 0, fmt.Errorf("process 1: %w", err)
		}
		f := strings.Fields(string(b))
		if len(f) < 3 || f[0] != "0" {
			return 0, 0, fmt.Errorf("process 1: %s is %q", file, b)
		}
		if *id, err = strconv.Atoi(f[1]); err != nil {
			return 0, 0, fmt.Errorf("process 1: %s: %w", file, err)
		}
	}
	return uid, gid, nil
}
