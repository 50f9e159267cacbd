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

// TestGVisor makes the attacks once more, on boxes with a kernel of their own. What
// takes down such a box where another lives on is judged so in place. Three attacks
// have another outcome altogether and are judged elsewhere: a fork bomb and a job
// that kills process 1 by TestGVisorSuicide of the native runtime, and threads,
// which are gVisor's own, by the clause of sandboxtest that counts the host's.
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
		"-test.skip=^TestForkBomb$|^TestKillProcessOne$|^TestAbuse$/^thread_bomb$")
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, insideEnv) }), wallEnv+"="+string(sandbox.GVisor), runscEnv+"="+runsc)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if passed := strings.Count("\n"+string(out), "\n--- PASS: "); passed < 15 {
		t.Errorf("got %d tests that passed, want at least 15: %s", passed, out)
	}
}
