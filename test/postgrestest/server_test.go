package postgrestest_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/mayfly-ci/mayfly/test/postgrestest"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("POSTGRESTEST_CHILD"); dir != "" {
		os.Exit(child(dir))
	}
	os.Exit(m.Run())
}

// child starts a server, says where, and waits to be killed.
func child(dir string) int {
	s, err := postgrestest.New(context.Background(), dir)
	if err != nil {
		fmt.Println("error:", err)
		return 1
	}
	fmt.Println(s.Port())
	_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
	return 0
}

func login(ctx context.Context, s *postgrestest.Server, password string) (*pgconn.PgConn, error) {
	dsn := fmt.Sprintf("host=%s port=%d user=%s dbname=%s sslmode=disable", s.Host(), s.Port(), postgrestest.User, postgrestest.Database)
	c, err := pgconn.ParseConfig(dsn)
	if err != nil {
		return nil, err
	}
	c.Password = password
	return pgconn.ConnectConfig(ctx, c)
}

// ask returns the first field of the answer to query on a connection of its own.
func ask(t *testing.T, s *postgrestest.Server, query string) string {
	t.Helper()
	conn, err := login(t.Context(), s, s.Password())
	if err != nil {
		t.Fatalf("login: %v", err)
	}
	defer func() { _ = conn.Close(t.Context()) }()
	res, err := conn.Exec(t.Context(), query).ReadAll()
	if err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	if len(res) == 0 || len(res[0].Rows) == 0 {
		return ""
	}
	return string(res[0].Rows[0][0])
}

func TestWrongPasswordIsRefused(t *testing.T) {
	t.Parallel()
	s := postgrestest.Start(t)
	for _, password := range []string{"", "wrong", s.Password() + "x"} {
		_, err := login(t.Context(), s, password)
		var refusal *pgconn.PgError
		if !errors.As(err, &refusal) || refusal.Code != "28P01" {
			t.Errorf("login with %q: got %v, want SQLSTATE 28P01", password, err)
		}
	}
	if got := ask(t, s, "show listen_addresses"); got != "127.0.0.1" {
		t.Errorf("listens on %q, want loopback only", got)
	}
}

func TestStopRestartKill(t *testing.T) {
	t.Parallel()
	s := postgrestest.Start(t, "work_mem=1MB")
	ask(t, s, "create table kept (a int)")
	port := s.Port()
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if conn, err := net.Dial("tcp", net.JoinHostPort(s.Host(), strconv.Itoa(port))); err == nil {
		t.Errorf("somebody listens on %v after Stop", conn.RemoteAddr())
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Errorf("second Stop: %v", err)
	}
	if err := s.Restart(t.Context(), "work_mem=2MB"); err != nil {
		t.Fatal(err)
	}
	if got := ask(t, s, "show work_mem"); s.Port() != port || got != "2MB" {
		t.Errorf("after Restart port %d and work_mem %s, want %d and 2MB", s.Port(), got, port)
	}
	if err := s.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := ask(t, s, "select count(*) from kept"); got != "0" {
		t.Errorf("after Kill the table has %q rows, want 0", got)
	}
	if log, err := s.Log(); err != nil || !strings.Contains(log, "not properly shut down") {
		t.Errorf("log after Kill: %v, want word of a recovery in\n%s", err, log)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.Dir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("directory after Close: %v, want none", err)
	}
}

func TestPause(t *testing.T) {
	t.Parallel()
	s := postgrestest.Start(t)
	conn, err := login(t.Context(), s, s.Password())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Pause(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := conn.Exec(ctx, "select 1").ReadAll(); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("query while paused: %v, want no answer", err)
	}
	if _, err := login(ctx, s, s.Password()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("login while paused: %v, want no answer", err)
	}
	if err := s.Resume(); err != nil {
		t.Fatal(err)
	}
	if got := ask(t, s, "select 1"); got != "1" {
		t.Errorf("after Resume: got %q, want 1", got)
	}
	if err := s.Pause(); err != nil { // and a paused server can be stopped
		t.Fatal(err)
	}
	if err := s.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestDiesWithItsMaker kills a process that started a server.
func TestDiesWithItsMaker(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "mayfly-postgres-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(os.Environ(), "POSTGRESTEST_CHILD="+filepath.Join(dir, "pg"))
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	port := strings.TrimSpace(line)
	pidFile, err := os.ReadFile(filepath.Join(dir, "pg", "data", "postmaster.pid"))
	if err != nil {
		t.Fatalf("child says %q: %v", port, err)
	}
	first, _, _ := strings.Cut(string(pidFile), "\n")
	pid, err := strconv.Atoi(first)
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(time.Minute)
	for syscall.Kill(pid, 0) == nil {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("postmaster %d runs a minute after its maker was killed, want it gone", pid)
		}
	}
}
