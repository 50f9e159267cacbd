// Package isolation attacks boxes. Each attack is made twice by the same
// program: where the one control is missing that is to stop it, and there it
// must reach its canary, and in a box, where it must not.
//
// The tests run in a network namespace of their own, on a host of addresses
// that belong to nobody and without any route, so nothing that they send can
// leave the machine.
package isolation

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/gvisor"
	"github.com/mayfly-ci/mayfly/sandbox/native"
	"github.com/mayfly-ci/mayfly/sandbox/sandboxtest"
)

// insideEnv says that the tests run in their network namespace already.
const insideEnv = "MAYFLY_ISOLATION_INSIDE"

// The boxes of the tests have this wall (see TestGVisor), by this program.
const (
	wallEnv  = "MAYFLY_ISOLATION_WALL"
	runscEnv = "MAYFLY_ISOLATION_RUNSC"
)

// patience bounds every wait of a test.
const patience = 2 * time.Minute

// What all tests share: set by TestMain, and not changed after.
var (
	runtimeOfTests *native.Runtime
	state          string // its state directory
	probePath      string // the probe, where everybody may run it
	probeProgram   []byte
	wall           = sandbox.Isolation(os.Getenv(wallEnv))
)

func TestMain(m *testing.M) {
	if os.Getenv(insideEnv) == "" {
		fmt.Fprintln(os.Stderr, goInside())
		os.Exit(1)
	}
	code, err := prepareAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// goInside starts the tests anew in a network namespace.
func goInside() error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare: %w; run the tests as root", err)
	}
	return unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), insideEnv+"=1"))
}

func prepareAndRun(m *testing.M) (code int, err error) {
	if err := network(); err != nil {
		return 1, err
	}
	dir, err := os.MkdirTemp("", "mayfly-isolation-")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	state, probePath = filepath.Join(dir, "state"), filepath.Join(dir, "probe")
	probeProgram, err = sandboxtest.BuildProbe(context.Background())
	if err == nil {
		err = errors.Join(os.WriteFile(probePath, probeProgram, 0o755), os.Chmod(dir, 0o755))
	}
	if err != nil {
		return 1, err
	}
	program, err := guest.Binary()
	if err != nil {
		return 1, err
	}
	parent := "mayfly-isolation-" + strconv.Itoa(os.Getpid())
	runtimeOfTests, err = native.New(native.Config{
		StateDir: state, Owner: "isolation", Guest: program, CgroupParent: parent,
		GVisor: gvisor.Config{Runsc: os.Getenv(runscEnv)},
		Limits: sandbox.Limits{Memory: 512 << 20, Pids: 512, MilliCPU: 1000, Disk: 1 << 30, Inodes: 50_000},
	})
	if err != nil {
		return 1, err
	}
	code = m.Run()
	for _, pattern := range []string{"/sys/fs/cgroup/*/" + parent, "/sys/fs/cgroup/" + parent} {
		found, _ := filepath.Glob(pattern) // the patterns are well formed
		for _, p := range found {
			below, _ := filepath.Glob(p + "/*")
			for _, p := range append(below, p) {
				_ = unix.Rmdir(p) // files of a group cannot be removed and need not be
			}
		}
	}
	return code, nil
}

// network makes the host that the boxes must not reach: a loopback, an address
// as of a LAN, the one of cloud metadata, and IPv6, link-local too.
func network() error {
	for _, args := range []string{
		"link set lo up", "address add 10.77.0.1/24 dev lo", "address add 169.254.169.254/32 dev lo",
		"-6 address add fd00:77::1/64 dev lo nodad", "-6 address add fe80::77/64 dev lo nodad",
	} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s (package iproute2): %w: %s", args, err, out)
		}
	}
	return os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 2147483647"), 0)
}

// token is a word that stands nowhere else.
func token() string { return "canary-" + strings.ToLower(rand.Text()) }

// bounded is a context for the whole test that outlives it for its cleanup.
func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	t.Cleanup(cancel)
	return ctx
}

