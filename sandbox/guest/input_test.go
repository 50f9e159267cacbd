package guest_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

// terminal is a script at a terminal of 24 by 80.
func terminal(script string, out *recorder) (p sandbox.Process, keys chan<- []byte, sizes chan<- sandbox.Size) {
	in, resize := make(chan []byte), make(chan sandbox.Size)
	p = sh(script, out)
	p.Grace = 50 * time.Millisecond
	p.Stdin, p.TTY = in, &sandbox.TTY{Size: sandbox.Size{Rows: 24, Cols: 80}, Resize: resize}
	return p, in, resize
}

// start runs p beside the test.
func (b *box) start(ctx context.Context, p sandbox.Process) <-chan ended {
	result := make(chan ended, 1)
	go func() {
		exit, err := b.Run(ctx, p)
		result <- ended{exit, err}
	}()
	return result
}

type ended struct {
	sandbox.Exit
	err error
}

func waitFor(t *testing.T, result <-chan ended) ended {
	t.Helper()
	select {
	case e := <-result:
		return e
	case <-time.After(time.Minute):
		t.Fatal("the process runs after a minute")
		return ended{}
	}
}

// shows waits until a text is among what was printed.
func (r *recorder) shows(t *testing.T, text string) {
	t.Helper()
	eventually(t, "shows "+text, func() bool { return strings.Contains(r.String(), text) })
}

func send(t *testing.T, keys chan<- []byte, text string) {
	t.Helper()
	select {
	case keys <- []byte(text):
	case <-time.After(time.Minute):
		t.Fatalf("nobody took %q within a minute", text)
	}
}

func TestInputArrivesWholeAndEnds(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	// More than a window, so that it needs grants, in pieces that no frame holds.
	want := bytes.Repeat([]byte("0123456789abcdef\n"), 3*wire.Window/17)
	var out recorder
	p := sh("cat", &out)
	in := make(chan []byte)
	p.Stdin = in
	result := b.start(t.Context(), p)
	for rest := want; len(rest) > 0; {
		n := min(len(rest), wire.MaxData*3/2)
		send(t, in, string(rest[:n]))
		rest = rest[n:]
	}
	close(in)
	if e := waitFor(t, result); e != (ended{}) || out.String() != string(want) {
		t.Errorf("got %+v and %d bytes, want success and the %d bytes that were sent", e, len(out.String()), len(want))
	}
	if got := b.must(t, "cat; readlink /proc/self/fd/0"); got != "/dev/null\n" {
		t.Errorf("the next step, without input: got %q, want /dev/null", got)
	}
}

func TestInputThatNobodyReads(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	started := make(chan struct{})
	p := sh("exec 0</dev/null; echo; sleep 0.2; exit 3")
	p.Stdout = func(time.Time, []byte) error { close(started); return nil }
	in := make(chan []byte, 100)
	for range cap(in) {
		in <- make([]byte, wire.MaxData) // more than the pipe and the window hold
	}
	p.Stdin = in
	result := b.start(t.Context(), p)
	<-started
	if e := waitFor(t, result); e.Code != 3 || e.err != nil {
		t.Errorf("closed by the process: got %+v, want code 3", e)
	}
	// One that is there and does not read: a stop and a transfer still arrive.
	p = sh("echo; exec sleep 1000")
	p.Grace = 50 * time.Millisecond
	ready := make(chan struct{})
	p.Stdout = func(time.Time, []byte) error { close(ready); return nil }
	full := make(chan []byte, 100)
	for range cap(full) {
		full <- make([]byte, wire.MaxData)
	}
	p.Stdin = full
	ctx, cancel := context.WithCancelCause(t.Context())
	result = b.start(ctx, p)
	<-ready
	if err := b.Put(t.Context(), t.TempDir(), tarOf(t, file("a", "b"))); err != nil {
		t.Errorf("put beside input that nobody reads: got %v", err)
	}
	cause := errors.New("canceled")
	cancel(cause)
	if e := waitFor(t, result); !errors.Is(e.err, cause) || e.Code == 0 {
		t.Errorf("stop: got %+v, want a failure and %v", e, cause)
	}
	b.must(t, "true")
}

func TestTerminal(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	var out recorder
	p, keys, sizes := terminal(`test -t 0 && test -t 1 && test -t 2 && tty; stty size; echo ready
		while read -r line; do echo "<$line>"; stty size; done; exit 5`, &out)
	result := b.start(t.Context(), p)
	out.shows(t, "ready")
	if !strings.Contains(out.String(), "/dev/pts/") || !strings.Contains(out.String(), "24 80\r\n") {
		t.Errorf("got %q, want a terminal of 24 by 80", out.String())
	}
	sizes <- sandbox.Size{Rows: 50, Cols: 132}
	send(t, keys, "hello\r")
	out.shows(t, "<hello>")
	out.shows(t, "50 132")
	send(t, keys, "\x04") // Ctrl-D at the beginning of a line
	if e := waitFor(t, result); e.Code != 5 || e.err != nil {
		t.Errorf("got %+v and %q, want code 5", e, out.String())
	}
	// The next process has none.
	if got, exit := b.run(t, "test -t 0 || test -t 1 || test -e /dev/tty && : </dev/tty"); exit.Code == 0 {
		t.Errorf("the next step has a terminal: %q", got)
	}
}

func TestTerminalInterrupts(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	var out recorder
	p, keys, _ := terminal("exec bash --norc -i", &out)
	result := b.start(t.Context(), p)
	send(t, keys, "sleep 1000; echo after-$((40+2))\r")
	eventually(t, "sleep runs", func() bool { return strings.Contains(strings.Join(b.inBox(), " "), "sleep") })
	send(t, keys, "\x03")
	send(t, keys, "echo code $?\r")
	out.shows(t, "code 130")
	send(t, keys, "stty -a | grep -c isig; exit 7\r")
	if e := waitFor(t, result); e.Code != 7 || e.err != nil {
		t.Errorf("got %+v and %q, want code 7", e, out.String())
	}
	if strings.Contains(out.String(), "after-42") {
		t.Errorf("got %q: the interrupt did not reach the command", out.String())
	}
}

