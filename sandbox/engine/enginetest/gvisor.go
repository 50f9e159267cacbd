package enginetest

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// A World is a runtime whose boxes can have a kernel of their own.
type World struct {
	Runtime     sandbox.Runtime
	ID          func(box string) string // for Processes
	FirstID     uint32                  // of those that its boxes have
	NothingLeft func(t testing.TB)
}

// GVisor looks at boxes with a kernel of their own from both sides.
func GVisor(t *testing.T, w World) {
	t.Run("kernel", w.kernel)
	t.Run("parts", w.parts)
	t.Run("memory", w.memory)
	t.Run("honest builds", func(t *testing.T) {
		s := HonestSpec()
		s.Isolation = sandbox.GVisor
		// gVisor links no FIFO, and shows a box no control group.
		HonestBuilds(t, Create(t, w.Runtime, "honest", s), "fifo and links", "limits of the box seen by a runtime")
	})
	w.NothingLeft(t)
}

// kernel: what this kernel tells to a box without one it does not tell there, and
// what runs on the host for the box is nobody there.
func (w World) kernel(t *testing.T) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	const ask = "cat /proc/version /proc/sys/kernel/random/boot_id; true"
	host := strings.TrimSpace(string(id))
	if open, _ := Script(t, Create(t, w.Runtime, "open", sandbox.Spec{}), ask); !strings.Contains(open, host) {
		t.Errorf("a box on this kernel says %q, want %q in it: else the other half of this test means nothing", open, host)
	}
	b := Create(t, w.Runtime, "closed", sandbox.Spec{Isolation: sandbox.GVisor})
	if closed, _ := Script(t, b, ask); strings.Contains(closed, host) || !strings.Contains(closed, "gvisor") {
		t.Errorf("a box with a kernel of its own says %q, want gVisor and nothing of this one", closed)
	}
	out, _ := Script(t, b, "cat /proc/self/status; ls -A /tmp | wc -l; df --output=target /tmp | tail -1; ls /proc/self/fd | tr '\\n' ' '")
	for _, want := range []string{"CapPrm:\t00000000000004fb", "CapBnd:\t00000000000004fb", "NoNewPrivs:\t1", "Seccomp:\t2", "\n0\n/\n0 1 2 3 "} {
		if !strings.Contains(out, want) {
			t.Errorf("a step's status: got %s, want %q in it", out, want)
		}
	}
	all := w.some(t, "closed")
	for name, pids := range all {
		for _, pid := range pids {
			if err := w.outside(name, pid); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
}

// some are the parts of a box, each of which is there.
func (w World) some(t *testing.T, box string) map[string][]int {
	t.Helper()
	all := Parts(t, w.ID(box))
	if len(all[Keeper]) != 1 || len(all[Sentry]) != 1 || len(all[Gofer]) != 1 || len(all[""]) == 0 {
		t.Fatalf("processes of the box: got %v, want a keeper, a kernel, a gofer and what the kernel runs", all)
	}
	return all
}

// outside says what a process of the host for a box is that it should not be.
func (w World) outside(name string, pid int) error {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil || strings.Contains(string(b), "\nState:\tZ") {
		return nil // it ended
	}
	status := string(b)
	_, rest, _ := strings.Cut(status, "\nUid:\t")
	word, _, _ := strings.Cut(rest, "\t")
	if uid, err := strconv.ParseUint(word, 10, 32); err != nil || uint32(uid) < w.FirstID {
		err = errors.Join(err, fmt.Errorf("user %q, want one of the box's range", word))
		return err
	}
	if !strings.Contains(status, "NoNewPrivs:\t1") || name != Keeper && !strings.Contains(status, "Seccomp:\t2") {
		return fmt.Errorf("got %s, want no_new_privs and a filter", status)
	}
	for _, ns := range []string{"user", "mnt", "pid", "net", "ipc", "uts", "cgroup"} {
		own, err := os.Readlink("/proc/self/ns/" + ns)
		its, itsErr := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
		if err != nil || itsErr == nil && own == its {
			return fmt.Errorf("is in the %s namespace of the host (%v)", ns, err)
		}
	}
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err == nil && strings.Contains(string(mounts), "mayfly-guest") {
		return fmt.Errorf("sees the directory of the guest program: %s", mounts)
	}
	return nil
}

// parts: whichever of them dies, the box has died, nothing of it runs on, and
// Destroy finds the rest.
func (w World) parts(t *testing.T) {
	for _, part := range []string{Keeper, Sentry, Gofer} {
		t.Run(part, func(t *testing.T) {
			t.Parallel() // a keeper lingers
			w.dies(t, part)
		})
	}
}

func (w World) dies(t *testing.T, part string) {
	name := "dies-with-its-" + part
	b := Create(t, w.Runtime, name, sandbox.Spec{Isolation: sandbox.GVisor})
	Script(t, b, "sleep 1000 & echo up")
	if err := unix.Kill(w.some(t, name)[part][0], unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	Eventually(t, "processes end without help", func() bool { return len(Processes(w.ID(name))) == 0 })
	if _, err := b.Run(Bounded(t), sandbox.Process{Args: []string{"/bin/true"}}); !errors.Is(err, sandbox.ErrDied) {
		t.Errorf("Run in a box whose %s is dead: got %v, want ErrDied", part, err)
	}
}

// memory: a box that dies of its limit says so.
func (w World) memory(t *testing.T) {
	b := Create(t, w.Runtime, "hungry", sandbox.Spec{Isolation: sandbox.GVisor, Limits: sandbox.Limits{Memory: 64 << 20}})
	_, err := b.Run(Bounded(t), sandbox.Process{Args: []string{"/usr/bin/python3", "-c", "x = bytearray(200 << 20)"}})
	if !errors.Is(err, sandbox.ErrDied) || !strings.Contains(err.Error(), "out of memory") {
		t.Errorf("200 MiB in a box of 64: got %v, want ErrDied, and why", err)
	}
}
