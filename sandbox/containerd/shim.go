package containerd

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// endShims reports whether no shim of that box runs. A daemon whose client goes
// away while it waits for the end of a shim forgets the shim and lets it run
// (containerd says so itself, "the shim might be leaked"); nobody but us can know
// of it then. One that was told to end ends by itself; how is what the others get:
// SIGTERM lets a shim remove its socket.
func (r *Runtime) endShims(name string, how unix.Signal) (gone bool, err error) {
	all, err := os.ReadDir("/proc")
	if err != nil {
		return false, fmt.Errorf("shims: %w", err)
	}
	gone = true
	for _, e := range all {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || !isShim(pid, r.cfg.Namespace, r.id(name)) {
			continue
		}
		gone = false
		if how == 0 {
			continue
		}
		if err := signalShim(pid, r.cfg.Namespace, r.id(name), how); err != nil {
			return false, err
		}
	}
	return gone, nil
}

// isShim reports whether a process is the shim of a container. A job may call
// itself that, but is not root of the machine. The dead have no arguments.
func isShim(pid int, namespace, id string) bool {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	b, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil {
		return false // it has ended
	}
	args := strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
	value := func(flag string) string {
		i := slices.Index(args, flag)
		if i < 0 || i+1 >= len(args) {
			return ""
		}
		return args[i+1]
	}
	// What the daemon runs to start a shim, or after one, ends by itself.
	last := args[len(args)-1]
	if !strings.HasPrefix(filepath.Base(args[0]), "containerd-shim") || value("-id") != id || value("-namespace") != namespace || last == "start" || last == "delete" {
		return false
	}
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	return err == nil && bytes.Contains(status, []byte("\nUid:\t0\t"))
}

// signalShim signals that process and no other that may have its number by now.
func signalShim(pid int, namespace, id string, how unix.Signal) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("shim %d: %w", pid, err)
	}
	unix.CloseOnExec(fd)
	if isShim(pid, namespace, id) {
		err = unix.PidfdSendSignal(fd, how, nil, 0)
	}
	if err = errors.Join(ignore(err, func(err error) bool { return errors.Is(err, unix.ESRCH) }), unix.Close(fd)); err != nil {
		return fmt.Errorf("shim %d: %w", pid, err)
	}
	return nil
}
