package docker

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine/enginetest"
	"github.com/mayfly-ci/mayfly/sandbox/sandboxtest"
	"github.com/mayfly-ci/mayfly/test/dockertest"
)

// TestGVisor: the runtime keeps its contract with gVisor's kernel, too.
func TestGVisor(t *testing.T) {
	each(t, func(t *testing.T, e dockertest.Engine) {
		d := withUsers(t, e)
		cfg := config(t, d)
		t.Cleanup(func() { nothingLeft(t, d, cfg.StateDir) })
		r := newRuntime(t, cfg)
		id := func(name string) string { return containerID(d, name) }
		enginetest.GVisor(t, enginetest.World{
			Runtime: r, ID: id, FirstID: dockertest.RemappedID, NothingLeft: func(t testing.TB) { nothingLeft(t, d, cfg.StateDir) },
		})
		t.Run("killed agent", func(t *testing.T) { killedAgents(t, d, sandbox.Spec{Isolation: sandbox.GVisor}, points()[5:10]) })
		if e.Name != dockertest.Newer().Name { // as much as differs has been seen
			return
		}
		h := enginetest.Behind(harness(t, d, cfg), func(name string) []int { return enginetest.Processes(id(name)) })
		sandboxtest.Run(t, func(*testing.T) sandboxtest.Harness { return h })
	})
}

// TestGVisorRefused: a container that may mount is not made where root of it is root
// of the machine.
func TestGVisorRefused(t *testing.T) {
	d := dockertest.Start(t)
	cfg := config(t, d)
	for _, c := range []struct {
		wall sandbox.Isolation
		want string
	}{{sandbox.GVisor, "userns-remap"}, {"kata", "this runtime has"}} {
		_, err := newRuntime(t, cfg).Create(enginetest.Bounded(t), "box", sandbox.Spec{Isolation: c.wall})
		if !errors.Is(err, sandbox.ErrUnsupported) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("isolation %q: got %v, want ErrUnsupported and %q", c.wall, err, c.want)
		}
	}
	nothingLeft(t, d, cfg.StateDir)
	cfg.GVisor.Runsc = ""
	if _, err := newRuntime(t, cfg).Create(enginetest.Bounded(t), "box", sandbox.Spec{Isolation: sandbox.GVisor}); !errors.Is(err, sandbox.ErrUnsupported) || !strings.Contains(err.Error(), "no runsc is configured") {
		t.Errorf("without runsc: got %v, want ErrUnsupported, and what to do", err)
	}
	nothingLeft(t, d, cfg.StateDir)
}

// containerID is that of a box, or what no group is called.
func containerID(d *dockertest.Daemon, name string) string {
	c, err := d.Engine().ContainerInspect(context.Background(), name)
	if err != nil {
		return "none"
	}
	return c.ID
}
