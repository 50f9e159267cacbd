package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/mayfly-ci/mayfly/configs"
)

// freeport NAME puts a port of 127.0.0.1 on which nobody listens into $NAME.
func freeport(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: freeport NAME")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	ts.Check(l.Close())
	ts.Setenv(args[0], strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
}

// canary NAME starts a web server on 127.0.0.1 that says canary, and puts its
// port into $NAME.
func canary(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: canary NAME")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	ts.Check(err)
	s := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintln(w, "canary")
	})}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	ts.Defer(func() {
		ts.Check(s.Close())
		<-done
	})
	ts.Setenv(args[0], strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
}

// A supervisor is what systemd is to a service: a socket that hears states.
type supervisor struct {
	t    *testing.T
	conn *net.UnixConn
	path string
}

func newSupervisor(t *testing.T) *supervisor {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &supervisor{t, conn, path}
}

// hears returns the first state that begins with one of the words.
func (m *supervisor) hears(words ...string) string {
	m.t.Helper()
	buf := make([]byte, 1<<10)
	if err := m.conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		m.t.Fatal(err)
	}
	for {
		n, err := m.conn.Read(buf)
		if err != nil {
			m.t.Fatalf("waiting for %v: %v", words, err)
		}
		if state := string(buf[:n]); slices.ContainsFunc(words, func(w string) bool { return strings.HasPrefix(state, w) }) {
			return state
		}
	}
}

// An agent tells its service manager when it is ready, alive, reloading and
// stopping; and tells none of the programs that it starts.
func TestSupervisor(t *testing.T) {
	t.Parallel()
	m, dir := newSupervisor(t), t.TempDir()
	t.Cleanup(func() { removeGroups(dir) })
	file := filepath.Join(dir, "agent.yaml")
	err := errors.Join(
		os.WriteFile(file, []byte("version: 1\nstate: state\npolicy: policy.yaml\nproviders: {local: {dir: spool}}\n"), 0o600),
		os.WriteFile(filepath.Join(dir, "policy.yaml"), []byte("version: 1\nrules: [{name: all, match: {trust: local}}]\n"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	program, err := exec.LookPath("mayfly") // this test's binary, see TestMain
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, "agent", "--config", file)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+m.path, "WATCHDOG_USEC=200000")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	signal := func(s os.Signal) {
		t.Helper()
		if err := cmd.Process.Signal(s); err != nil {
			t.Error(err)
		}
	}
	if state := m.hears("READY=1", "WATCHDOG=1"); state != "READY=1" {
		t.Errorf("got %q first, want that it is ready", state)
	}
	m.hears("WATCHDOG=1")
	signal(syscall.SIGHUP)
	if state := m.hears("RELOADING=1", "READY=1"); !strings.HasPrefix(state, "RELOADING=1\nMONOTONIC_USEC=") {
		t.Errorf("got %q, want since when it reloads", state)
	}
	m.hears("READY=1")
	m.hears("WATCHDOG=1")
	signal(syscall.SIGTERM)
	m.hears("STOPPING=1")
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// The variables of the service manager are not for children.
func TestNotifierTakesItsVariables(t *testing.T) {
	m := newSupervisor(t)
	t.Setenv("NOTIFY_SOCKET", m.path)
	t.Setenv("WATCHDOG_USEC", "3000000")
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	n := newNotifier()
	if n.socket != m.path || n.every != 1500*time.Millisecond {
		t.Errorf("got %+v", n)
	}
	for _, key := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} {
		if v, there := os.LookupEnv(key); there {
			t.Errorf("%s=%s is left for children", key, v)
		}
	}
	t.Setenv("WATCHDOG_USEC", "3000000")
	t.Setenv("WATCHDOG_PID", "1")
	if n := newNotifier(); n.every != 0 || n.send("READY=1") != nil {
		t.Errorf("got %+v and an error, want the watchdog of another process left alone", n)
	}
}

func TestQuotasOf(t *testing.T) {
	t.Parallel()
	c, err := configs.Parse([]byte(`version: 1
policy: p.yaml
providers: {local: }
quotas:
  jobs: 2
  repositories:
    - {match: "acme/mono*", jobs: 5}
    - {match: "acme/**"}
`), "agent.yaml")
	if err != nil {
		t.Fatal(err)
	}
	q, err := quotasOf(c.Quotas)
	if err != nil {
		t.Fatal(err)
	}
	for repository, want := range map[string]int{"acme/monorepo": 5, "acme/a/b": 0, "other/x": 2} {
		if got := q.Jobs("local", repository); got != want {
			t.Errorf("%s: got %d, want %d", repository, got, want)
		}
	}
	if q, err := quotasOf(configs.Quotas{}); err != nil || q.Jobs != nil {
		t.Errorf("no quotas: got %+v, %v, want no limit", q, err)
	}
}