func TestTerminalIsTakenAway(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	var out recorder
	p, _, _ := terminal("trap '' INT TERM HUP; sh -c \"trap '' HUP; while :; do sleep 0.1; done\" & echo ready; while :; do sleep 0.1; done", &out)
	ctx, cancel := context.WithCancelCause(t.Context())
	result := b.start(ctx, p)
	out.shows(t, "ready")
	cause := errors.New("the person has gone")
	cancel(cause)
	if e := waitFor(t, result); !errors.Is(e.err, cause) || e.Signal != 9 {
		t.Errorf("got %+v, want a kill and %v", e, cause)
	}
	eventually(t, "nothing is left", func() bool { return len(b.inBox()) == 0 })
}

func TestMuchComesOutOfATerminal(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	var out recorder
	p, _, _ := terminal("stty -opost; seq 200000", &out)
	if e := waitFor(t, b.start(t.Context(), p)); e != (ended{}) {
		t.Fatalf("got %+v, want success", e)
	}
	got := out.String()
	if lines := strings.Count(got, "\n"); lines != 200000 || !strings.HasSuffix(got, "\n200000\n") {
		t.Errorf("got %d lines that end in %q, want 200000, all of them", lines, got[max(0, len(got)-20):])
	}
}

func TestAlone(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	dir := t.TempDir()
	// A child that nobody waits for, a daemon, and one that forks all the time.
	b.must(t, `trap '' TERM; setsid sleep 1000 >/dev/null 2>&1 & (setsid sh -c 'while :; do sleep 0.01 & sleep 0.01; done' >/dev/null 2>&1 &); echo kept >`+dir+`/file`)
	if len(b.inBox()) < 2 {
		t.Fatalf("in the box: got %q, want the processes that the step left", b.inBox())
	}
	var out recorder
	p := sh("cat "+dir+"/file; ls /proc | grep -c '^[0-9]'", &out)
	p.Alone = true
	if exit, err := b.Run(t.Context(), p); err != nil || exit.Code != 0 {
		t.Fatalf("got %+v and %v, want success", exit, err)
	}
	// The guest, the shell, ls and grep.
	if got := out.String(); got != "kept\n4\n" {
		t.Errorf("got %q, want the file, and no process but its own", got)
	}
	// Also if it cannot be started.
	b.must(t, "setsid sleep 1000 >/dev/null 2>&1 &")
	p = sandbox.Process{Args: []string{"/no/such/program"}, Dir: "/", Alone: true}
	if exit, err := b.Run(t.Context(), p); err != nil || exit.Code != 127 || len(b.inBox()) != 0 {
		t.Errorf("a program that is not there: got %+v, %v and %q in the box, want 127 and nothing", exit, err, b.inBox())
	}
	// Without it they stay.
	b.must(t, "setsid sleep 1000 >/dev/null 2>&1 &")
	b.must(t, "true")
	if len(b.inBox()) != 1 {
		t.Errorf("in the box: got %q, want the process of the step before", b.inBox())
	}
}

func TestNoTerminalInTheBox(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	if os.Getuid() != 0 {
		t.Fatal("not root: the test covers /dev/ptmx in the box's own mount namespace")
	}
	b.must(t, "mount --bind /dev/zero /dev/ptmx")
	var out recorder
	p, _, _ := terminal("true", &out)
	if e := waitFor(t, b.start(t.Context(), p)); e.Code != 126 || e.err != nil || !strings.Contains(out.String(), "mayfly: terminal: /dev/ptmx") {
		t.Errorf("got %+v and %q, want code 126 and the reason", e, out.String())
	}
	b.must(t, "true")
}

func TestHostileGuestLiesAboutInput(t *testing.T) {
	t.Parallel()
	in := make(chan []byte, 1)
	in <- []byte("x")
	typed := sandbox.Process{Args: []string{"x"}, Stdin: in, TTY: &sandbox.TTY{}}
	for name, c := range map[string]struct {
		p   sandbox.Process
		say []byte
	}{
		"input that there is not":      {sandbox.Process{Args: []string{"x"}}, wire.AppendUint32(nil, wire.InputGrant, 1)},
		"more than was sent":           {typed, wire.AppendUint32(nil, wire.InputGrant, 1<<32-1)},
		"a grant of three bytes":       {typed, wire.AppendFrame(nil, wire.InputGrant, "123")},
		"after the exit":               {typed, wire.AppendUint32(wire.AppendExit(nil, 0, 0), wire.InputGrant, 0)},
		"the grant of a transfer":      {typed, wire.AppendUint32(nil, wire.Grant, 1)},
		"input, which the agent sends": {typed, wire.AppendFrame(nil, wire.Input, "x")},
	} {
		client := hostile(t, true, func(_ *testing.T, conn net.Conn) {
			_, _ = conn.Read(make([]byte, 1)) // the request, so that the frames meet it
			go func() { _, _ = io.Copy(io.Discard, conn) }()
			_, _ = conn.Write(c.say)
		})
		exit, err := client.Run(t.Context(), c.p)
		// The exit may still be taken for an honest end.
		if !errors.Is(err, sandbox.ErrDied) && name != "after the exit" {
			t.Errorf("%s: got %+v and %v, want ErrDied", name, exit, err)
		}
		select {
		case <-client.Done():
		case <-time.After(time.Minute):
			t.Errorf("%s: the guest is alive, want dead", name)
		}
	}
}
