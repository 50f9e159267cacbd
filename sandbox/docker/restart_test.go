package docker

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/test/dockertest"
)

// sleeper starts a process in a box that prints a line when it has begun, and
// another when the file /workspace/go is there.
func sleeper(t *testing.T, b sandbox.Sandbox) (began <-chan struct{}, ended <-chan error) {
	t.Helper()
	up, end := make(chan struct{}), make(chan error, 1)
	go func() {
		lines := 0
		exit, err := b.Run(bounded(t), sandbox.Process{
			Args: []string{"/bin/sh", "-c", "echo up; while [ ! -e go ]; do sleep 0.05; done; echo went"}, Env: []string{"PATH=/bin"},
			Stdout: func(time.Time, []byte) error {
				if lines++; lines == 1 {
					close(up)
				}
				return nil
			},
		})
		if err == nil && (exit.Code != 0 || lines != 2) {
			err = errors.New("the process did not print both lines and end well")
		}
		end <- err
	}()
	return up, end
}

func wait[T any](t *testing.T, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-bounded(t).Done():
		t.Fatal("not in time: " + what)
		panic("unreachable")
	}
}

// TestDaemonKilled kills the daemon with SIGKILL while a box works, while it is
// released, and while there is none, and starts it again.
func TestDaemonKilled(t *testing.T) { each(t, daemonKilled) }

func daemonKilled(t *testing.T, e dockertest.Engine) {
	for _, keeps := range []bool{false, true} {
		name, options := "containers end", []string(nil)
		if keeps {
			name, options = "live-restore", []string{"--live-restore"}
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := e.Start(t, options...)
			cfg := config(t, d)
			cfg.Image = dockertest.Busybox
			r := newRuntime(t, cfg)
			t.Run("during a job", func(t *testing.T) { killedDuringJob(t, d, r, keeps) })
			t.Run("during release", func(t *testing.T) { killedDuringRelease(t, d, r) })
			t.Run("before a job", func(t *testing.T) { killedBeforeJob(t, d, r) })
			nothingLeft(t, d, cfg.StateDir)
		})
	}
}

func killedDuringJob(t *testing.T, d *dockertest.Daemon, r *Runtime, keeps bool) {
	b := create(t, r, "working", sandbox.Spec{})
	began, ended := sleeper(t, b)
	wait(t, "the process begins", began)
	if err := d.Kill(bounded(t)); err != nil {
		t.Fatal(err)
	}
	// The stream passes no daemon: transfers work while it is away.
	if _, err := b.Get(bounded(t), "/etc/hosts", 4096); err != nil {
		t.Errorf("Get while the daemon is away: %v", err)
	}
	if err := d.Restart(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if !keeps {
		if err := wait(t, "the process ends", ended); !errors.Is(err, sandbox.ErrDied) {
			t.Errorf("Run across a restart that ends containers: got %v, want ErrDied", err)
		}
		return
	}
	if err := b.Put(bounded(t), sandbox.Workspace, empty("go")); err != nil {
		t.Fatal(err)
	}
	if err := wait(t, "the process ends", ended); err != nil {
		t.Errorf("Run across a restart that keeps containers: %v", err)
	}
	if out, exit := script(t, b, "echo next"); exit.Code != 0 || out != "next\n" {
		t.Errorf("the next process: got %q %+v", out, exit)
	}
}

// killedDuringRelease: what runs ends without the daemon, and Destroy insists
// until it is back.
func killedDuringRelease(t *testing.T, d *dockertest.Daemon, r *Runtime) {
	b := create(t, r, "released", sandbox.Spec{})
	began, ended := sleeper(t, b)
	wait(t, "the process begins", began)
	if err := d.Kill(bounded(t)); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(bounded(t), 300*time.Millisecond)
	defer cancel()
	if err := r.Destroy(short, "released"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Destroy while the daemon is away: got %v, want the end of its context", err)
	}
	if err := wait(t, "the process ends", ended); !errors.Is(err, sandbox.ErrDied) {
		t.Errorf("Run of a box that is destroyed: got %v, want ErrDied", err)
	}
	destroyed := make(chan error, 1)
	go func() { destroyed <- r.Destroy(bounded(t), "released") }()
	if err := d.Restart(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if err := wait(t, "the box is destroyed", destroyed); err != nil {
		t.Error(err)
	}
	// And when it dies in the middle of it.
	create(t, r, "released-too", sandbox.Spec{})
	go func() { destroyed <- r.Destroy(bounded(t), "released-too") }()
	if err := d.Kill(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if err := d.Restart(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if err := wait(t, "the box is destroyed", destroyed); err != nil {
		t.Error(err)
	}
}

// killedBeforeJob: Create waits for a daemon that is restarted.
func killedBeforeJob(t *testing.T, d *dockertest.Daemon, r *Runtime) {
	if err := d.Kill(bounded(t)); err != nil {
		t.Fatal(err)
	}
	made := make(chan error, 1)
	destroyAfter(t, r, "waits")
	go func() { _, err := r.Create(bounded(t), "waits", sandbox.Spec{}); made <- err }()
	if err := d.Restart(bounded(t)); err != nil {
		t.Fatal(err)
	}
	if err := wait(t, "the box is made", made); err != nil {
		t.Errorf("Create across a restart: %v", err)
	}
}
