package hostile_test

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/local"
	"github.com/mayfly-ci/mayfly/test/agenttest"
)

// A full disk under any of the directories of an agent holds up jobs and loses
// none: the one that runs is torn down and reported, in the end as what became
// of it, and the one that waits is run when there is space.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		full func(w *agenttest.World) string // directory
		size string
	}{
		"state": {func(w *agenttest.World) string { return w.State }, "128m"},
		"audit": {func(w *agenttest.World) string { return filepath.Join(w.State, "audit") }, "1m"},
		"spool": {func(w *agenttest.World) string { return w.Spool }, "1m"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := agenttest.New(t, agenttest.Config{Slots: 2})
			dir := c.full(w)
			small(t, dir, c.size)
			a := w.Start(t)
			w.Good(t)
			flow := w.Workflow(t, "long", "      - run: echo begun; sleep 1\n      - run: echo more\n")
			running := begins(t, w, flow)
			second := ""
			if name == "spool" { // nobody can submit into a full one
				second = w.Submit(t, flow)
			}
			free := fill(t, dir)
			if second == "" {
				second = w.Submit(t, flow)
			}
			// The step ends, and its job with it, on the full disk.
			<-time.After(4 * time.Second)
			if a.Over() {
				t.Fatalf("the agent ended on a full disk:\n%s", a.Log())
			}
			free()
			for _, id := range []string{running, second} {
				r := w.Result(t, id, time.Minute)
				t.Logf("%s (%s)", r.Conclusion, r.Reason)
				if r.Conclusion == providers.Lost || r.Conclusion == providers.Failure && r.Reason == "" {
					t.Errorf("job %s: %s (%s), want success or a failure with its reason", id, r.Conclusion, r.Reason)
				}
			}
			w.Good(t)
			a.Signal(t, syscall.SIGTERM)
			a.Wait(t, time.Minute) // its status may tell of jobs that it could not begin
			owesNothing(t, w)
		})
	}
}

// An agent that is killed on a full disk, and one that is started on it, lose
// nothing either.
func TestFullDiskAndKilled(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, agenttest.Config{})
	small(t, w.State, "128m")
	a := w.Start(t)
	w.Good(t)
	id := begins(t, w, w.Workflow(t, "long", "      - run: echo begun; sleep 60\n"))
	free := fill(t, w.State)
	a.Kill()
	a = w.Launch(t)
	if code := a.Wait(t, time.Minute); code != 3 || !strings.Contains(a.Log(), "no space left on device") {
		t.Errorf("an agent that is started on a full disk: status %d, %s; want 3 and why", code, a.Log())
	}
	if r, err := local.ReadResult(w.Spool, id); err == nil {
		t.Errorf("the job was reported by an agent that did not start: %+v", r)
	}
	free()
	a = w.Start(t)
	ends(t, w, id, providers.Lost, "the agent died")
	w.Good(t)
	a.Stop(t)
	owesNothing(t, w)
	if _, err := os.Stat(filepath.Join(w.State, "agent.json.new")); err == nil {
		t.Errorf("a half-written file is left")
	}
}
