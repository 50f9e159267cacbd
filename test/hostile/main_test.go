// Package hostile_test gives the agent what is broken, too large, full, late or
// gone, and wants each to be said clearly, the job to be reported, and the agent
// to run the next good job.
package hostile_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/test/agenttest"
)

func TestMain(m *testing.M) { agenttest.Main(m, agenttest.JumpingClock) }

// ends waits for a job and wants it to end so, for that reason.
func ends(t *testing.T, w *agenttest.World, id string, want providers.Conclusion, reason string) {
	t.Helper()
	r := w.Result(t, id, time.Minute)
	if r.Conclusion != want || !strings.Contains(r.Reason, reason) {
		t.Errorf("job %s: %s (%s), want %s with %q; its log:\n%s", id, r.Conclusion, r.Reason, want, reason, w.Log(t, id))
	}
}

// begins submits a job whose first line is "begun", and waits for that.
func begins(t *testing.T, w *agenttest.World, workflow string) (id string) {
	t.Helper()
	id = w.Submit(t, workflow)
	if !agenttest.Within(time.Minute, func() bool { return strings.Contains(w.Log(t, id), "begun") }) {
		t.Fatalf("job %s does not begin within a minute; its log:\n%s", id, w.Log(t, id))
	}
	return id
}

// owesNothing wants no debts, no boxes, no claims and an unbroken record.
func owesNothing(t *testing.T, w *agenttest.World) {
	t.Helper()
	if out, code := w.Run(t, "jobs"); code != 0 || !strings.Contains(out, "nothing is owed") {
		t.Errorf("mayfly jobs: %s (status %d), want nothing owed", out, code)
	}
	if out, code := w.Run(t, "audit", "verify"); code != 0 {
		t.Errorf("mayfly audit verify: %s (status %d)", out, code)
	}
	for _, pattern := range []string{filepath.Join(w.State, "boxes-*/boxes/*"), filepath.Join(w.State, "boxes-*/ids/*"), filepath.Join(w.Spool, "claimed/*")} {
		left, err := filepath.Glob(pattern)
		if err != nil || len(left) > 0 {
			t.Errorf("left: %v, %v", left, err)
		}
	}
}

// small mounts a file system of so many bytes, which goes with the test.
func small(t *testing.T, dir, size string) {
	t.Helper()
	agenttest.Must(t, os.MkdirAll(dir, 0o700))
	agenttest.Must(t, unix.Mount("small", dir, "tmpfs", 0, "mode=0700,size="+size))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// fill takes all space of the file system of dir; free gives it back.
func fill(t *testing.T, dir string) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.Create(path)
	agenttest.Must(t, err)
	for chunk := make([]byte, 1<<20); len(chunk) > 0; {
		if _, err := f.Write(chunk); err != nil {
			chunk = chunk[:len(chunk)/2]
		}
	}
	agenttest.Must(t, f.Close())
	return func() { agenttest.Must(t, os.Remove(path)) }
}
