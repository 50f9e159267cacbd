package containerd

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine"
	"github.com/mayfly-ci/mayfly/sandbox/engine/enginetest"
	"github.com/mayfly-ci/mayfly/sandbox/sandboxtest"
	"github.com/mayfly-ci/mayfly/test/containerdtest"
)

// TestGVisor: the runtime keeps its contract with gVisor's kernel, too.
func TestGVisor(t *testing.T) {
	for _, v := range containerdtest.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			d := containerdtest.Start(t, v)
			cfg := config(t, d)
			t.Cleanup(func() { nothingLeft(t, d, cfg.StateDir) })
			r := newRuntime(t, cfg)
			id := func(name string) string { return "/mayfly-" + r.id(name) }
			enginetest.GVisor(t, enginetest.World{
				Runtime: r, ID: id, FirstID: defaultFirst, NothingLeft: func(t testing.TB) { nothingLeft(t, d, cfg.StateDir) },
			})
			t.Run("killed agent", func(t *testing.T) { killedAgents(t, d, sandbox.GVisor, points()[10:15]) })
			t.Run("stopped kernel", func(t *testing.T) { stoppedKernel(t, r, id("stopped")) })
			t.Run("broken", func(t *testing.T) { brokenRunsc(t, d) })
			t.Run("killed daemon", func(t *testing.T) { killedDuringJob(t, d, r, sandbox.GVisor) })
			if v != containerdtest.Newer { // as much as differs has been seen
				return
			}
			h := enginetest.Behind(harness(t, d, cfg), func(name string) []int { return enginetest.Processes(id(name)) })
			sandboxtest.Run(t, func(*testing.T) sandboxtest.Harness { return h })
		})
	}
}

// stoppedKernel: a kernel that heeds nothing any more ends with its agent all the
// same, for the keeper sees that.
func stoppedKernel(t *testing.T, r *Runtime, id string) {
	b := enginetest.Create(t, r, "stopped", sandbox.Spec{Isolation: sandbox.GVisor}).(*engine.Box)
	enginetest.Script(t, b, "true")
	for _, pid := range enginetest.Parts(t, id)[enginetest.Sentry] {
		if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Kernel.Close(); err != nil { // as the death of the agent does
		t.Error(err)
	}
	enginetest.Eventually(t, "processes end without help", func() bool { return len(enginetest.Processes(id)) == 0 })
}

// brokenRunsc: what is no gVisor gives no box, says why, and is told by Check.
func brokenRunsc(t *testing.T, d *containerdtest.Daemon) {
	cfg := config(t, d)
	cfg.Image = containerdtest.Busybox
	// A script without an interpreter in the yard: it says its version here, and
	// cannot be run there.
	cfg.GVisor.Runsc = filepath.Join(t.TempDir(), "runsc")
	script := []byte("#!/bin/sh\necho 'runsc version release-20260905.0'\n")
	if err := errors.Join(os.WriteFile(cfg.GVisor.Runsc, script, 0o600), os.Chmod(cfg.GVisor.Runsc, 0o755)); err != nil {
		t.Fatal(err)
	}
	r := newRuntime(t, cfg)
	enginetest.DestroyAfter(t, r, "broken")
	if _, err := r.Create(enginetest.Bounded(t), "broken", sandbox.Spec{Isolation: sandbox.GVisor}); err == nil || !strings.Contains(err.Error(), "start runsc") {
		t.Errorf("Create: got %v, want what the keeper said", err)
	}
	claims, err := r.Check(enginetest.Bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	if c := claims[len(claims)-1]; c.Name != "gvisor" || c.Enforced || !strings.Contains(c.Detail, "start runsc") {
		t.Errorf("Check: got %+v, want gvisor not to be had, and why", c)
	}
	cfg.GVisor.Runsc = "runsc"
	if _, err := New(cfg); err == nil {
		t.Error("New with a relative path: got nil, want an error")
	}
}
