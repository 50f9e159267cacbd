package sandboxtest_test

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/native"
	"github.com/mayfly-ci/mayfly/sandbox/sandboxtest"
)

// walled is a native runtime all of whose boxes have a kernel of their own.
type walled struct{ *native.Runtime }

func (w walled) Create(ctx context.Context, name string, s sandbox.Spec) (sandbox.Sandbox, error) {
	s.Isolation = sandbox.GVisor
	return w.Runtime.Create(ctx, name, s)
}

// TestGVisor: the native runtime keeps its contract with gVisor's kernel, too.
func TestGVisor(t *testing.T) {
	if os.Getenv(userEnv) != "" {
		return
	}
	needRoot(t)
	t.Parallel()
	h := behindWall(harness(t, t.TempDir()))
	sandboxtest.Run(t, func(*testing.T) sandboxtest.Harness { return h })
}

// behindWall gives all boxes of a harness a kernel of their own.
func behindWall(h sandboxtest.Harness) sandboxtest.Harness {
	h.Runtime = walled{h.Runtime.(*native.Runtime)}
	h.Kernel = kernelOf
	orphan := h.Orphan
	h.Orphan = func(ctx context.Context, name string, s sandbox.Spec) error {
		s.Isolation = sandbox.GVisor
		return orphan(ctx, name, s)
	}
	again := h.Again
	h.Again = func() (sandbox.Runtime, error) {
		r, err := again()
		return walled{r.(*native.Runtime)}, err
	}
	return h
}

// kernelOf are the processes in the control group of a box, the keeper first: it
// is the oldest.
func kernelOf(name string) []int {
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/" + parent() + "/*/" + name + "/cgroup.procs") // the pattern is well formed
	unified, _ := filepath.Glob("/sys/fs/cgroup/" + parent() + "/*/" + name + "/cgroup.procs")
	for _, file := range append(groups, unified...) {
		b, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		var pids []int
		for _, word := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(word); err == nil {
				pids = append(pids, pid)
			}
		}
		return pids
	}
	return nil
}

// TestGVisorImage: and over an image, which "docker save" wrote.
func TestGVisorImage(t *testing.T) {
	if os.Getenv(userEnv) != "" {
		return
	}
	t.Parallel()
	needRoot(t)
	h := behindWall(imageHarness(t))
	sandboxtest.Run(t, func(*testing.T) sandboxtest.Harness { return h })
}
