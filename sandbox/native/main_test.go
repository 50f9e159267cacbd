package native

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/gvisor"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
	"github.com/mayfly-ci/mayfly/test/servertest"
)

// childEnv tells the test binary to play an agent (see child).
const childEnv = "MAYFLY_NATIVE_CHILD"

// runscEnv is where gVisor's runsc lies.
const runscEnv = "MAYFLY_NATIVE_RUNSC"

// patience bounds every wait of a test.
const patience = 3 * time.Minute

func TestMain(m *testing.M) {
	if role := os.Getenv(childEnv); role != "" {
		if err := child(role); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	runsc, err := servertest.Runsc(context.Background())
	if err := errors.Join(err, os.Setenv(runscEnv, runsc)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	for _, d := range cgroupTrees() {
		parent := filepath.Join(d, testParent(os.Getpid()))
		for _, p := range append(directories(parent+"/*"), parent) {
			_ = unix.Rmdir(p) // absent if no test made a box in this tree
		}
	}
	os.Exit(code)
}

// testParent is the cgroup parent of a test run. A child has that of the test.
func testParent(pid int) string { return "mayfly-test-" + strconv.Itoa(pid) }

func cgroupTrees() []string {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var out []string
	for line := range strings.Lines(string(info)) {
		if strings.Contains(line, " - cgroup") {
			out = append(out, strings.Fields(line)[4])
		}
	}
	return out
}

// directories are what matches a pattern and is a directory.
func directories(pattern string) []string {
	found, _ := filepath.Glob(pattern) // the patterns are well formed
	return slices.DeleteFunc(found, func(p string) bool {
		st, err := os.Stat(p)
		return err != nil || !st.IsDir()
	})
}

// guestProgram builds the guest once.
var guestProgram = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "mayfly-guest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(dir, "guest"), "../../cmd/mayfly-guest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the guest: %w: %s", err, out)
	}
	return os.ReadFile(filepath.Join(dir, "guest"))
})

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("these tests make namespaces, control groups and loop devices: run them as root")
	}
}

// config is that of a runtime with a state directory of its own.
func config(t testing.TB) Config {
	t.Helper()
	needRoot(t)
	g, err := guestProgram()
	if err != nil {
		t.Fatal(err)
	}
	return Config{
		StateDir: t.TempDir(), Owner: "test", Guest: g, CgroupParent: testParent(os.Getpid()), GVisor: gvisor.Config{Runsc: os.Getenv(runscEnv)},
		Limits: sandbox.Limits{Memory: 1 << 30, Pids: 512, MilliCPU: 2000, Disk: 2 << 30, Inodes: 200_000},
	}
}

func newRuntime(t testing.TB, cfg Config) *Runtime {
	t.Helper()
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
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
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
		defer cancel()
		if err := r.Destroy(ctx, name); err != nil {
			t.Errorf("destroy %s: %v", name, err)
		}
	})
	b, err := r.Create(bounded(t), name, s)
	if err != nil {
		t.Fatalf("create %s: %v", name, err)
	}
	return b
}

