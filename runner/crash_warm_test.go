//go:build failpoint

package runner_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/sandbox"
)

// A warm scene has one box ready before its job is offered, and has it replaced
// before the job's first step runs, so that a kill hits the making, the giving,
// the replacing and the draining of warm boxes.

// TestCrashWarm is the protocol alone.
func TestCrashWarm(t *testing.T) { crash(t, "warm fake") }

// TestCrashWarmReal is the same over native boxes, without a second kill: what
// recovery does there is what TestCrashReal kills.
func TestCrashWarmReal(t *testing.T) { crash(t, "warm real") }

// A waiter holds a job until a box is ready.
type waiter struct {
	status func() runner.Status // nil until there is an agent
	first  sync.Once
}

// makeWarm puts the waiter into the agent of a warm scene.
func (s *scene) makeWarm(cfg *runner.Config) *waiter {
	w := &waiter{}
	if !s.Warm {
		return w
	}
	cfg.Warm = runner.Warm{Boxes: 1}
	for name, p := range cfg.Providers {
		cfg.Providers[name] = late{p.(*counted), w}
	}
	for name, r := range cfg.Runtimes {
		puller, _ := r.(sandbox.Puller)
		cfg.Runtimes[name] = lateRuntime{r, puller, w}
	}
	return w
}

func (w *waiter) wait(ctx context.Context) {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for w.status().Warm == 0 {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

type late struct {
	*counted
	*waiter
}

func (p late) Poll(ctx context.Context) (providers.Offer, error) {
	p.wait(ctx)
	return p.counted.Poll(ctx)
}

type lateRuntime struct {
	sandbox.Runtime
	sandbox.Puller // nil if it is none; then no rule has an image
	*waiter
}

func (r lateRuntime) Pull(ctx context.Context, p sandbox.Pull) (sandbox.Image, error) {
	if r.Puller == nil {
		return sandbox.Image{}, nil
	}
	return r.Puller.Pull(ctx, p)
}

func (r lateRuntime) Create(ctx context.Context, name string, s sandbox.Spec) (sandbox.Sandbox, error) {
	box, err := r.Runtime.Create(ctx, name, s)
	if err != nil {
		return nil, err
	}
	return lateBox{box, box.(sandbox.Prober), r.waiter}, nil
}

type lateBox struct {
	sandbox.Sandbox
	sandbox.Prober
	*waiter
}

func (b lateBox) Run(ctx context.Context, p sandbox.Process) (sandbox.Exit, error) {
	b.first.Do(func() { b.wait(ctx) })
	return b.Sandbox.Run(ctx, p)
}
