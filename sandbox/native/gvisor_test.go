package native

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/gvisor"
)

// createWalled makes a box with a kernel of its own.
func createWalled(t testing.TB, r *Runtime, name string, l sandbox.Limits) sandbox.Sandbox {
	t.Helper()
	return create(t, r, name, sandbox.Spec{Isolation: sandbox.GVisor, Limits: l})
}

// kernelProcesses are those of the host that are in the box's control group, by
// what they are.
func kernelProcesses(t testing.TB, cfg Config) map[string][]int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(memoryGroup(t, cfg), "cgroup.procs"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	out := map[string][]int{}
	for _, word := range strings.Fields(string(b)) {
		pid, err := strconv.Atoi(word)
		if err != nil {
			t.Fatal(err)
		}
		line, err := os.ReadFile("/proc/" + word + "/cmdline")
		if err != nil {
			continue // it ended
		}
		name, _, _ := strings.Cut(string(line), "\x00")
		out[name] = append(out[name], pid) // "" are the processes in which the box's run
	}
	return out
}

const (
	keeper = "mayfly-guest"
	sentry = "runsc-sandbox"
	gofer  = "runsc-gofer"
)

// The kernel of the box is gVisor's, and what this kernel tells to a box without
// one it does not tell there.
func TestGVisorKernel(t *testing.T) {
	t.Parallel()
	r := newRuntime(t, config(t))
	var u unix.Utsname
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err := errors.Join(err, unix.Uname(&u)); err != nil {
		t.Fatal(err)
	}
	host := []string{unix.ByteSliceToString(u.Release[:]), strings.TrimSpace(string(id))}
	const ask = "uname -r; cat /proc/version; cat /proc/sys/kernel/random/boot_id; cat /proc/cmdline; true"
	open, _ := script(t, create(t, r, "open", sandbox.Spec{}), ask)
	b := createWalled(t, r, "box", sandbox.Limits{})
	closed, _ := script(t, b, ask)
	for _, fact := range host {
		if !strings.Contains(open, fact) {
			t.Errorf("a box on this kernel says %q, want %q in it: else the other half of this test means nothing", open, fact)
		}
		if strings.Contains(closed, fact) {
			t.Errorf("a box with a kernel of its own says %q of this one: %q", fact, closed)
		}
	}
	if !strings.Contains(closed, "gvisor") {
		t.Errorf("the kernel says %q, want gVisor", closed)
	}
	out, _ := script(t, b, "cat /proc/self/status; ls /proc/self/fd | tr '\\n' ' '")
	for _, want := range []string{"CapPrm:\t00000000000004fb", "CapBnd:\t00000000000004fb", "NoNewPrivs:\t1", "Seccomp:\t2", "\n0 1 2 3 "} {
		if !strings.Contains(out, want) {
			t.Errorf("a step's status: got %s, want %q in it", out, want)
		}
	}
	if out, _ := script(t, b, "ls -A /tmp; df --output=target /tmp"); !strings.HasSuffix(out, "Mounted on\n/\n") || strings.Count(out, "\n") != 2 {
		t.Errorf("/tmp: got %q, want it empty and on the disk", out)
	}
}

// What runs on the host for the box is nobody there: neither root nor in a
// namespace of the host, and filtered.
func TestGVisorOutside(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	r := newRuntime(t, cfg)
	script(t, createWalled(t, r, "box", sandbox.Limits{}), "true")
	all := kernelProcesses(t, cfg)
	if len(all[keeper]) != 1 || len(all[sentry]) != 1 || len(all[gofer]) != 1 || len(all[""]) == 0 {
		t.Fatalf("processes of the box: got %v, want a keeper, a kernel, a gofer and what the kernel runs", all)
	}
	for name, pids := range all {
		for _, pid := range pids {
			status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
			if err != nil || strings.Contains(string(status), "\nState:\tZ") {
				continue // it ended: the runsc that starts the kernel is reaped a little later
			}
			text := string(status)
			uid := uint32(0)
			for line := range strings.Lines(text) {
				if f := strings.Fields(line); f[0] == "Uid:" {
					n, err := strconv.ParseUint(f[1], 10, 32)
					if err != nil {
						t.Error(err)
					}
					uid = uint32(n)
				}
			}
			if uid < defaultFirst || !strings.Contains(text, "NoNewPrivs:\t1") {
				t.Errorf("%s: got user %d and %s, want one of the box's range, and no_new_privs", name, uid, text)
			}
			if name != keeper && !strings.Contains(text, "Seccomp:\t2") {
				t.Errorf("%s: got %s, want a filter", name, text)
			}
			for _, ns := range []string{"user", "mnt", "pid", "net", "ipc", "uts", "cgroup"} {
				own, err := os.Readlink("/proc/self/ns/" + ns)
				its, itsErr := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
				if err != nil || itsErr == nil && own == its {
					t.Errorf("%s is in the %s namespace of the host (%v)", name, ns, err)
				}
			}
			mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
			if err == nil && strings.Contains(string(mounts), cfg.StateDir) {
				t.Errorf("%s sees a mount of the host: %s", name, mounts)
			}
		}
	}
	// The kernel of the box has an empty root, and none of its files.
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/root", all[sentry][0]))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !slices.Contains([]string{"proc", "etc", "dev", "sys", "tmp"}, e.Name()) {
			t.Errorf("the kernel of the box has %s in its root", e.Name())
		}
	}
	for _, l := range leftovers(t, cfg.StateDir) {
		if strings.Contains(l, " - ") {
			t.Errorf("mounted on the host: %s", l)
		}
	}
}

