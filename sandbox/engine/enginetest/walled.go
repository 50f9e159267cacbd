package enginetest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/sandboxtest"
)

// Behind gives all boxes of a harness a kernel of their own, whose processes on the
// host kernel tells.
func Behind(h sandboxtest.Harness, kernel func(name string) []int) sandboxtest.Harness {
	orphan, again := h.Orphan, h.Again
	h.Runtime, h.Kernel = walled{h.Runtime}, kernel
	h.Orphan = func(ctx context.Context, name string, s sandbox.Spec) error {
		s.Isolation = sandbox.GVisor
		return orphan(ctx, name, s)
	}
	h.Again = func() (sandbox.Runtime, error) {
		r, err := again()
		return walled{r}, err
	}
	return h
}

// walled is a runtime all of whose boxes have a kernel of their own.
type walled struct{ sandbox.Runtime }

func (w walled) Create(ctx context.Context, name string, s sandbox.Spec) (sandbox.Sandbox, error) {
	s.Isolation = sandbox.GVisor
	return w.Runtime.Create(ctx, name, s)
}

// Processes are those of the host that are in the control groups of the container
// with that id, process 1 of it first. The container is the one that this is the
// name of, or the end of the name, of a group.
func Processes(id string) []int {
	var out []int
	dirs, _ := filepath.Glob("/proc/[0-9]*") // the pattern is well formed
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		groups, _ := os.ReadFile(dir + "/cgroup") // it may have ended
		if err == nil && slices.ContainsFunc(strings.Split(string(groups), "\n"), func(line string) bool { return strings.HasSuffix(line, id) }) {
			out = append(out, pid)
		}
	}
	slices.SortFunc(out, func(a, b int) int { return first(b) - first(a) })
	return out
}

// first is 1 for process 1 of a pid namespace that is one below ours.
func first(pid int) int {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)) // it may have ended
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[0] == "NSpid:" && len(f) == 3 && f[2] == "1" {
			return 1
		}
	}
	return 0
}

// Parts are Processes by what they are: the keeper, its kernel's, and "" in which
// those of the box run.
func Parts(t testing.TB, id string) map[string][]int {
	t.Helper()
	out := map[string][]int{}
	for _, pid := range Processes(id) {
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil {
			continue // it ended
		}
		name, _, _ := strings.Cut(string(line), "\x00")
		if strings.HasPrefix(name, sandbox.Run) {
			name = Keeper
		}
		out[name] = append(out[name], pid)
	}
	return out
}

// Parts of a kernel on the host.
const (
	Keeper = "keeper"
	Sentry = "runsc-sandbox"
	Gofer  = "runsc-gofer"
)
