package isolation

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/test/servertest"
)

// TestGVisor makes the attacks once more, on boxes with a kernel of their own.
// Five of them want that a process dies and its box lives on, where under gVisor
// the box is what ends, or may be. They are judged for what holds there: forks, a
// fork bomb and a job that kills process 1 by TestGVisorSuicide of the native runtime, memory by
// its TestGVisorMemory, and threads by the clause of sandboxtest, which counts
// those of the host.
func TestGVisor(t *testing.T) {
	if wall != sandbox.Kernel {
		return // we are those attacks
	}
	t.Parallel()
	runsc, err := servertest.Runsc(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.v", "-test.parallel=4", "-test.timeout=5m",
		"-test.skip=^TestForkBomb$|^TestKillProcessOne$|^TestAbuse$/^(thread_bomb|memory_hog|processes)$")
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, insideEnv) }), wallEnv+"="+string(sandbox.GVisor), runscEnv+"="+runsc)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if passed := strings.Count("\n"+string(out), "\n--- PASS: "); passed < 15 {
		t.Errorf("got %d tests that passed, want at least 15: %s", passed, out)
	}
}
