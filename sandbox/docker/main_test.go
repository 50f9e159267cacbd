package docker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
	"github.com/mayfly-ci/mayfly/test/dockertest"
)

// childEnv tells the test binary to play an agent (see child); it is an order.
const childEnv = "MAYFLY_DOCKER_CHILD"

// patience bounds every wait of a test.
const patience = 3 * time.Minute

func TestMain(m *testing.M) {
	if text := os.Getenv(childEnv); text != "" {
		fmt.Fprintln(os.Stderr, child(text))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("these tests start a daemon and enter its containers: run them as root")
	}
}

// config is that of a runtime with a state directory of its own.
func config(t testing.TB, d *dockertest.Daemon) Config {
	t.Helper()
	needRoot(t)
	c, err := testConfig(t.TempDir(), d.Host())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func testConfig(state, host string) (Config, error) {
	program, err := guest.Binary()
	return Config{
		StateDir: state, Owner: "test", Guest: program, Host: host, Image: dockertest.Debian,
		Limits: sandbox.Limits{Memory: 512 << 20, Pids: 512, MilliCPU: 2000, Disk: 1 << 30, Inodes: 50_000},
	}, err
}

func newRuntime(t testing.TB, cfg Config) *Runtime {
	t.Helper()
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// bounded is a context for the whole test that outlives it for its cleanup.
func bounded(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	t.Cleanup(cancel)
	return ctx
}

// create makes a box and destroys it after the test.
func create(t testing.TB, r *Runtime, name string, s sandbox.Spec) sandbox.Sandbox {
	t.Helper()
	destroyAfter(t, r, name)
	b, err := r.Create(bounded(t), name, s)
	if err != nil {
		t.Fatalf("create %s: %v", name, err)
	}
	return b
}

func destroyAfter(t testing.TB, r *Runtime, name string) {
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
		defer cancel()
		if err := r.Destroy(ctx, name); err != nil {
			t.Errorf("destroy %s: %v", name, err)
		}
	})
}

// script runs a shell script in a box and returns what it printed.
func script(t testing.TB, b sandbox.Sandbox, text string) (string, sandbox.Exit) {
	t.Helper()
	var out bytes.Buffer
	print := func(_ time.Time, p []byte) error { out.Write(p); return nil }
	exit, err := b.Run(bounded(t), sandbox.Process{
		Args: []string{"/bin/sh", "-c", text}, Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"},
		Stdout: print, Stderr: print,
	})
	if err != nil {
		t.Fatalf("run %q: %v; it printed %s", text, err, out.String())
	}
	return out.String(), exit
}

// An order is what the process that is killed has to do: make the box and, if it
// gets as far, destroy it; and to die at the point on its way.
type order struct {
	State, Host, Name, Point string
	Spec                     sandbox.Spec
}

// Points beside those of the code.
const (
	pointMade    = "made"
	pointRunning = "running"
)

// child makes a box and dies as by kill -9.
func child(text string) error {
	var o order
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		return err
	}
	cfg, err := testConfig(o.State, o.Host)
	if err != nil {
		return err
	}
	cfg.Trace = func(point string) {
		if point == o.Point {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {} // it is on its way
		}
	}
	r, err := New(cfg)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	b, err := r.Create(ctx, o.Name, o.Spec)
	if err != nil {
		return err
	}
	cfg.Trace(pointMade)
	if o.Point == pointRunning {
		_, err := b.Run(ctx, sandbox.Process{
			Args: []string{"/bin/sh", "-c", "setsid sleep 1000 & sleep 1000 & echo up; wait"}, Env: []string{"PATH=/usr/bin:/bin"},
			Stdout: func(time.Time, []byte) error { cfg.Trace(pointRunning); return nil },
		})
		return errors.Join(err, errors.New("the run ended"))
	}
	return errors.Join(r.Destroy(ctx, o.Name), errors.New("it lives"))
}

// orphan has an agent killed at the point of an order.
func orphan(ctx context.Context, o order) error {
	text, err := json.Marshal(o)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+string(text))
	out, err := cmd.CombinedOutput()
	if w, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || w.Signal() != syscall.SIGKILL {
		return fmt.Errorf("agent ended with %w, want killed at %s: %s", err, o.Point, out)
	}
	return nil
}

// leftovers lists what the boxes of a state directory, on a daemon of the test's
// own, have on the machine.
func leftovers(t testing.TB, d *dockertest.Daemon, state string) []string {
	t.Helper()
	out, err := d.Left(bounded(t))
	boxes, globErr := filepath.Glob(state + "/boxes/*")
	loops, loopErr := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err := errors.Join(err, globErr, loopErr); err != nil {
		t.Fatal(err)
	}
	for _, l := range loops {
		if b, err := os.ReadFile(l); err == nil && strings.HasPrefix(string(b), state) {
			out = append(out, l)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, state) {
			out = append(out, line)
		}
	}
	return append(out, boxes...)
}

// nothingLeft wants the machine as it was.
func nothingLeft(t testing.TB, d *dockertest.Daemon, state string) {
	t.Helper()
	var left []string
	ctx, cancel := context.WithTimeout(bounded(t), 10*time.Second)
	defer cancel()
	// The daemon lets go of its mounts and of the parent of a container behind
	// its answer.
	if err := kernel.Poll(ctx, "nothing is left", func() (bool, error) {
		left = leftovers(t, d, state)
		return len(left) == 0, nil
	}); err != nil {
		t.Errorf("after Destroy: %q is left", left)
	}
}

// eventually polls until ok.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(bounded(t), time.Minute)
	defer cancel()
	if err := kernel.Poll(ctx, what, func() (bool, error) { return ok(), nil }); err != nil {
		t.Fatal(err)
	}
}