// A result is what became of a process.
type result struct {
	out    string
	code   int
	signal int
	oom    bool
}

// got is what a probe that was not stopped is.
func (r result) got() bool { return r.code == 0 && r.signal == 0 }

// refused is a probe that was told no, or killed for asking (SIGSYS).
func (r result) refused() bool { return r.code == 1 || r.signal == int(unix.SIGSYS) }

// A box is a sandbox with the probe in it.
type box struct {
	sandbox.Sandbox
	name string
}

func newBox(t *testing.T, l sandbox.Limits) *box {
	t.Helper()
	ctx := bounded(t)
	name := "iso-" + strings.ToLower(rand.Text())
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
		defer cancel()
		if err := runtimeOfTests.Destroy(ctx, name); err != nil {
			t.Errorf("destroy: %v", err)
		}
	})
	s, err := runtimeOfTests.Create(ctx, name, sandbox.Spec{
		Labels: sandbox.Labels{Owner: "isolation"}, Isolation: wall, Limits: l, Expires: time.Now().Add(patience),
	})
	if err != nil {
		t.Fatalf("create: %v", err)
	}
	if err := s.Put(ctx, "/run/mayfly", bytes.NewReader(archive(t))); err != nil {
		t.Fatalf("put the probe: %v", err)
	}
	return &box{s, name}
}

// run runs a command in the box, which lives on.
func (b *box) run(t *testing.T, args ...string) result {
	t.Helper()
	r, err := b.try(t, args...)
	if err != nil {
		t.Fatalf("run %q: %v: %s", args, err, r.out)
	}
	return r
}

// try runs a command that may be the end of the box.
func (b *box) try(t *testing.T, args ...string) (result, error) {
	t.Helper()
	var out bytes.Buffer
	print := func(_ time.Time, p []byte) error { out.Write(p); return nil }
	exit, err := b.Run(bounded(t), sandbox.Process{
		Args: args, Stdout: print, Stderr: print,
		Env: []string{"PATH=/usr/local/go/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "GOPROXY=off", "GOFLAGS=-mod=mod", "GOTOOLCHAIN=local"},
	})
	return result{out.String(), exit.Code, exit.Signal, exit.OOM}, err
}

// probe runs the probe in the box.
func (b *box) probe(t *testing.T, args ...string) result {
	t.Helper()
	return b.run(t, append([]string{"/run/mayfly/probe"}, args...)...)
}

// child runs the probe outside of any box, as a child of the test. attr may
// give it namespaces; nil gives it none.
func child(t *testing.T, attr *syscall.SysProcAttr, args ...string) result {
	t.Helper()
	cmd := exec.CommandContext(bounded(t), probePath, args...)
	cmd.SysProcAttr = attr
	cmd.Dir = "/"
	out, err := cmd.CombinedOutput()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	r := result{out: string(out), code: cmd.ProcessState.ExitCode()}
	if w, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && w.Signaled() {
		r.signal = int(w.Signal())
	}
	return r
}

// twoSided judges an attack.
func twoSided(t *testing.T, what string, off, on result) {
	t.Helper()
	if !off.got() {
		t.Errorf("%s with the control off: got %+v, want it to work, or the other half says nothing", what, off)
	}
	if !on.refused() {
		t.Errorf("%s in a box: got %+v, want refused", what, on)
	}
}

// eventually polls until ok.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	late := time.After(time.Minute)
	for !ok() {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// canaryFile makes a file with a token on the host.
func canaryFile(t *testing.T, dir string) (file, content string) {
	t.Helper()
	content = token()
	file = filepath.Join(dir, content+".txt")
	if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(file); err != nil {
			t.Error(err)
		}
	})
	return file, content
}

// names are those of a table, in order.
func names[T any](table map[string]T) []string {
	var out []string
	for name := range table {
		out = append(out, name)
	}
	slices.Sort(out)
	return out
}
