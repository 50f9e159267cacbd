package console_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/console"
	"github.com/mayfly-ci/mayfly/sandbox"
)

// strangerEnv makes the test binary a client: it holds a state directory.
const strangerEnv = "MAYFLY_TEST_STRANGER"

func TestMain(m *testing.M) {
	if state := os.Getenv(strangerEnv); state != "" {
		_, err := console.Dial(context.Background(), state, console.Session{Job: "j", Stdin: strings.NewReader(""), Stdout: os.Stdout, Stderr: os.Stderr})
		fmt.Fprintln(os.Stdout, err)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// serve opens a socket over a function, in a directory whose name is longer than
// a socket's may be.
func serve(t *testing.T, open console.Open) (state string) {
	t.Helper()
	state = filepath.Join(t.TempDir(), strings.Repeat("long/", 40))
	if err := os.MkdirAll(state, 0o700); err != nil {
		t.Fatal(err)
	}
	s, err := console.Listen(state, open)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Serve(ctx); err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	t.Cleanup(func() { cancel(); wg.Wait() })
	return state
}

// dial connects below a descriptor of the directory.
func dial(t *testing.T, state string) net.Conn {
	t.Helper()
	dir, err := os.Open(state)
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	conn, err := net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d/shell.sock", dir.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func within(t *testing.T, what string, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(time.Minute):
		t.Fatalf("not within a minute: %s", what)
	}
}

func TestBothEnds(t *testing.T) {
	t.Parallel()
	big := strings.Repeat("0123456789", 100_000)
	sizes := make(chan sandbox.Size)
	state := serve(t, func(_ context.Context, sh runner.Shell) (sandbox.Exit, error) {
		if sh.Job != "j" || strings.Join(sh.Args, " ") != "a b" || sh.Term != "xterm-256color" || sh.Who["uid"] != fmt.Sprint(os.Geteuid()) || sh.Who["pid"] != fmt.Sprint(os.Getpid()) {
			return sandbox.Exit{}, fmt.Errorf("got %+v", sh)
		}
		if sh.TTY.Size != (sandbox.Size{Rows: 24, Cols: 80}) {
			return sandbox.Exit{}, fmt.Errorf("got size %+v", sh.TTY.Size)
		}
		sizes <- <-sh.TTY.Resize
		var in []byte
		for b := range sh.Stdin {
			in = append(in, b...)
		}
		if string(in) != big {
			return sandbox.Exit{}, fmt.Errorf("got %d bytes of input, want %d", len(in), len(big))
		}
		for rest := []byte(big); len(rest) > 0; {
			n := min(len(rest), 64<<10)
			if err := sh.Stdout(time.Now(), rest[:n]); err != nil {
				return sandbox.Exit{}, err
			}
			rest = rest[n:]
		}
		return sandbox.Exit{Code: 137, Signal: 9}, sh.Stderr(time.Now(), []byte("err"))
	})
	resize := make(chan sandbox.Size)
	go func() { resize <- sandbox.Size{Rows: 50, Cols: 132} }()
	received := make(chan sandbox.Size, 1)
	go func() { received <- <-sizes }()
	var out, errs bytes.Buffer
	status, err := console.Dial(t.Context(), state, console.Session{
		Job: "j", Args: []string{"a", "b"}, Term: "xterm-256color", Size: &sandbox.Size{Rows: 24, Cols: 80}, Resize: resize,
		Stdin: strings.NewReader(big), Stdout: &out, Stderr: &errs,
	})
	if status != 137 || err != nil || out.String() != big || errs.String() != "err" {
		t.Errorf("got %d, %v, %d bytes and %q, want 137 and all of %d bytes", status, err, out.Len(), errs.String(), len(big))
	}
	if got := <-received; got != (sandbox.Size{Rows: 50, Cols: 132}) {
		t.Errorf("got size %+v", got)
	}
}

func TestWhatTheAgentSays(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		err     error
		refused bool
		want    string
	}{
		{fmt.Errorf("%w: j", runner.ErrNotKept), true, "no box of this job is kept: j"},
		{fmt.Errorf("%w: j", runner.ErrShellOpen), true, "a shell is open in this box: j"},
		{sandbox.ErrDied, false, "sandbox died"},
	} {
		state := serve(t, func(context.Context, runner.Shell) (sandbox.Exit, error) { return sandbox.Exit{}, c.err })
		_, err := console.Dial(t.Context(), state, console.Session{Stdin: strings.NewReader(""), Stdout: io.Discard, Stderr: io.Discard})
		if err == nil || errors.Is(err, console.ErrRefused) != c.refused || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v: got %v, want %q", c.err, err, c.want)
		}
	}
	_, err := console.Dial(t.Context(), t.TempDir(), console.Session{Stdin: strings.NewReader("")})
	if err == nil || !strings.Contains(err.Error(), "no agent that keeps boxes runs") {
		t.Errorf("no agent: got %v", err)
	}
}

