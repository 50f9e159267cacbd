// Package enginetest is what the tests of runtimes over a container engine share:
// boxes that are gone after the test, agents that are killed at a point of the
// way, and what an ordinary build does.
package enginetest

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

// Patience bounds every wait of a test.
const Patience = 3 * time.Minute

// childEnv tells the test binary to play an agent (see Child); it is an Order.
const childEnv = "MAYFLY_ENGINE_CHILD"

// Bounded is a context for the whole test that outlives it for its cleanup.
func Bounded(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), Patience)
	t.Cleanup(cancel)
	return ctx
}

// Create makes a box and destroys it after the test.
func Create(t testing.TB, r sandbox.Runtime, name string, s sandbox.Spec) sandbox.Sandbox {
	t.Helper()
	DestroyAfter(t, r, name)
	b, err := r.Create(Bounded(t), name, s)
	if err != nil {
		t.Fatalf("create %s: %v", name, err)
	}
	return b
}

// DestroyAfter destroys the box after the test.
func DestroyAfter(t testing.TB, r sandbox.Runtime, name string) {
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), Patience)
		defer cancel()
		if err := r.Destroy(ctx, name); err != nil {
			t.Errorf("destroy %s: %v", name, err)
		}
	})
}

// Script runs a shell script in a box and returns what it printed.
func Script(t testing.TB, b sandbox.Sandbox, text string) (string, sandbox.Exit) {
	t.Helper()
	var out bytes.Buffer
	print := func(_ time.Time, p []byte) error { out.Write(p); return nil }
	exit, err := b.Run(Bounded(t), sandbox.Process{
		Args: []string{"/bin/sh", "-c", text}, Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"},
		Stdout: print, Stderr: print,
	})
	if err != nil {
		t.Fatalf("run %q: %v; it printed %s", text, err, out.String())
	}
	return out.String(), exit
}

// An Order is what the process that is killed has to do: make the box and, if it
// gets as far, destroy it; and to die at the point on its way.
type Order struct {
	State, Address, Image string // of the runtime
	Name, Point           string
	Spec                  sandbox.Spec
}

// Points beside those of the code.
const (
	PointMade    = "made"
	PointRunning = "running"
)

// Child is called by TestMain. In a process that Orphan started it makes a box
// and dies as by kill -9, and does not return; in others it does nothing.
func Child(open func(o Order, trace func(point string)) (sandbox.Runtime, error)) {
	if text := os.Getenv(childEnv); text != "" {
		fmt.Fprintln(os.Stderr, child(text, open))
		os.Exit(1)
	}
}

func child(text string, open func(Order, func(string)) (sandbox.Runtime, error)) error {
	var o Order
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		return err
	}
	trace := func(point string) {
		if point == o.Point {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {} // it is on its way
		}
	}
	r, err := open(o, trace)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	b, err := r.Create(ctx, o.Name, o.Spec)
	if err != nil {
		return err
	}
	trace(PointMade)
	if o.Point == PointRunning {
		_, err := b.Run(ctx, sandbox.Process{
			Args: []string{"/bin/sh", "-c", "setsid sleep 1000 & sleep 1000 & echo up; wait"}, Env: []string{"PATH=/usr/bin:/bin"},
			Stdout: func(time.Time, []byte) error { trace(PointRunning); return nil },
		})
		return errors.Join(err, errors.New("the run ended"))
	}
	return errors.Join(r.Destroy(ctx, o.Name), errors.New("it lives"))
}

// Orphan has an agent killed at the point of an order.
func Orphan(ctx context.Context, o Order) error {
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

// OfState lists what the boxes of a state directory have on the machine beside
// what the engine knows: directories, ids, loop devices and mounts.
func OfState(t testing.TB, state string) (out []string) {
	t.Helper()
	boxes, err := filepath.Glob(state + "/boxes/*")
	ids, idsErr := filepath.Glob(state + "/ids/*")
	loops, loopErr := filepath.Glob("/sys/block/loop*/loop/backing_file")
	mounts, mountErr := os.ReadFile("/proc/self/mountinfo")
	if err := errors.Join(err, idsErr, loopErr, mountErr); err != nil {
		t.Fatal(err)
	}
	for _, l := range loops {
		if b, err := os.ReadFile(l); err == nil && strings.HasPrefix(string(b), state) {
			out = append(out, l)
		}
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, state) {
			out = append(out, line)
		}
	}
	return append(append(out, boxes...), ids...)
}

// Eventually polls until ok.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(Bounded(t), time.Minute)
	defer cancel()
	if err := kernel.Poll(ctx, what, func() (bool, error) { return ok(), nil }); err != nil {
		t.Fatal(err)
	}
}

// Wait receives from c.
func Wait[T any](t testing.TB, what string, c <-chan T) (v T) {
	t.Helper()
	select {
	case v = <-c:
	case <-Bounded(t).Done():
		t.Fatal("not in time: " + what)
	}
	return v
}

// Sleeper starts a process in a box that prints a line when it has begun, and
// another when Wake was called.
func Sleeper(t testing.TB, b sandbox.Sandbox) (began <-chan struct{}, ended <-chan error) {
	t.Helper()
	up, end := make(chan struct{}), make(chan error, 1)
	go func() {
		lines := 0
		exit, err := b.Run(Bounded(t), sandbox.Process{
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

// Wake ends the process of Sleeper.
func Wake(t testing.TB, b sandbox.Sandbox) {
	t.Helper()
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	err := errors.Join(w.WriteHeader(&tar.Header{Name: "go", Mode: 0o644, Typeflag: tar.TypeReg}), w.Close())
	if err := errors.Join(err, b.Put(Bounded(t), sandbox.Workspace, io.Reader(&archive))); err != nil {
		t.Fatal(err)
	}
}

// PointsAreComplete wants every point of the code in the working directory among
// those that are known, so that none is forgotten.
func PointsAreComplete(t testing.TB, known []string) {
	t.Helper()
	text := strings.Join(known, " ") + " "
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, part := range strings.Split(string(b), `cfg.Trace("`)[1:] {
			point, _, _ := strings.Cut(part, `"`)
			if n++; !strings.HasSuffix(f, "_test.go") && !strings.Contains(text, point+" ") {
				t.Errorf("%s: point %q is not among the known", f, point)
			}
		}
	}
	if n < len(known)-1 {
		t.Errorf("got %d points in the code, want %d", n, len(known)-1)
	}
}
