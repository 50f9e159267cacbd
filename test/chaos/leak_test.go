package chaos_test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/postgrestest"
)

// Each kind of thing is leaked on purpose, and the comparison must say so, and
// must say nothing once it is gone.
func TestLeaksAreSeen(t *testing.T) {
	w := agenttest.New(t, agenttest.Config{Database: postgrestest.Start(t)})
	dir := filepath.Join(w.Dir, "leak")
	agenttest.Must(t, os.Mkdir(dir, 0o755))
	disk := filepath.Join(w.Dir, "disk")
	agenttest.Must(t, os.WriteFile(disk, make([]byte, 1<<20), 0o600))
	for name, leak := range map[string]struct {
		want []string // kinds
		make func(*testing.T) (undo func() error)
	}{
		"mount": {[]string{"mounts"}, func(t *testing.T) func() error {
			agenttest.Must(t, unix.Mount("leak", dir, "tmpfs", 0, ""))
			return func() error { return unix.Unmount(dir, 0) }
		}},
		"cgroup": {[]string{"cgroups"}, func(t *testing.T) func() error {
			group := filepath.Join("/sys/fs/cgroup/pids", w.Cgroup)
			if _, err := os.Stat("/sys/fs/cgroup/pids"); err != nil {
				group = filepath.Join("/sys/fs/cgroup", w.Cgroup)
			}
			agenttest.Must(t, os.Mkdir(group, 0o755))
			return func() error { return os.Remove(group) }
		}},
		"process": {[]string{"processes"}, func(t *testing.T) func() error { return sleeper(t, 0) }},
		"network namespace": {[]string{"namespaces", "processes"}, func(t *testing.T) func() error {
			return sleeper(t, syscall.CLONE_NEWNET)
		}},
		"loop device": {[]string{"loops"}, func(t *testing.T) func() error {
			device, err := exec.Command("losetup", "--find", "--show", disk).CombinedOutput()
			if err != nil {
				t.Fatalf("losetup (Debian package mount): %v: %s", err, device)
			}
			return func() error { return exec.Command("losetup", "--detach", strings.TrimSpace(string(device))).Run() }
		}},
		"id range": {[]string{"files"}, func(t *testing.T) func() error {
			link := filepath.Join(w.Dir, "0")
			agenttest.Must(t, os.Symlink("mf-x-box", link))
			return func() error { return os.Remove(link) }
		}},
		"temporary file": {[]string{"files"}, func(t *testing.T) func() error {
			file := "/var/tmp/leak"
			agenttest.Must(t, os.WriteFile(file, nil, 0o600))
			return func() error { return os.Remove(file) }
		}},
		"listener": {[]string{"sockets"}, func(t *testing.T) func() error {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			agenttest.Must(t, err)
			return l.Close
		}},
		"socket": {[]string{"sockets"}, func(t *testing.T) func() error {
			l, err := net.Listen("unix", "@leak")
			agenttest.Must(t, err)
			return l.Close
		}},
		"role": {[]string{"roles"}, func(t *testing.T) func() error {
			_, err := agenttest.Query(t.Context(), w, "create role leak")
			agenttest.Must(t, err)
			return func() error { _, err := agenttest.Query(t.Context(), w, "drop role leak"); return err }
		}},
	} {
		t.Run(name, func(t *testing.T) {
			before := w.Snapshot(t)
			undo := leak.make(t)
			if got := kinds(agenttest.Diff(before, w.Snapshot(t))); !slices.Equal(got, leak.want) {
				t.Errorf("a leaked %s is seen in %q, want %q", name, got, leak.want)
			}
			agenttest.Must(t, undo())
			w.Unchanged(t, before)
			if got := agenttest.Diff(w.Snapshot(t), before); len(got) > 0 {
				t.Errorf("after its end: %q, want no difference", got)
			}
		})
	}
}

// seesLeaks is TestLeaksAreSeen for what only the engine of a world has.
func (w *world) seesLeaks(t *testing.T, before agenttest.Host) {
	t.Helper()
	for i, leak := range w.in.leaks {
		undo, err := leak(t.Context())
		agenttest.Must(t, err)
		if got := kinds(agenttest.Diff(before, w.Snapshot(t))); !slices.Contains(got, "engine") {
			t.Errorf("leak %d in %s is seen in %q, want it in the engine", i, w.runtime, got)
		}
		agenttest.Must(t, undo())
	}
	w.Unchanged(t, before)
}

// TestLossIsSeen is the other direction: what was there and is gone.
func TestLossIsSeen(t *testing.T) {
	diff := agenttest.Diff(agenttest.Host{"files": {"a", "a", "b"}}, agenttest.Host{"files": {"a", "b"}, "roles": {"c"}})
	if want := []string{"files: - a", "roles: + c"}; !slices.Equal(diff, want) {
		t.Errorf("got %q, want %q", diff, want)
	}
}

func sleeper(t *testing.T, flags uintptr) (undo func() error) {
	cmd := exec.Command("sleep", "60")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: flags}
	agenttest.Must(t, cmd.Start())
	return func() error {
		err := cmd.Process.Kill()
		_ = cmd.Wait() // killed
		return err
	}
}

func kinds(diff []string) []string {
	var found []string
	for _, d := range diff {
		kind, _, _ := strings.Cut(d, ":")
		if !slices.Contains(found, kind) {
			found = append(found, kind)
		}
	}
	slices.Sort(found)
	return found
}
