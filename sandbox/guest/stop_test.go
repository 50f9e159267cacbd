package guest_test

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// inBox returns the command lines of the processes in the box, but for the
// guest, as this machine sees them.
func (b *box) inBox() []string {
	var found []string
	ns, err := os.Readlink("/proc/" + strconv.Itoa(b.cmd.Process.Pid) + "/ns/pid")
	if err != nil {
		return nil
	}
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if other, err := os.Readlink("/proc/" + e.Name() + "/ns/pid"); err != nil || other != ns {
			continue
		}
		if e.Name() == strconv.Itoa(b.cmd.Process.Pid) {
			continue
		}
		line, _ := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		found = append(found, strings.ReplaceAll(string(line), "\x00", " ")+e.Name())
	}
	return found
}

// stepAlive reports what runs in the box, and whether anything does.
func (b *box) stepAlive() ([]string, bool) {
	found := b.inBox()
	return found, len(found) > 0
}

// cancelWhen runs p and cancels it at its first output.
func (b *box) cancelWhen(t *testing.T, p sandbox.Process) (sandbox.Exit, time.Duration) {
	t.Helper()
	cause := errors.New("the job was canceled")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	var canceled time.Time
	out := p.Stdout
	p.Stdout = func(at time.Time, data []byte) error {
		if canceled.IsZero() {
			canceled = time.Now()
			cancel(cause)
		}
		if out != nil {
			return out(at, data)
		}
		return nil
	}
	exit, err := b.Run(ctx, p)
	if !errors.Is(err, cause) {
		t.Errorf("error: got %v, want the cause of the cancellation", err)
	}
	return exit, time.Since(canceled)
}

func TestStopEscalates(t *testing.T) {
	t.Parallel()
	// A trap that must run before the next signal has that long, since a busy
	// machine lets it wait.
	const grace, never = 2 * time.Second, time.Minute
	for _, c := range []struct {
		name, script string
		grace        time.Duration
		want         sandbox.Exit
		least, most  time.Duration
		output       string
	}{
		{"interrupt", `trap 'echo int; exit 3' INT; echo; while :; do sleep 0.01; done`, never, sandbox.Exit{Code: 3}, 0, never, "\nint\n"},
		{"terminate", `trap 'echo int' INT; trap 'echo term; exit 4' TERM; echo; while :; do sleep 0.01; done`, grace, sandbox.Exit{Code: 4}, grace, never, "\nint\nterm\n"},
		{"kill", `trap 'echo int' INT; trap 'echo term' TERM; echo; while :; do sleep 0.01; done`, grace, sandbox.Exit{Code: 137, Signal: 9}, 2 * grace, never, "\nint\nterm\n"},
		{"default action", `echo; exec sleep 1000`, never, sandbox.Exit{Code: 130, Signal: 2}, 0, never, "\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newBox(t, "")
			var out recorder
			p := sh(c.script, &out, &recorder{}) // the shell's own remarks are on stderr
			p.Grace = c.grace
			exit, took := b.cancelWhen(t, p)
			if exit != c.want || out.String() != c.output {
				t.Errorf("got %+v and %q, want %+v and %q", exit, out.String(), c.want, c.output)
			}
			if took < c.least || took > c.most {
				t.Errorf("took %v, want %v to %v", took, c.least, c.most)
			}
			b.must(t, "true")
		})
	}
}

func TestStopTakesTheWholeFamily(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	b.must(t, "sleep 7777 >/dev/null 2>&1 &") // of an earlier step: stays
	p := sh(`trap '' INT; trap 'setsid sleep 1006 &' TERM
		sleep 1001 &
		setsid sleep 1002 &
		setsid sh -c 'trap "" INT TERM; sleep 1003 & setsid sleep 1004 & wait; sleep 1005' &
		(setsid sh -c 'while :; do sleep 0.01 & wait; done') &
		echo; while :; do sleep 0.01; done`)
	p.Grace = 300 * time.Millisecond
	exit, _ := b.cancelWhen(t, p)
	if exit.Signal != int(syscall.SIGKILL) {
		t.Errorf("got %+v, want signal 9", exit)
	}
	var left []string
	eventually(t, "only the process of the earlier step is left", func() bool {
		left = b.inBox()
		return len(left) == 1
	})
	if len(left) != 1 || !strings.HasPrefix(left[0], "sleep 7777") {
		t.Errorf("left in the box: %q, want sleep 7777 of the earlier step alone", left)
	}
}

func TestStopTakesWhatAnObedientProcessLeaves(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	p := sh(`setsid sleep 1001 & sleep 1002 & trap 'exit 0' INT; echo; while :; do sleep 0.01; done`)
	p.Grace = time.Minute
	if exit, took := b.cancelWhen(t, p); exit.Code != 0 || took > 30*time.Second {
		t.Errorf("got %+v after %v, want status 0 at once", exit, took)
	}
	eventually(t, "nothing is left", func() bool { return len(b.inBox()) == 0 })
}

// TestWhatStopMustFindIsReal is the other side: a signal to the process group
// alone leaves a child that has made a session of its own.
func TestWhatStopMustFindIsReal(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	b.run(t, `setsid sleep 1002 >/dev/null 2>&1 & until [ $(cat /proc/$!/comm) = sleep ]; do :; done; kill -KILL 0`)
	if left := b.inBox(); len(left) != 1 || !strings.HasPrefix(left[0], "sleep 1002") {
		t.Errorf("left after a kill of the group: got %q, want sleep 1002", left)
	}
}

func TestStopDuringOutput(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	p := sh("trap '' INT; exec cat /dev/zero")
	p.Grace = 20 * time.Millisecond
	for range 5 {
		if exit, _ := b.cancelWhen(t, p); exit.Signal == 0 {
			t.Errorf("got %+v, want a signal", exit)
		}
	}
	if got := b.must(t, "echo clean"); got != "clean\n" {
		t.Errorf("next step: got %q, want its own output alone", got)
	}
}

func TestCanceledBeforeTheStart(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("too late")
	cancel(cause)
	var out recorder
	if _, err := b.Run(ctx, sh("echo ran", &out)); !errors.Is(err, cause) || out.String() != "" {
		t.Errorf("got %v and %q, want the cause and nothing run", err, out.String())
	}
}
