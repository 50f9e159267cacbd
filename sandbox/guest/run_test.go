package guest_test

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

func TestRunReportsHowItEnded(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	script := t.TempDir() + "/script"
	if err := os.WriteFile(script, []byte("#!/no/such/interpreter\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name   string
		args   []string
		dir    string
		want   sandbox.Exit
		stderr string // part of it
	}{
		{"success", []string{"true"}, "/", sandbox.Exit{}, ""},
		{"status", []string{"sh", "-c", "exit 42"}, "/", sandbox.Exit{Code: 42}, ""},
		{"highest status", []string{"sh", "-c", "exit 255"}, "/", sandbox.Exit{Code: 255}, ""},
		{"signal", []string{"sh", "-c", "kill -SEGV $$"}, "/", sandbox.Exit{Code: 139, Signal: 11}, ""},
		{"not in PATH", []string{"no-such-program"}, "/", sandbox.Exit{Code: 127}, "no-such-program: command not found"},
		{"no such file", []string{"/no/such/program"}, "/", sandbox.Exit{Code: 127}, "/no/such/program: no such file"},
		{"no interpreter", []string{script}, "/", sandbox.Exit{Code: 127}, "no such file"},
		{"not executable", []string{"/etc/passwd"}, "/", sandbox.Exit{Code: 126}, "permission denied"},
		{"a directory", []string{"/etc"}, "/", sandbox.Exit{Code: 126}, "permission denied"},
		{"no directory", []string{"true"}, "/no/such/dir", sandbox.Exit{Code: 126}, "/no/such/dir: no such file"},
		{"relative directory", []string{"true"}, "tmp", sandbox.Exit{Code: 126}, "not absolute"},
		{"no arguments", nil, "/", sandbox.Exit{Code: 127}, "no command"},
		{"empty name", []string{""}, "/", sandbox.Exit{Code: 127}, "no command"},
		{"zero byte", []string{"/bin/echo", "a\x00b"}, "/", sandbox.Exit{Code: 126}, "invalid argument"},
		{"argument too long for Linux", []string{"/bin/echo", strings.Repeat("x", 1<<20)}, "/", sandbox.Exit{Code: 126}, "argument list too long"},
		{"arguments too long for a frame", []string{"/bin/echo", strings.Repeat("x", wire.MaxStart)}, "/", sandbox.Exit{Code: 126}, "argument list too long"},
		{"relative to the directory", []string{"./true"}, "/bin", sandbox.Exit{}, ""},
	} {
		var out, stderr recorder
		exit, err := b.Run(t.Context(), sandbox.Process{
			Args: c.args, Dir: c.dir, Env: []string{"PATH=/usr/bin:/bin"},
			Stdout: out.output, Stderr: stderr.output,
		})
		if err != nil || exit != c.want {
			t.Errorf("%s: got %+v and error %v, want %+v and none", c.name, exit, err, c.want)
		}
		if !strings.Contains(stderr.String(), c.stderr) || (c.stderr == "" && stderr.String() != "") {
			t.Errorf("%s: got %q on stderr, want %q in it", c.name, stderr.String(), c.stderr)
		}
		if out.String() != "" {
			t.Errorf("%s: got %q on stdout, want nothing", c.name, out.String())
		}
	}
}

func TestRunGivesWhatItWasToldAndNothingElse(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	var out recorder
	p := sandbox.Process{Args: []string{"/usr/bin/env"}, Env: []string{"A=1", "B=two words\nand a line"}, Dir: "/", Stdout: out.output}
	if exit, err := b.Run(t.Context(), p); err != nil || exit.Code != 0 {
		t.Fatal(exit, err)
	}
	if want := "A=1\nB=two words\nand a line\n"; out.String() != want {
		t.Errorf("environment: got %q, want %q: nothing is inherited", out.String(), want)
	}
	if got := b.must(t, "cd /tmp; ls /proc/self/fd | tr '\\n' ' '; readlink /proc/self/fd/0"); got != "0 1 2 3 /dev/null\n" { // 3 is the directory that ls reads
		t.Errorf("descriptors: got %q, want 0, 1 and 2 and /dev/null as 0", got)
	}
	// The guest takes its score back when the step has begun, not before.
	lowered := `for i in $(seq 500); do test $(cat /proc/1/oom_score_adj) = $(cat /proc/self/oom_score_adj) || break; sleep 0.01; done; `
	got := strings.Fields(b.must(t, lowered+"cut -d' ' -f1,5,6 /proc/self/stat; echo $$; cat /proc/self/oom_score_adj /proc/1/oom_score_adj"))
	if got[1] != got[3] || got[2] != got[3] {
		t.Errorf("process group and session: got %s and %s, want the step's own, %s", got[1], got[2], got[3])
	}
	mine, _ := strconv.Atoi(got[4])
	guests, _ := strconv.Atoi(got[5])
	if mine <= guests {
		t.Errorf("oom_score_adj: got %d for a step and %d for the guest, want the step's above", mine, guests)
	}
}

func TestOutputIsCompleteAndInOrder(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	const size = 100 << 20
	sum, stderrSum, n := crc32.NewIEEE(), crc32.NewIEEE(), 0
	// The same numbers on both streams, at the same time.
	p := sh(`seq 1 20000000 | head -c ` + strconv.Itoa(size) + ` | tee /dev/stderr`)
	p.Stdout = func(_ time.Time, data []byte) error { n += len(data); _, err := sum.Write(data); return err }
	p.Stderr = func(_ time.Time, data []byte) error { _, err := stderrSum.Write(data); return err }
	exit, err := b.Run(t.Context(), p)
	if err != nil || exit.Code != 0 {
		t.Fatal(exit, err)
	}
	want := crc32.NewIEEE()
	left := size
	for i, line := 1, []byte(nil); left > 0; i++ {
		line = append(strconv.AppendInt(line[:0], int64(i), 10), '\n')
		line = line[:min(len(line), left)]
		left -= len(line)
		_, _ = want.Write(line)
	}
	if n != size || sum.Sum32() != want.Sum32() || stderrSum.Sum32() != want.Sum32() {
		t.Errorf("got %d bytes with sums %x and %x, want %d with %x: output is incomplete or out of order", n, sum.Sum32(), stderrSum.Sum32(), size, want.Sum32())
	}
}

func TestOutputIsStampedWhenItIsRead(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	dir := t.TempDir()
	p := sh(fmt.Sprintf("echo one; until [ -e %[1]s/second ]; do sleep 0.01; done; echo two; : >%[1]s/written", dir))
	var at []time.Time
	var released time.Time
	p.Stdout = func(when time.Time, _ []byte) error {
		at = append(at, when)
		if len(at) == 1 {
			eventually(t, "50 ms", func() bool { return time.Since(when) > 50*time.Millisecond })
			if err := os.WriteFile(dir+"/second", nil, 0o644); err != nil {
				return err
			}
			// The agent is slow: the second time must not be that of the delivery.
			eventually(t, "both lines are written", func() bool { _, err := os.Stat(dir + "/written"); return err == nil })
			written := time.Now()
			eventually(t, "a second, in which the guest reads it", func() bool { return time.Since(written) > time.Second })
			released = time.Now()
		}
		return nil
	}
	before := time.Now()
	if _, err := b.Run(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	if len(at) != 2 || at[0].Before(before) || at[1].Sub(at[0]) < 40*time.Millisecond || at[1].After(released) {
		t.Errorf("got stamps %v, want two, after %v, 50 ms apart, before the delivery at %v", at, before, released)
	}
}

func TestSlowAgentBlocksTheStepAndNothingElse(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	progress := t.TempDir() + "/progress"
	blocked, release := make(chan struct{}), make(chan struct{})
	first := true
	// Writes 64 KiB at a time and counts.
	p := sh("i=0; while :; do head -c 65536 /dev/zero; i=$((i+1)); echo $i >" + progress + "; done")
	p.Grace = 50 * time.Millisecond
	p.Stdout = func(time.Time, []byte) error {
		if first {
			first = false
			close(blocked)
			<-release
		}
		return nil
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	result := make(chan error, 1)
	var exit sandbox.Exit
	go func() {
		var err error
		exit, err = b.Run(ctx, p)
		result <- err
	}()
	<-blocked
	count := func() int {
		data, _ := os.ReadFile(progress)
		n, _ := strconv.Atoi(strings.TrimSpace(string(data)))
		return n
	}
	// The process has stopped when the count no longer moves.
	stuck, since := count(), time.Now()
	eventually(t, "the step blocks", func() bool {
		if n := count(); n != stuck {
			stuck, since = n, time.Now()
		}
		return time.Since(since) > 300*time.Millisecond
	})
	if most := 2 * (wire.Window/wire.MaxData + 4); stuck > most {
		t.Errorf("got %d times 64 KiB written while the agent took nothing, want at most %d", stuck, most)
	}
	// Transfers work meanwhile, and so does the stop.
	if err := b.Put(t.Context(), t.TempDir(), tarOf(t, file("a", "b"))); err != nil {
		t.Errorf("put while a step is blocked: got %v, want nil", err)
	}
	cause := errors.New("canceled by the test")
	cancel(cause)
	eventually(t, "the step ends although its output is not taken", func() bool {
		_, exit := b.stepAlive()
		return !exit
	})
	close(release)
	if err := <-result; !errors.Is(err, cause) || exit.Code == 0 {
		t.Errorf("got %+v and %v, want a failure and the cause %v", exit, err, cause)
	}
}

func TestSecondRunIsRefused(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	started := make(chan struct{})
	p := sh("echo; exec sleep 1000")
	p.Stdout = func(time.Time, []byte) error { close(started); return nil }
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = b.Run(ctx, p)
	}()
	<-started
	if _, err := b.Run(t.Context(), sh("true")); !errors.Is(err, guest.ErrBusy) {
		t.Errorf("second run: got %v, want ErrBusy", err)
	}
	cancel()
	<-done
	b.must(t, "true")
}

func TestOutputErrorEndsTheProcess(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	refused := errors.New("log is full")
	p := sh("yes")
	p.Grace = 50 * time.Millisecond
	calls := 0
	p.Stdout = func(time.Time, []byte) error { calls++; return refused }
	exit, err := b.Run(t.Context(), p)
	if !errors.Is(err, refused) || exit.Signal == 0 || calls != 1 {
		t.Errorf("got %+v, %v and %d calls, want a signal, %v and one call", exit, err, calls, refused)
	}
	b.must(t, "true")
}

func TestBackgroundProcessDoesNotHoldTheStep(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	pidFile := t.TempDir() + "/pid"
	began := time.Now()
	// It keeps writing to the pipe of its step, long after that.
	out := b.must(t, fmt.Sprintf(`(echo $BASHPID; while :; do echo noise; done) & echo $! >%s; printf last`, pidFile))
	if took := time.Since(began); took > time.Minute {
		t.Errorf("the step took %v, want a short time: something in the background holds its output", took)
	}
	if !strings.Contains(out, "last") {
		t.Errorf("what the step itself wrote is missing from %d bytes", len(out))
	}
	// It lives, and writes, through the next steps.
	for range 3 {
		if out, exit := b.run(t, "kill -0 $(cat "+pidFile+") && echo alive"); exit.Code != 0 || out != "alive\n" {
			t.Errorf("background process: got %q, want alive: it must last until the box ends", out)
		}
	}
}

func TestWhatTheStepWroteArrivesHoweverLate(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	n := 0
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	count := t.TempDir() + "/count"
	var stderr recorder
	p := sh("sleep 1000 & "+filler+"="+count+" exec "+self, &recorder{}, &stderr)
	p.Stdout = func(_ time.Time, data []byte) error {
		if n == 0 {
			// Takes nothing until long after the step has ended.
			eventually(t, "the filler has ended", func() bool { return len(b.inBox()) == 1 })
			ended := time.Now()
			eventually(t, "600 ms", func() bool { return time.Since(ended) > 600*time.Millisecond })
		}
		n += len(data)
		return nil
	}
	exit, err := b.Run(t.Context(), p)
	said, _ := os.ReadFile(count)
	if want := string(said); err != nil || exit.Code != 0 || strconv.Itoa(n) != want {
		t.Errorf("got %d bytes, %+v, %v and %q, want %s bytes: only waiting for more is bounded", n, exit, err, stderr.String(), want)
	}
}

func TestQuietBackgroundProcessCostsOnlyTheDrain(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	began := time.Now()
	if out := b.must(t, "sleep 1000 & echo done"); out != "done\n" {
		t.Errorf("got %q, want done", out)
	}
	if took := time.Since(began); took > time.Minute {
		t.Errorf("took %v, want the drain and no more", took)
	}
	// A writer that ends soon is waited for.
	if out := b.must(t, "(sleep 0.05; echo late) & echo early"); out != "early\nlate\n" {
		t.Errorf("got %q, want early and late", out)
	}
}
