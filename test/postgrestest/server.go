// Package postgrestest starts a real PostgreSQL for tests, demos and
// benchmarks: a cluster of its own that listens on loopback only, refuses every
// wrong password, and can be stopped, crashed and frozen.
//
// Initialising a cluster takes seconds and copying one does not, so that an
// initialised template is kept in the user's cache directory (template.go).
package postgrestest

import (
	"context"
	"errors"
	"fmt"
	"net"
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

	"github.com/mayfly-ci/mayfly/test/servertest"
)

// Bounds. A start from the template takes 0.1 s and a crash recovery 0.2 s; the
// rest is room for a machine that does other things.
const (
	startTimeout = 60 * time.Second
	stopTimeout  = 30 * time.Second
	pollInterval = 5 * time.Millisecond
)

// User and Database are those of the administrator, a superuser.
const (
	User     = "postgres"
	Database = "postgres"
)

// A Server is one PostgreSQL cluster. Its methods may not be called at the
// same time, except that clients may do with it what they like.
type Server struct {
	install  install
	account  account
	dir      string // holds data, socket and log
	port     int
	password string
	settings []string

	cmd  *exec.Cmd
	done chan struct{} // closed when the postmaster is gone
}

// New makes a cluster below dir, which it creates, and starts it. Settings are
// "name=value" pairs of postgresql.conf. When the caller is root the server
// runs as postgres or nobody, to whom every parent of dir must be open. The
// server ends with Close, and by itself when the calling process dies.
func New(ctx context.Context, dir string, settings ...string) (*Server, error) {
	in, err := findInstall()
	if err != nil {
		return nil, err
	}
	acc, err := serverAccount()
	if err != nil {
		return nil, err
	}
	s := &Server{install: in, account: acc, dir: dir, settings: settings}
	if err := s.prepare(ctx); err != nil {
		return nil, fmt.Errorf("postgres in %s: %w", dir, err)
	}
	if err := s.startOnFreePort(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("postgres in %s: %w", dir, err), s.Close())
	}
	return s, nil
}

// Start is New for a test: the server ends and its files go with tb, and what
// goes wrong is fatal.
func Start(tb testing.TB, settings ...string) *Server {
	tb.Helper()
	// tb.TempDir is closed to the server's account when the test is root.
	dir, err := os.MkdirTemp("", "mayfly-postgres-")
	if err != nil {
		tb.Fatalf("postgrestest: %v", err)
	}
	tb.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			tb.Errorf("postgrestest: %v", err)
		}
	})
	if err := os.Chmod(dir, 0o711); err != nil {
		tb.Fatalf("postgrestest: %v", err)
	}
	s, err := New(context.Background(), filepath.Join(dir, "pg"), settings...)
	if err != nil {
		tb.Fatalf("postgrestest: %v", err)
	}
	tb.Cleanup(func() {
		if err := s.Close(); err != nil {
			tb.Errorf("postgrestest: %v", err)
		}
	})
	return s
}

// Host is the address the server listens on.
func (s *Server) Host() string { return "127.0.0.1" }

// Port is the TCP port. It stays the same over Stop and Restart.
func (s *Server) Port() int { return s.port }

// Password is the administrator's. It is random, made with the template.
func (s *Server) Password() string { return s.password }

// Dir is the directory given to New, open to the account of the server.
func (s *Server) Dir() string { return s.dir }

// Log is what the server has written so far.
func (s *Server) Log() (string, error) {
	b, err := os.ReadFile(s.logFile())
	return string(b), err
}

func (s *Server) logFile() string { return filepath.Join(s.dir, "log") }
func (s *Server) data() string    { return filepath.Join(s.dir, "data") }

// Grab gives a file below Dir to the account of the server, for its eyes only.
func (s *Server) Grab(path string) error {
	return errors.Join(os.Chmod(path, 0o600), os.Chown(path, s.account.uid, s.account.gid))
}

// Stop ends all sessions and shuts the server down in order. Nothing listens
// on the port afterwards. Stopping twice is no error.
func (s *Server) Stop(ctx context.Context) error { return s.end(ctx, syscall.SIGINT) }

// Kill ends the server and all sessions at once and without a checkpoint: the
// next start recovers from the log, as after a crash.
func (s *Server) Kill(ctx context.Context) error { return s.end(ctx, syscall.SIGQUIT) }

// Restart stops the server if it runs and starts it on the same port, with
// further settings that win over the earlier ones.
func (s *Server) Restart(ctx context.Context, settings ...string) error {
	if err := s.Stop(ctx); err != nil {
		return err
	}
	s.settings = append(s.settings, settings...)
	return s.start(ctx)
}

