package containerd

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine/enginetest"
	"github.com/mayfly-ci/mayfly/test/containerdtest"
)

// TestDaemonKilled kills the daemon with SIGKILL while a box works, while it is
// released, and while there is none, and starts it again.
func TestDaemonKilled(t *testing.T) {
	for _, v := range containerdtest.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			d := containerdtest.Start(t, v)
			cfg := config(t, d)
			cfg.Image = containerdtest.Busybox
			r := newRuntime(t, cfg)
			t.Run("during a job", func(t *testing.T) { killedDuringJob(t, d, r, sandbox.Kernel) })
			t.Run("during release", func(t *testing.T) { killedDuringRelease(t, d, r) })
			t.Run("before a job", func(t *testing.T) { killedBeforeJob(t, d, r) })
			t.Run("while it makes a box", func(t *testing.T) { killedDuringCreate(t, d, cfg) })
			nothingLeft(t, d, cfg.StateDir)
		})
	}
}

func killedDuringJob(t *testing.T, d *containerdtest.Daemon, r *Runtime, wall sandbox.Isolation) {
	b := enginetest.Create(t, r, "working", sandbox.Spec{Isolation: wall})
	began, ended := enginetest.Sleeper(t, b)
	enginetest.Wait(t, "the process begins", began)
	if err := d.Kill(enginetest.Bounded(t)); err != nil {
		t.Fatal(err)
	}
	// The stream passes no daemon: transfers work while it is away.
	if _, err := b.Get(enginetest.Bounded(t), "/etc/hosts", 4096); err != nil {
		t.Errorf("Get while the daemon is away: %v", err)
	}
	if err := d.Restart(enginetest.Bounded(t)); err != nil {
		t.Fatal(err)
	}
	enginetest.Wake(t, b)
	if err := enginetest.Wait(t, "the process ends", ended); err != nil {
		t.Errorf("Run across a restart: %v", err)
	}
	if out, exit := enginetest.Script(t, b, "echo next"); exit.Code != 0 || out != "next\n" {
		t.Errorf("the next process: got %q %+v", out, exit)
	}
}

// killedDuringRelease: what runs ends without the daemon, and Destroy insists
// until it is back.
func killedDuringRelease(t *testing.T, d *containerdtest.Daemon, r *Runtime) {
	b := enginetest.Create(t, r, "released", sandbox.Spec{})
	began, ended := enginetest.Sleeper(t, b)
	enginetest.Wait(t, "the process begins", began)
	if err := d.Kill(enginetest.Bounded(t)); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(enginetest.Bounded(t), 300*time.Millisecond)
	defer cancel()
	if err := r.Destroy(short, "released"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Destroy while the daemon is away: got %v, want the end of its context", err)
	}
	if err := enginetest.Wait(t, "the process ends", ended); !errors.Is(err, sandbox.ErrDied) {
		t.Errorf("Run of a box that is destroyed: got %v, want ErrDied", err)
	}
	destroyed := make(chan error, 1)
	go func() { destroyed <- r.Destroy(enginetest.Bounded(t), "released") }()
	if err := d.Restart(enginetest.Bounded(t)); err != nil {
		t.Fatal(err)
	}
	if err := enginetest.Wait(t, "the box is destroyed", destroyed); err != nil {
		t.Error(err)
	}
	// And when it dies in the middle of it.
	enginetest.Create(t, r, "released-too", sandbox.Spec{})
	go func() { destroyed <- r.Destroy(enginetest.Bounded(t), "released-too") }()
	if err := d.Kill(enginetest.Bounded(t)); err != nil {
		t.Fatal(err)
	}
	if err := d.Restart(enginetest.Bounded(t)); err != nil {
		t.Fatal(err)
	}
	if err := enginetest.Wait(t, "the box is destroyed", destroyed); err != nil {
		t.Error(err)
	}
}

// killedBeforeJob: Create waits for a daemon that is restarted.
func killedBeforeJob(t *testing.T, d *containerdtest.Daemon, r *Runtime) {
	if err := d.Kill(enginetest.Bounded(t)); err != nil {
		t.Fatal(err)
	}
	made := make(chan error, 1)
	enginetest.DestroyAfter(t, r, "waits")
	go func() { _, err := r.Create(enginetest.Bounded(t), "waits", sandbox.Spec{}); made <- err }()
	if err := d.Restart(enginetest.Bounded(t)); err != nil {
		t.Fatal(err)
	}
	if err := enginetest.Wait(t, "the box is made", made); err != nil {
		t.Errorf("Create across a restart: %v", err)
	}
}

// killedDuringCreate: the daemon dies while it makes the container. Create fails
// and says so, and Destroy removes what came of it.
func killedDuringCreate(t *testing.T, d *containerdtest.Daemon, cfg Config) {
	for _, point := range []string{"containerd.leased", "containerd.created", "containerd.asked", "containerd.asking", "containerd.answered"} {
		at := make(chan struct{})
		come := sync.OnceFunc(func() { close(at) }) // Destroy may ask again
		cfg.Trace = func(p string) {
			if p == point {
				come()
			}
		}
		r := newRuntime(t, cfg)
		made := make(chan error, 1)
		go func() { _, err := r.Create(enginetest.Bounded(t), "unlucky", sandbox.Spec{}); made <- err }()
		enginetest.Wait(t, "the point comes", at)
		if err := d.Kill(enginetest.Bounded(t)); err != nil {
			t.Fatal(err)
		}
		err := enginetest.Wait(t, "Create ends", made)
		t.Logf("killed at %s: %v", point, err) // it may have been a little late
		if err := d.Restart(enginetest.Bounded(t)); err != nil {
			t.Fatal(err)
		}
		if err := r.Destroy(enginetest.Bounded(t), "unlucky"); err != nil {
			t.Errorf("Destroy after the daemon was killed at %s: %v", point, err)
		}
		nothingLeft(t, d, cfg.StateDir)
	}
}