func TestGVisorHonestBuilds(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	cfg.Limits.Memory, cfg.Limits.Pids = 3<<30, 2048
	honest(t, createWalled(t, newRuntime(t, cfg), "box", sandbox.Limits{}), "hard link of a fifo") // gVisor: not supported
}

// Whichever of its parts dies, the box has died, nothing of it runs on, and
// Destroy finds the rest.
func TestGVisorParts(t *testing.T) {
	t.Parallel()
	for _, part := range []string{keeper, sentry, gofer} {
		t.Run(part, func(t *testing.T) {
			t.Parallel()
			cfg := config(t)
			r := newRuntime(t, cfg)
			b := createWalled(t, r, "box", sandbox.Limits{})
			script(t, b, "sleep 1000 & echo up")
			all := kernelProcesses(t, cfg)
			if len(all[part]) != 1 {
				t.Fatalf("processes of the box: got %v, want one %s", all, part)
			}
			if err := unix.Kill(all[part][0], unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			eventually(t, "processes end without help", func() bool { return len(kernelProcesses(t, cfg)) == 0 })
			if _, err := b.Run(bounded(t), sandbox.Process{Args: []string{"/bin/true"}}); !errors.Is(err, sandbox.ErrDied) {
				t.Errorf("Run: got %v, want ErrDied", err)
			}
			if err := r.Destroy(bounded(t), "box"); err != nil {
				t.Fatal(err)
			}
			if left := leftovers(t, cfg.StateDir); len(left) != 0 {
				t.Errorf("after Destroy: %q is left", left)
			}
		})
	}
}

// As TestKilledAgent, for boxes with a kernel of their own.
func TestGVisorKilledAgent(t *testing.T) { killedAgents(t, walled) }

// A box that dies of its memory limit says so.
func TestGVisorMemory(t *testing.T) {
	t.Parallel()
	b := createWalled(t, newRuntime(t, config(t)), "box", sandbox.Limits{Memory: 64 << 20})
	_, err := b.Run(bounded(t), sandbox.Process{Args: []string{"/usr/bin/python3", "-c", "x = bytearray(200 << 20)"}})
	if !errors.Is(err, sandbox.ErrDied) || !strings.Contains(err.Error(), "out of memory") {
		t.Errorf("200 MiB in a box of 64: got %v, want ErrDied, and why", err)
	}
}

// What takes the kernel of the box down, too, harms nobody else.
func TestGVisorSuicide(t *testing.T) {
	t.Parallel()
	for name, text := range map[string]string{
		"fork bomb": "for i in $(seq 400); do sleep 60 & done; echo",
		"process 1": "kill -9 1; sleep 60",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			cfg := config(t)
			r := newRuntime(t, cfg)
			b := createWalled(t, r, "box", sandbox.Limits{Pids: 80})
			_, err := b.Run(bounded(t), sandbox.Process{Args: []string{"/bin/sh", "-c", text}, Env: []string{"PATH=/usr/bin"}})
			if err != nil && !errors.Is(err, sandbox.ErrDied) {
				t.Errorf("Run: got %v, want nil or ErrDied", err)
			}
			if calm, exit := script(t, create(t, r, "calm", sandbox.Spec{}), "echo calm"); exit.Code != 0 {
				t.Errorf("its neighbour: got %q %+v", calm, exit)
			}
			if err := errors.Join(r.Destroy(bounded(t), "box"), r.Destroy(bounded(t), "calm")); err != nil {
				t.Fatal(err)
			}
			if left := leftovers(t, cfg.StateDir); len(left) != 0 {
				t.Errorf("after Destroy: %q is left", left)
			}
		})
	}
}

