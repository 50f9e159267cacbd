package docker

import (
	"fmt"
	"sync"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox"
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
				if err := orphan(bounded(t), order{State: cfg.StateDir, Host: d.Host(), Name: name, Point: pointMade, Spec: spec}); err != nil {
					t.Error(err)
				}
				if err := r.Destroy(bounded(t), name); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wait.Wait()
	nothingLeft(t, d, cfg.StateDir)
}