// Pause freezes the server and all its sessions: the kernel still accepts
// connections, nobody answers. Resume, Stop and Close undo it.
func (s *Server) Pause() error {
	if s.cmd == nil {
		return nil
	}
	if err := servertest.Freeze(s.cmd.Process.Pid); err != nil { // so that it starts nothing new
		return err
	}
	children, err := childrenOf(s.cmd.Process.Pid)
	if err != nil {
		return err
	}
	return servertest.Freeze(children...)
}

// Resume lets a paused server go on.
func (s *Server) Resume() error {
	if s.cmd == nil {
		return nil
	}
	pid := s.cmd.Process.Pid
	if err := s.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		if errors.Is(err, os.ErrProcessDone) {
			return nil
		}
		return err
	}
	children, err := childrenOf(pid)
	if err != nil {
		return err
	}
	for _, child := range children {
		if err := syscall.Kill(child, syscall.SIGCONT); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("resume session %d: %w", child, err)
		}
	}
	return nil
}

// Close stops the server and removes its directory.
func (s *Server) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	if err := s.Kill(ctx); err != nil {
		return err
	}
	return os.RemoveAll(s.dir)
}

func (s *Server) prepare(ctx context.Context) error {
	template, err := s.install.template(ctx, s.account)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(s.dir), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(s.dir, 0o711); err != nil {
		return err
	}
	password, err := os.ReadFile(filepath.Join(template, "password"))
	if err != nil {
		return err
	}
	s.password = string(password)
	if err := copyTree(ctx, filepath.Join(template, "data"), s.data(), s.account); err != nil {
		return err
	}
	return os.Chown(s.dir, s.account.uid, s.account.gid)
}

// startOnFreePort starts on a port that was free a moment ago, and once more on
// another if somebody was faster.
func (s *Server) startOnFreePort(ctx context.Context) error {
	var errs []error
	for range 3 {
		l, err := net.Listen("tcp", net.JoinHostPort(s.Host(), "0"))
		if err != nil {
			return err
		}
		s.port = l.Addr().(*net.TCPAddr).Port
		if err := l.Close(); err != nil {
			return err
		}
		if err = s.start(ctx); err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func (s *Server) command(log *os.File) *exec.Cmd {
	args := []string{"-D", s.data(), "-p", strconv.Itoa(s.port)}
	settings := slices.Concat([]string{
		"listen_addresses=" + s.Host(), "unix_socket_directories=" + s.dir,
		"fsync=off", "full_page_writes=off", "shared_buffers=16MB", "max_prepared_transactions=10",
		"max_connections=50", "wal_level=minimal", "max_wal_senders=0", "log_min_messages=notice",
	}, s.settings)
	for _, setting := range settings {
		args = append(args, "-c", setting)
	}
	cmd := exec.Command(filepath.Join(s.install.bin, "postgres"), args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, log, log
	cmd.Env = []string{"LC_ALL=C", "TZ=UTC"}
	cmd.SysProcAttr = s.account.attributes()
	cmd.SysProcAttr.Pdeathsig = syscall.SIGQUIT
	return cmd
}

// start runs the postmaster and waits until it takes connections.
func (s *Server) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	log, err := os.OpenFile(s.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()

	cmd, started, done := s.command(log), make(chan error, 1), make(chan struct{})
	go func() { // Stop waits for it
		// The death signal is bound to the thread that starts the child, so
		// that this one is kept until the child is gone.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(done)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended is in its log
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	s.cmd, s.done = cmd, done
	if err := s.ready(ctx); err != nil {
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		return errors.Join(err, s.Kill(stop))
	}
	return nil
}

// ready waits for the word that the postmaster leaves in its pid file.
func (s *Server) ready(ctx context.Context) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	pid := strconv.Itoa(s.cmd.Process.Pid)
	for {
		b, err := os.ReadFile(filepath.Join(s.data(), "postmaster.pid"))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if l := strings.Split(string(b), "\n"); len(l) > 7 && l[0] == pid && strings.TrimSpace(l[7]) == "ready" {
			return nil
		}
		select {
		case <-s.done:
			log, err := s.Log()
			return errors.Join(fmt.Errorf("server ended while starting: %s", log[max(0, len(log)-1000):]), err)
		case <-ctx.Done():
			return fmt.Errorf("server not ready: %w", context.Cause(ctx))
		case <-tick.C:
		}
	}
}

func (s *Server) end(ctx context.Context, how syscall.Signal) error {
	if s.cmd == nil {
		return nil
	}
	if err := s.Resume(); err != nil {
		return err
	}
	if err := s.cmd.Process.Signal(how); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-s.done:
		s.cmd = nil
		return nil
	case <-ctx.Done():
		return fmt.Errorf("postgres still running: %w", context.Cause(ctx))
	}
}
