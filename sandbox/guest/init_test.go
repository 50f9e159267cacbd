package guest_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
)

func TestOrphansAreReapedAndStatusesAreNotStolen(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	// Each step leaves orphans that end while it does.
	for i := range 50 {
		_, exit := b.run(t, fmt.Sprintf(`for i in 1 2 3 4 5; do (setsid sh -c 'exit 9' &) ; done; exit %d`, i))
		if exit.Code != i {
			t.Fatalf("step %d: got %+v, want status %d: the status of another process was taken for it", i, exit, i)
		}
	}
	eventually(t, "no child is left", func() bool { return b.children() == 0 })
	// One that ends when no step does.
	b.must(t, "(setsid sleep 2 >/dev/null 2>&1 &)")
	if b.children() == 0 {
		t.Error("no orphan: the test proves nothing")
	}
	eventually(t, "a late orphan is reaped", func() bool { return b.children() == 0 })
}

// children counts the children of the guest, zombies included.
func (b *box) children() (n int) {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, name := range stats {
		line, _ := os.ReadFile(name)
		_, rest, _ := strings.Cut(string(line), ") ")
		if fields := strings.Fields(rest); len(fields) > 1 && fields[1] == strconv.Itoa(b.cmd.Process.Pid) {
			n++
		}
	}
	return n
}

// fewCapabilities runs the guest as the native runtime leaves it.
const fewCapabilities = "exec setpriv --no-new-privs --inh-caps -all --bounding-set -all,+chown,+dac_override,+fowner,+fsetid,+setuid,+setgid,+kill,+net_bind_service"

func TestProcessOneCannotBeReachedFromTheBox(t *testing.T) {
	t.Parallel()
	b := newBox(t, fewCapabilities)
	for _, probe := range []string{
		"cat /proc/PID/environ", "head -c 1 /proc/PID/auxv", "cat /proc/PID/maps", "readlink /proc/PID/fd/1", "readlink /proc/PID/exe",
		"ls /proc/PID/map_files/", "cat /proc/PID/syscall", "dd if=/proc/PID/mem bs=1 count=1 skip=4194304",
	} {
		if out, exit := b.run(t, strings.Replace(probe, "PID", "1", 1)); exit.Code == 0 {
			t.Errorf("%s: got %q, want a refusal", probe, out)
		}
		// The same probe reaches a process that is not hardened.
		if strings.Contains(probe, "mem") || strings.Contains(probe, "syscall") {
			continue // a stranger's memory has no byte there
		}
		b.must(t, "sleep 1000 & until [ $(cat /proc/$!/comm) = sleep ]; do :; done; "+strings.Replace(probe, "PID", "$!", 1)+"; S=$?; kill $!; exit $S")
	}
	var signals strings.Builder
	for s := 1; s < 65; s++ {
		if s != 32 && s != 33 { // glibc keeps these
			fmt.Fprintf(&signals, "kill -%d 1; ", s)
		}
	}
	b.run(t, signals.String())
	b.must(t, "true")
	if got := b.stderr.String(); got != "" {
		t.Errorf("stderr of the guest: got %q, want nothing", got)
	}
}

func TestSignalsFromOutsideDoNotMakeItSpeak(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	b.must(t, "true")
	for _, s := range []syscall.Signal{syscall.SIGQUIT, syscall.SIGABRT, syscall.SIGSEGV, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1} {
		if err := b.cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
	}
	b.must(t, "true")
	if b.stderr.String() != "" {
		t.Errorf("got %q on the guest's stderr, want nothing", b.stderr.String())
	}
}

func TestStepsHaveDefaultSignals(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	out := b.must(t, "exec cat /proc/self/status")
	for _, want := range []string{"SigBlk:\t0000000000000000\n", "SigIgn:\t0000000000000000\n", "SigCgt:\t0000000000000000\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("status: got %q, want %q in it: none blocked, ignored or caught", out, want)
		}
	}
}

func TestBoxEndsWithItsStream(t *testing.T) {
	t.Parallel()
	b := startBox(t, "")
	b.must(t, "setsid sleep 1000 >/dev/null 2>&1 &")
	p := sh("trap '' INT TERM; echo; while :; do sleep 1; done")
	started := make(chan struct{})
	p.Stdout = func(time.Time, []byte) error { close(started); return nil }
	result := make(chan error, 1)
	go func() {
		_, err := b.Run(context.Background(), p)
		result <- err
	}()
	<-started
	if len(b.inBox()) < 2 {
		t.Fatalf("in the box: got %q, want two processes or more", b.inBox())
	}
	ns, err := os.Readlink("/proc/" + strconv.Itoa(b.cmd.Process.Pid) + "/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-result; !errors.Is(err, sandbox.ErrDied) {
		t.Errorf("run: got %v, want ErrDied", err)
	}
	began := time.Now()
	b.wait(t)
	if took := time.Since(began); took > time.Minute {
		t.Errorf("the box took %v to die, want no time", took)
	}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if other, _ := os.Readlink("/proc/" + e.Name() + "/ns/pid"); other == ns {
			t.Errorf("process %s is left", e.Name())
		}
	}
}