// script runs a shell script in a box and returns what it printed.
func script(t testing.TB, b sandbox.Sandbox, text string) (string, sandbox.Exit) {
	t.Helper()
	var out bytes.Buffer
	print := func(_ time.Time, p []byte) error { out.Write(p); return nil }
	exit, err := b.Run(bounded(t), sandbox.Process{
		Args:   []string{"/bin/sh", "-c", text},
		Env:    []string{"PATH=/usr/local/go/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "GOPROXY=off", "GOFLAGS=-mod=mod", "GOTOOLCHAIN=local"},
		Stdout: print, Stderr: print,
	})
	if err != nil {
		t.Fatalf("run %q: %v; it printed %s", text, err, out.String())
	}
	return out.String(), exit
}

// walled is a role of an agent whose box has a kernel of its own.
const walled = "gvisor "

func role(text string) (point string, wall sandbox.Isolation) {
	if point, ok := strings.CutPrefix(text, walled); ok {
		return point, sandbox.GVisor
	}
	return text, sandbox.Kernel
}

// child plays an agent in a process of its own: it makes a box named "box" in
// a state directory and, at the trace point in the role, dies as by kill -9.
func child(point string) error {
	g, err := os.ReadFile(os.Getenv("MAYFLY_NATIVE_GUEST"))
	if err != nil {
		return err
	}
	point, wall := role(point)
	die := func(at string) {
		if at == point {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {} // it is on its way
		}
	}
	cfg := Config{
		StateDir: os.Getenv("MAYFLY_NATIVE_STATE"), Owner: "test", Guest: g, Trace: die, GVisor: gvisor.Config{Runsc: os.Getenv(runscEnv)},
		CgroupParent: testParent(os.Getppid()), Unprivileged: os.Geteuid() != 0,
		Limits: sandbox.Limits{Disk: 64 << 20, Inodes: 4096, Pids: 64},
	}
	if point == "option" {
		return withoutOption(cfg)
	}
	r, err := New(cfg)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if point == "destroy" {
		return r.Destroy(ctx, "box")
	}
	b, err := r.Create(ctx, "box", sandbox.Spec{Labels: sandbox.Labels{Owner: "test", Job: "j", Generation: 1}, Isolation: wall})
	if err != nil {
		return err
	}
	if point == "run" {
		die := func(time.Time, []byte) error { die("run"); return nil }
		_, err := b.Run(ctx, sandbox.Process{
			Args:   []string{"/bin/sh", "-c", "setsid sleep 1000 & sleep 1000 & echo up; wait"},
			Env:    []string{"PATH=/usr/bin"},
			Stdout: die,
		})
		return errors.Join(err, errors.New("the run ended"))
	}
	if point == "unprivileged" {
		return unprivileged(ctx, r, b)
	}
	return r.Destroy(ctx, "box")
}

// agent starts the test binary as a child and returns how it ended.
func agent(t testing.TB, point, state string, attr *syscall.SysProcAttr) (*os.ProcessState, string) {
	t.Helper()
	g, err := guestProgram()
	if err != nil {
		t.Fatal(err)
	}
	open := filepath.Dir(t.TempDir()) // of mode 0700, and the child may be another user
	if err := os.Chmod(open, 0o755); err != nil {
		t.Fatal(err)
	}
	program, guest := filepath.Join(open, "agent"), filepath.Join(open, "guest")
	self, err := os.ReadFile("/proc/self/exe")
	if err := errors.Join(err, os.WriteFile(program, self, 0o755), os.WriteFile(guest, g, 0o755)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(bounded(t), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, program)
	cmd.Dir = "/"
	cmd.SysProcAttr = attr
	cmd.Env = append(os.Environ(), childEnv+"="+point, "MAYFLY_NATIVE_STATE="+state, "MAYFLY_NATIVE_GUEST="+guest)
	out, err := cmd.CombinedOutput()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return cmd.ProcessState, string(out)
}

// leftovers lists what a state directory's boxes have on the host: control
// groups, loop devices, id locks, directories and mounts.
func leftovers(t testing.TB, state string) []string {
	t.Helper()
	var out []string
	cfg := Config{StateDir: state, CgroupParent: testParent(os.Getpid())}
	group := cfg.groupParent()
	for _, pattern := range []string{state + "/boxes/*", state + "/ids/*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, found...)
	}
	for _, tree := range cgroupTrees() {
		out = append(out, directories(filepath.Join(tree, group, "*"))...)
	}
	loops, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
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
		if strings.Contains(line, state) || strings.Contains(line, "overlay rw,lowerdir=/usr/lower") {
			out = append(out, line)
		}
	}
	return out
}

// eventually polls until ok.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := kernel.Poll(ctx, what, func() (bool, error) { return ok(), nil }); err != nil {
		t.Fatal(err)
	}
}

func signalled(s *os.ProcessState) bool {
	w, ok := s.Sys().(syscall.WaitStatus)
	return ok && w.Signaled() && w.Signal() == unix.SIGKILL
}
