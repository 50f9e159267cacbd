package sandboxtest_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/gvisor"
	"github.com/mayfly-ci/mayfly/sandbox/native"
	"github.com/mayfly-ci/mayfly/sandbox/sandboxtest"
	"github.com/mayfly-ci/mayfly/test/dockertest"
	"github.com/mayfly-ci/mayfly/test/servertest"
)

// The environment of a process that the tests start from their own binary.
const (
	orphanEnv = "MAYFLY_TEST_ORPHAN" // an order: make a box and die
	userEnv   = "MAYFLY_TEST_USER"   // a state directory: run the suite as an ordinary user
	probeEnv  = "MAYFLY_TEST_PROBE"  // where the probe lies, for that
	runscEnv  = "MAYFLY_TEST_RUNSC"  // where runsc lies
)

// An order is what the process that is killed after it made a box has to make.
type order struct {
	State, Parent, Name string
	Spec                sandbox.Spec
}

func TestMain(m *testing.M) {
	if text := os.Getenv(orphanEnv); text != "" {
		fmt.Fprintln(os.Stderr, orphan(text))
		os.Exit(1)
	}
	if os.Getenv(userEnv) == "" {
		runsc, err := servertest.Runsc(context.Background())
		if err := errors.Join(err, os.Setenv(runscEnv, runsc)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	code := m.Run()
	if os.Geteuid() == 0 {
		// Empty groups of the runtimes' parents, in whichever tree they are.
		for _, pattern := range []string{"/sys/fs/cgroup/*/" + parent() + "/*", "/sys/fs/cgroup/" + parent() + "/*", "/sys/fs/cgroup/*/" + parent(), "/sys/fs/cgroup/" + parent()} {
			found, _ := filepath.Glob(pattern) // the patterns are well formed
			for _, p := range found {
				_ = syscall.Rmdir(p) // files of a group cannot be removed and need not be
			}
		}
	}
	os.Exit(code)
}

func parent() string { return "mayfly-suite-" + strconv.Itoa(os.Getpid()) }

// orphan makes a box and dies as by kill -9.
func orphan(text string) error {
	var o order
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		return err
	}
	r, err := newNative(o.State, o.Parent)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := r.Create(ctx, o.Name, o.Spec); err != nil {
		return err
	}
	return syscall.Kill(os.Getpid(), syscall.SIGKILL)
}

func newNative(state, parent string) (*native.Runtime, error) {
	program, err := guest.Binary()
	if err != nil {
		return nil, err
	}
	root := os.Geteuid() == 0
	disk := int64(1 << 30)
	if !root {
		disk = 128 << 20 // which is memory
	}
	return native.New(native.Config{
		StateDir: state, Owner: "suite", Guest: program, CgroupParent: parent, Unprivileged: !root, GVisor: gvisor.Config{Runsc: os.Getenv(runscEnv)},
		Limits: sandbox.Limits{Memory: 512 << 20, Pids: 512, MilliCPU: 2000, Disk: disk, Inodes: 50_000},
	})
}

var probe = sync.OnceValues(func() ([]byte, error) {
	if p := os.Getenv(probeEnv); p != "" {
		return os.ReadFile(p)
	}
	return sandboxtest.BuildProbe(context.Background())
})

// harness is that of a runtime with a state directory.
func harness(t *testing.T, state string) sandboxtest.Harness {
	t.Helper()
	program, err := probe()
	if err != nil {
		t.Fatal(err)
	}
	r, err := newNative(state, parent())
	if err != nil {
		t.Fatal(err)
	}
	h := sandboxtest.Harness{
		Runtime: r, Owner: "suite", Probe: program,
		Again: func() (sandbox.Runtime, error) { return newNative(state, parent()) },
	}
	if os.Geteuid() != 0 {
		h.Unenforced = []string{"memory limit", "cpu limit", "user id range", "base"}
	}
	h.Orphan = func(ctx context.Context, name string, s sandbox.Spec) error {
		text, err := json.Marshal(order{state, parent(), name, s})
		if err != nil {
			return err
		}
		cmd := exec.CommandContext(ctx, "/proc/self/exe")
		cmd.Env = append(os.Environ(), orphanEnv+"="+string(text))
		out, err := cmd.CombinedOutput()
		if w, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || w.Signal() != syscall.SIGKILL {
			return fmt.Errorf("agent ended with %w: %s", err, out)
		}
		return nil
	}
	return h
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("these tests make namespaces, control groups and loop devices: run them as root")
	}
}

// TestNative: the runtime keeps its contract.
func TestNative(t *testing.T) {
	if os.Getenv(userEnv) == "" {
		needRoot(t)
	}
	t.Parallel()
	state := os.Getenv(userEnv)
	if state == "" {
		state = t.TempDir()
	}
	h := harness(t, state)
	sandboxtest.Run(t, func(*testing.T) sandboxtest.Harness { return h })
}

// TestNativeImage: and so it does over an image, which "docker save" wrote.
func TestNativeImage(t *testing.T) {
	if os.Getenv(userEnv) != "" {
		return
	}
	t.Parallel()
	needRoot(t)
	h := imageHarness(t)
	sandboxtest.Run(t, func(*testing.T) sandboxtest.Harness { return h })
}

// imageHarness is that of a runtime whose boxes are made of an image.
func imageHarness(t *testing.T) sandboxtest.Harness {
	t.Helper()
	archive := filepath.Join(t.TempDir(), "debian.tar")
	f, err := os.Create(archive)
	if err == nil {
		err = errors.Join(dockertest.Start(t).Save(t.Context(), f, dockertest.Debian), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	h := harness(t, t.TempDir())
	img, err := h.Runtime.(*native.Runtime).Images().Import(t.Context(), archive, "")
	if err != nil {
		t.Fatal(err)
	}
	h.Image = img.Ref
	return h
}

// TestNativeOrdinaryUser: and it does for an ordinary user, but for the clauses
// that Check says do not hold.
func TestNativeOrdinaryUser(t *testing.T) {
	if os.Getenv(userEnv) != "" {
		return // we are that user
	}
	t.Parallel()
	needRoot(t)
	program, err := probe()
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	dir, state := t.TempDir(), t.TempDir()
	binary, probe := filepath.Join(dir, "suite"), filepath.Join(dir, "probe")
	err = errors.Join(os.WriteFile(binary, self, 0o755), os.WriteFile(probe, program, 0o755), os.Chown(state, 65534, 65534))
	for p := state; p != os.TempDir() && p != "/"; p = filepath.Dir(p) {
		err = errors.Join(err, os.Chmod(p, 0o755))
	}
	if err = errors.Join(err, os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), binary, "-test.run=^TestNative$", "-test.v", "-test.parallel=4", "-test.timeout=10m")
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	cmd.Env = []string{userEnv + "=" + state, probeEnv + "=" + probe, "PATH=/usr/bin:/bin", "HOME=/nonexistent"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if passed := strings.Count(string(out), "--- PASS: TestNative/"); passed < 50 {
		t.Errorf("got %d clauses that ran, want at least 50: %s", passed, out)
	}
	t.Logf("not judged as an ordinary user: %d clauses", strings.Count(string(out), "not judged"))
}

// TestSuite: each clause is red for a runtime that breaks it.
func TestSuite(t *testing.T) {
	if os.Getenv(userEnv) != "" {
		return
	}
	t.Parallel()
	needRoot(t)
	h := harness(t, t.TempDir())
	sandboxtest.RunMutants(t, func(*testing.T) sandboxtest.Harness { return h })
}