func TestBoxDiesOfAKilledGuest(t *testing.T) {
	t.Parallel()
	b := startBox(t, "")
	p := sh("echo; exec sleep 1000")
	p.Stdout = func(time.Time, []byte) error { return b.cmd.Process.Kill() }
	if _, err := b.Run(t.Context(), p); !errors.Is(err, sandbox.ErrDied) {
		t.Errorf("got %v, want ErrDied", err)
	}
	<-b.Done()
	_ = b.cmd.Wait()
	if err := b.Close(); err != nil {
		t.Errorf("close: got %v, want nil", err)
	}
}

func TestBoxExpires(t *testing.T) {
	t.Parallel()
	b := startBox(t, "", "serve", strconv.FormatInt(time.Now().Unix()+1, 10))
	_, err := b.Run(t.Context(), sh("trap '' INT TERM; while :; do sleep 1; done"))
	if !errors.Is(err, sandbox.ErrDied) {
		t.Errorf("run: got %v, want ErrDied", err)
	}
	_ = b.cmd.Wait()
	if !strings.Contains(b.stderr.String(), "expired") || b.cmd.ProcessState.ExitCode() != 1 {
		t.Errorf("got status %d and %q, want 1 and that it has expired", b.cmd.ProcessState.ExitCode(), b.stderr.String())
	}
	_ = b.Close()
}

func TestFewCapabilities(t *testing.T) {
	t.Parallel()
	b := newBox(t, fewCapabilities)
	got := b.must(t, "grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/self/status")
	if want := "CapEff:\t00000000000004fb\nCapBnd:\t00000000000004fb\nNoNewPrivs:\t1\n"; got != want {
		t.Fatalf("a step has %q, want %q", got, want)
	}
	dir := t.TempDir()
	if err := b.Put(t.Context(), dir, tarOf(t, file("a", "b"))); err != nil {
		t.Errorf("put: got %v, want nil", err)
	}
	if data, err := b.Get(t.Context(), dir+"/a", 1); err != nil || string(data) != "b" {
		t.Errorf("get: got %q and %v, want b", data, err)
	}
	p := sh("trap '' INT TERM; setsid sleep 1000 & echo; while :; do sleep 0.1; done")
	p.Grace = 10 * time.Millisecond
	if exit, _ := b.cancelWhen(t, p); exit.Signal != 9 {
		t.Errorf("stop: got %+v, want signal 9", exit)
	}
	eventually(t, "nothing is left", func() bool { return len(b.inBox()) == 0 })
}

func TestStdio(t *testing.T) {
	t.Parallel()
	cmd := exec.Command(program, "stdio")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c, err := guest.New(t.Context(), pipes{in, out}, guest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	b := &box{Client: c, cmd: cmd}
	if got := b.must(t, "ls /proc/self/fd | tr '\\n' ' '"); got != "0 1 2 3 " {
		t.Errorf("descriptors of a step: got %q, want 0, 1, 2 and the one of ls", got)
	}
	if got := b.must(t, "readlink /proc/$PPID/fd/0 /proc/$PPID/fd/1"); got != "/dev/null\n/dev/null\n" {
		t.Errorf("descriptors 0 and 1 of the guest: got %q, want /dev/null: prints must not get into the stream", got)
	}
	if err := c.Close(); err != nil {
		t.Errorf("close: got %v, want nil", err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("guest: got %v, want status 0", err)
	}
}

type pipes struct {
	in interface {
		Write([]byte) (int, error)
		Close() error
	}
	out interface {
		Read([]byte) (int, error)
		Close() error
	}
}

func (p pipes) Read(b []byte) (int, error)  { return p.out.Read(b) }
func (p pipes) Write(b []byte) (int, error) { return p.in.Write(b) }
func (p pipes) Close() error                { return errors.Join(p.in.Close(), p.out.Close()) }

func TestUsage(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{nil, {"run"}, {"serve", "soon"}, {"serve", "1", "2"}} {
		out, err := exec.Command(program, args...).CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 2 || !strings.HasPrefix(string(out), "usage: ") {
			t.Errorf("%q: got %v and %q, want status 2 and the usage", args, err, out)
		}
	}
}
