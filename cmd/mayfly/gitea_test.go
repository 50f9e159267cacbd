package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/configs"
	"github.com/mayfly-ci/mayfly/providers/gitea/fakegitea"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/audit"
)

// heap is an audit that nobody reads.
type heap struct{}

func (heap) Append(context.Context, audit.Event) error { return nil }

// The doctor asks the instance and registers nothing; an agent that does is
// known by its kept registration, also to a doctor beside it.
func TestDoctorAsksGitea(t *testing.T) {
	t.Parallel()
	forge, err := fakegitea.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(forge.Violations(), forge.Close()); err != nil {
			t.Error(err)
		}
	})
	dir := t.TempDir()
	config, err := configs.Parse([]byte("version: 1\npolicy: p\nproviders:\n  forge:\n    type: gitea\n    url: "+forge.URL()+"\n    token_file: token\n    labels: [linux]\n"), filepath.Join(dir, "agent.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "token"), []byte(fakegitea.RegistrationToken+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	look := func(open func(string) (*runner.State, error)) (*wiring, finding) {
		t.Helper()
		state, err := open(filepath.Join(dir, "state"))
		if err != nil {
			t.Fatal(err)
		}
		w := &wiring{config: config, state: state, agent: runner.Config{Audit: heap{}}}
		if err := errors.Join(w.outbound(w.agent.Audit), w.providers()); err != nil {
			t.Fatal(err)
		}
		return w, examineProvider(t.Context(), "forge", w.agent.Providers["forge"])
	}
	w, f := look(runner.OpenState)
	if f.State != stateOK || !strings.Contains(f.Detail, "will register") || len(forge.Runners()) != 0 {
		t.Errorf("before the first start: %+v, want to hear that the agent will register", f)
	}
	if _, err := w.agent.Providers["forge"].Poll(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, f = look(runner.PeekState); f.State != stateOK || !strings.Contains(f.Detail, "registered as ") {
		t.Errorf("beside the agent: %+v, want to hear that it is registered", f)
	}
	forge.DeleteRunners()
	if _, f = look(runner.PeekState); f.State != stateMissing || !strings.Contains(f.Detail, "does not know this runner") {
		t.Errorf("of a deleted runner: %+v, want it to be missing", f)
	}
	if err := forge.Down(); err != nil {
		t.Fatal(err)
	}
	if _, f = look(runner.PeekState); f.State != stateMissing || !strings.Contains(f.Detail, "connection refused") {
		t.Errorf("while the instance is down: %+v, want it to be missing", f)
	}
	raw, err := os.ReadFile(filepath.Join(dir, "state", "safe", "provider-forge"))
	if err != nil || strings.Contains(string(raw), "token") {
		t.Errorf("the registration on disk: %q, %v; want it sealed", raw, err)
	}
	if err := w.state.Close(); err != nil {
		t.Error(err)
	}
}
