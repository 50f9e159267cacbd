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

// An agent whose policy it does not understand does not start, and takes no job.
func TestPolicyThatIsNone(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct{ text, want string }{
		"unknown key": {agenttest.Policy + "    egres: []\n", "policy.yaml:7"},
		"empty":       {"", "policy.yaml"},
		"binary":      {"\x00\x01\x02", "policy.yaml"},
		"no rules":    {"version: 1\nrules: []\n", "policy.yaml:2"},
		"large":       {strings.Repeat("# comment\n", 10<<20/10), "policy.yaml"},
		"absent":      {"", "policy.yaml"},
		"a directory": {"", "policy.yaml"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := agenttest.New(t, agenttest.Config{})
			w.SetPolicy(t, c.text)
			path := filepath.Join(w.Dir, "policy.yaml")
			if name == "absent" || name == "a directory" {
				agenttest.Must(t, os.Remove(path))
			}
			if name == "a directory" {
				agenttest.Must(t, os.Mkdir(path, 0o755))
			}
			id := w.Submit(t, w.Workflow(t, "job", "      - run: echo begun\n"))
			a := w.Launch(t)
			if code := a.Wait(t, time.Minute); code != 2 {
				t.Errorf("exit status %d, want 2", code)
			}
			if !strings.Contains(a.Log(), c.want) {
				t.Errorf("it said %q, want %q", a.Log(), c.want)
			}
			if _, err := os.Stat(filepath.Join(w.Spool, "new", id+".json")); err != nil {
				t.Errorf("the job does not wait any more: %v", err)
			}
			agenttest.Must(t, os.RemoveAll(path))
			w.SetPolicy(t, agenttest.Policy)
			a = w.Start(t)
			ends(t, w, id, providers.Success, "")
			a.Stop(t)
		})
	}
}

func TestTwoAgentsOnOneState(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, agenttest.Config{})
	first := w.Start(t)
	second := w.Launch(t)
	if code := second.Wait(t, time.Minute); code == 0 || !strings.Contains(second.Log(), "in use by another agent") {
		t.Errorf("the second agent: status %d, %s; want it to refuse and say why", code, second.Log())
	}
	w.Good(t)
	first.Stop(t)
	owesNothing(t, w)
}

// The first SIGTERM waits for what runs and takes nothing new.
func TestDrain(t *testing.T) {
	t.Parallel()
	// With a second slot it could take the late job before it hears the signal.
	w := agenttest.New(t, agenttest.Config{Slots: 1})
	a := w.Start(t)
	flow := w.Workflow(t, "long", "      - run: echo begun; sleep 5; echo done\n")
	id := begins(t, w, flow)
	a.Signal(t, syscall.SIGTERM)
	late := w.Submit(t, flow)
	if code := a.Wait(t, time.Minute); code != 0 {
		t.Errorf("exit status %d, want 0", code)
	}
	ends(t, w, id, providers.Success, "")
	if _, err := os.Stat(filepath.Join(w.Spool, "new", late+".json")); err != nil {
		t.Errorf("the job that came after the signal does not wait: %v", err)
	}
	owesNothing(t, w)
	a = w.Start(t)
	ends(t, w, late, providers.Success, "")
	a.Stop(t)
}

// The second one cancels, and still leaves nothing.
func TestSecondSignal(t *testing.T) {
	t.Parallel()
	w := agenttest.New(t, agenttest.Config{})
	a := w.Start(t)
	id := begins(t, w, w.Workflow(t, "long", "      - run: echo begun; trap '' TERM; sleep 60\n"))
	a.Signal(t, syscall.SIGTERM)
	if agenttest.Within(time.Second, a.Over) {
		t.Errorf("the first signal did not wait for the job")
	}
	a.Signal(t, syscall.SIGTERM)
	if code := a.Wait(t, time.Minute); code != 0 {
		t.Errorf("exit status %d, want 0: nothing is owed", code)
	}
	ends(t, w, id, providers.Cancelled, "told to stop")
	owesNothing(t, w)
}

func TestCancel(t *testing.T) {
	w := agenttest.New(t, agenttest.Config{})
	a := w.Start(t)
	id := begins(t, w, w.Workflow(t, "long", "      - run: echo begun; sleep 60\n      - run: echo never\n"))
	begun := time.Now()
	agenttest.Must(t, local.Cancel(w.Spool, id))
	ends(t, w, id, providers.Cancelled, "")
	if took := time.Since(begun); took > 30*time.Second {
		t.Errorf("it took %v, want it soon and not when the step ends", took)
	}
	if strings.Contains(w.Log(t, id), "\nnever") {
		t.Errorf("a step ran after the cancellation: %s", w.Log(t, id))
	}
	w.Good(t)
	a.Stop(t)
	owesNothing(t, w)
}