// standIn writes a script that stands in for runsc.
func standIn(t *testing.T, mode os.FileMode, text string) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "runsc")
	if err := errors.Join(os.WriteFile(p, []byte("#!/bin/sh\n"+text+"\n"), 0o600), os.Chmod(p, mode)); err != nil {
		t.Fatal(err)
	}
	return p
}

// What is no gVisor that can be relied on gives no box, and says what to do.
func TestGVisorRefused(t *testing.T) {
	t.Parallel()
	const good = "echo 'runsc version release-20260905.0'"
	for _, c := range []struct{ name, runsc, want string }{
		{"not configured", "", "no runsc is configured"},
		{"absent", "/nonexistent/runsc", "install gVisor"},
		{"a directory", "/usr", "not a program"},
		{"not for everybody", standIn(t, 0o700, good), "chmod 755"},
		{"writable", standIn(t, 0o777, good), "can be changed by others"},
		{"fails", standIn(t, 0o755, "echo no; exit 3"), "exit status 3"},
		{"no version", standIn(t, 0o755, "echo 'runsc version VERSION_MISSING'"), "says no date"},
		{"another program", standIn(t, 0o755, "echo 'runc version 1.2-20260101'"), "says no date"},
		{"old", standIn(t, 0o755, "echo 'runsc version release-20221219.0'"), "update gVisor"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			cfg := config(t)
			cfg.GVisor.Runsc = c.runsc
			r := newRuntime(t, cfg)
			_, err := r.Create(bounded(t), "box", sandbox.Spec{Isolation: sandbox.GVisor})
			if !errors.Is(err, sandbox.ErrUnsupported) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Create: got %v, want ErrUnsupported and %q", err, c.want)
			}
			if left := leftovers(t, cfg.StateDir); len(left) != 0 {
				t.Errorf("a refused box has %q", left)
			}
		})
	}
	if _, err := newRuntime(t, config(t)).Create(bounded(t), "box", sandbox.Spec{Isolation: "kata"}); !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("isolation kata: got %v, want ErrUnsupported", err)
	}
	for _, g := range []gvisor.Config{{Runsc: "runsc"}, {Runsc: "/a/../b"}, {Runsc: "/a", Platform: "ptrace"}} {
		cfg := config(t)
		cfg.GVisor = g
		if _, err := New(cfg); err == nil {
			t.Errorf("New with %+v: got nil, want an error", g)
		}
	}
}

// One that does not start says why, and Check tells it without failing.
func TestGVisorBroken(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	cfg.GVisor.Runsc = "/usr/bin/false"
	r := newRuntime(t, cfg)
	claims, err := r.Check(bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	claim := claims[len(claims)-1]
	if claim.Name != "gvisor" || claim.Enforced || !strings.Contains(claim.Detail, "refused") {
		t.Errorf("Check: got %+v, want gvisor not to be had", claim)
	}
	// A program without an interpreter in the yard: it says its version here, and
	// cannot be run there.
	cfg.GVisor.Runsc = standIn(t, 0o755, "echo 'runsc version release-20260905.0'")
	r = newRuntime(t, cfg)
	if _, err := r.Create(bounded(t), "box", sandbox.Spec{Isolation: sandbox.GVisor}); err == nil || !strings.Contains(err.Error(), "start runsc") {
		t.Errorf("Create: got %v, want what the keeper said", err)
	}
	if err := r.Destroy(bounded(t), "box"); err != nil {
		t.Fatal(err)
	}
	if left := leftovers(t, cfg.StateDir); len(left) != 0 {
		t.Errorf("after Destroy: %q is left", left)
	}
}

func TestGVisorCheck(t *testing.T) {
	t.Parallel()
	claims, err := newRuntime(t, config(t)).Check(bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	if claim := claims[len(claims)-1]; claim.Name != "gvisor" || !claim.Enforced {
		t.Errorf("Check: got %+v, want gvisor", claim)
	}
}
