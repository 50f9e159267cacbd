package docker

import (
	"fmt"
	"sync"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine/enginetest"
	"github.com/mayfly-ci/mayfly/test/dockertest"
)

// TestRemovedAsItEnds: a container that ends by itself, for its agent is dead,
// while the next agent removes it, leaves neither its parent process nor control
// groups.
func TestRemovedAsItEnds(t *testing.T) { each(t, removedAsItEnds) }

func removedAsItEnds(t *testing.T, e dockertest.Engine) {
	d := e.Start(t)
	cfg := config(t, d)
	r := newRuntime(t, cfg)
	spec := sandbox.Spec{Image: dockertest.Busybox}
	var wait sync.WaitGroup
	for lane := range 6 {
		wait.Go(func() {
			for i := range 10 {
				name := fmt.Sprintf("ends-%d-%d", lane, i)
				if err := enginetest.Orphan(enginetest.Bounded(t), enginetest.Order{State: cfg.StateDir, Address: d.Host(), Image: cfg.Image, Name: name, Point: enginetest.PointMade, Spec: spec}); err != nil {
					t.Error(err)
				}
				if err := r.Destroy(enginetest.Bounded(t), name); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wait.Wait()
	nothingLeft(t, d, cfg.StateDir)
}
