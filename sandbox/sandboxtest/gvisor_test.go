package sandboxtest_test

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox/engine/enginetest"
	"github.com/mayfly-ci/mayfly/sandbox/sandboxtest"
)

// TestGVisor: the native runtime keeps its contract with gVisor's kernel, too.
func TestGVisor(t *testing.T) {
	if os.Getenv(userEnv) != "" {
		return
	}
	needRoot(t)
	t.Parallel()
	h := enginetest.Behind(harness(t, t.TempDir()), kernelOf)
	sandboxtest.Run(t, func(*testing.T) sandboxtest.Harness { return h })
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
	h := enginetest.Behind(imageHarness(t), kernelOf)
	sandboxtest.Run(t, func(*testing.T) sandboxtest.Harness { return h })
}