// The end of the person is the end of the shell, also if nothing that was typed
// is taken, and if nothing that is printed is.
func TestPersonGoes(t *testing.T) {
	t.Parallel()
	for name, printing := range map[string]bool{"types": false, "does not read": true} {
		started, ended := make(chan struct{}), make(chan struct{})
		state := serve(t, func(ctx context.Context, sh runner.Shell) (sandbox.Exit, error) {
			close(started)
			defer close(ended)
			for printing {
				if err := sh.Stdout(time.Now(), make([]byte, 64<<10)); err != nil {
					return sandbox.Exit{}, err
				}
			}
			<-ctx.Done()
			return sandbox.Exit{}, context.Cause(ctx)
		})
		conn := dial(t, state)
		if _, err := io.WriteString(conn, `{"job":"j"}`+"\n"+strings.Repeat(`{"in":"`+strings.Repeat("AAAA", 16<<10)+`"}`+"\n", 40)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		within(t, name+": started", started)
		if err := conn.Close(); err != nil {
			t.Fatal(err)
		}
		within(t, name+": the shell ends", ended)
	}
}

func TestBadClients(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		say   string
		opens bool
	}{
		"no JSON":          {"hello\n", false},
		"a line too long":  {`{"job":"` + strings.Repeat("x", 200<<10) + `"}` + "\n", false},
		"hangs up at once": {"", false},
		"then no JSON":     {`{"job":"j"}` + "\nhello\n", true},
		"too much":         {`{"job":"j"}` + "\n" + strings.Repeat(`{"in":"`+strings.Repeat("AAAA", 16<<10)+`"}`+"\n", 400), true},
	} {
		opened := make(chan struct{}, 1)
		ended := make(chan struct{})
		state := serve(t, func(ctx context.Context, _ runner.Shell) (sandbox.Exit, error) {
			opened <- struct{}{}
			<-ctx.Done()
			close(ended)
			return sandbox.Exit{}, context.Cause(ctx)
		})
		conn := dial(t, state)
		go func() {
			_, _ = io.WriteString(conn, c.say) // the server may hang up meanwhile
			if c.say == "" {
				_ = conn.(*net.UnixConn).CloseWrite()
			}
		}()
		b, _ := io.ReadAll(conn)
		if !strings.Contains(string(b), `"fail"`) && len(b) > 0 {
			t.Errorf("%s: got %q, want a failure", name, b)
		}
		if c.opens {
			within(t, name, ended)
		} else if len(opened) > 0 {
			t.Errorf("%s: a shell was opened", name)
		}
	}
}

// The kernel says who it is, whatever the modes of files are.
func TestStrangerIsRefused(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Fatal("not root: the test starts a process of another user")
	}
	opened := make(chan string, 10)
	// In a directory that others may enter.
	state, err := os.MkdirTemp("", "mayfly-console-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(state)
	s, err := console.Listen(state, func(_ context.Context, sh runner.Shell) (sandbox.Exit, error) {
		opened <- sh.Who["user"]
		return sandbox.Exit{}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	info, err := os.Stat(filepath.Join(state, "shell.sock"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: got %v and %v, want mode 0600", info, err)
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(state, "client")
	if err := errors.Join(os.WriteFile(program, self, 0o755), os.Chmod(state, 0o755)); err != nil {
		t.Fatal(err)
	}
	client := func(uid uint32) string {
		cmd := exec.CommandContext(ctx, program)
		cmd.Env = []string{strangerEnv + "=" + state}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("client: %v: %s", err, out)
		}
		return string(out)
	}
	const nobody = 65534
	if got := client(nobody); !strings.Contains(got, "permission denied") {
		t.Errorf("a stranger at the socket: got %q, want permission denied", got)
	}
	if err := os.Chmod(filepath.Join(state, "shell.sock"), 0o666); err != nil {
		t.Fatal(err)
	}
	if got := client(nobody); !strings.Contains(got, "refused: only root and the agent's own user may open a shell: uid 65534 is neither") {
		t.Errorf("a stranger at an open socket: got %q, want a refusal", got)
	}
	if len(opened) > 0 {
		t.Error("a stranger got a shell")
	}
	if got := client(0); got != "<nil>\n" || len(opened) != 1 || <-opened != "root" {
		t.Errorf("root: got %q, want a shell", got)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
