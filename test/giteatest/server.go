// Package giteatest starts a real Gitea for tests and benchmarks: a server of
// its own that listens on loopback only, with an administrator, repositories,
// and Actions. It can be stopped, killed and started again with all it knows.
//
// The programs are built once, from their Go modules, by test/scripts/server.sh
// and kept outside of the tree. Gitea is run by tests and never linked.
package giteatest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/test/servertest"
)

// Bounds. A start takes 2 s and a stop 0.2 s; the rest is room for a machine
// that does other things.
const (
	startTimeout = 3 * time.Minute
	stopTimeout  = time.Minute
	pollInterval = 20 * time.Millisecond
)

// Host is the name under which jobs know the server: 127.0.0.1 is, in a box, the
// job's own. A rule of the policy resolves it to 127.0.0.1.
const Host = "gitea.test"

// The administrator, who owns what tests make.
const (
	Admin         = "lab"
	adminPassword = "Lab-pass-1"
)

// A Config says what is special about a server. The zero value is fine.
type Config struct {
	// Settings go to the end of app.ini and win: sections with keys.
	Settings string
}

// A Server is one Gitea. Start, Stop, Kill and Close may not be called at the
// same time; everything else may, by anybody.
type Server struct {
	programs string // gitea, gitea-runner, static
	dir      string
	port     int
	held     servertest.Port
	token    string

	client *http.Client

	cmd  *exec.Cmd
	done chan struct{} // closed when it is gone
}

// Prepare builds the programs if they are not there, which takes minutes, once,
// and lets the tests that this process starts find them. It is for TestMain.
func Prepare() error { return servertest.Prepare("gitea") }

// New makes a server below dir, which it creates, and starts it. It ends with
// Close, and by itself when the calling process dies.
func New(ctx context.Context, dir string, c Config) (*Server, error) {
	programs, err := servertest.Dir(ctx, "gitea")
	if err != nil {
		return nil, err
	}
	s := &Server{programs: programs, dir: dir, client: &http.Client{Timeout: time.Minute}}
	err = s.prepare(c)
	if err == nil {
		err = s.Start(ctx)
	}
	if err == nil {
		err = s.administrate(ctx)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("gitea in %s: %w", dir, err), s.Close())
	}
	return s, nil
}

// Start is New for a test: the server ends and its files go with tb, and what
// goes wrong is fatal.
func Start(tb testing.TB, c Config) *Server {
	tb.Helper()
	s, err := New(context.Background(), filepath.Join(tb.TempDir(), "gitea"), c)
	if err != nil {
		tb.Fatalf("giteatest: %v", err)
	}
	tb.Cleanup(func() {
		if tb.Failed() {
			tb.Logf("gitea said:\n%s", tail(s.Log()))
		}
		if err := s.Close(); err != nil {
			tb.Errorf("giteatest: %v", err)
		}
	})
	return s
}

// appINI is the whole configuration. Nothing in it leaves the machine.
const appINI = `APP_NAME = test
RUN_MODE = prod
RUN_USER = %[1]s
WORK_PATH = %[2]s
I_AM_BEING_UNSAFE_RUNNING_AS_ROOT = true
[server]
PROTOCOL = http
HTTP_ADDR = 127.0.0.1
HTTP_PORT = %[3]d
DOMAIN = %[4]s
ROOT_URL = http://%[4]s:%[3]d/
STATIC_ROOT_PATH = %[5]s/static
APP_DATA_PATH = %[2]s/data
DISABLE_SSH = true
OFFLINE_MODE = true
LFS_START_SERVER = false
[database]
DB_TYPE = sqlite3
PATH = %[2]s/data/gitea.db
SQLITE_JOURNAL_MODE = WAL
[repository]
ROOT = %[2]s/data/repos
[security]
INSTALL_LOCK = true
SECRET_KEY = test
PASSWORD_HASH_ALGO = pbkdf2_v1
[service]
DISABLE_REGISTRATION = true
[session]
PROVIDER = memory
[picture]
DISABLE_GRAVATAR = true
[indexer]
ISSUE_INDEXER_TYPE = db
[log]
MODE = console
LEVEL = Info
[actions]
ENABLED = true
DEFAULT_ACTIONS_URL = self
[cron.update_checker]
ENABLED = false
%[6]s
`

func (s *Server) prepare(c Config) error {
	me, err := user.Current()
	if err != nil {
		return err
	}
	if s.held, err = servertest.Hold(); err != nil {
		return err
	}
	s.port = s.held.Number()
	err = errors.Join(os.MkdirAll(filepath.Dir(s.ini()), 0o755), os.MkdirAll(filepath.Join(s.dir, "home"), 0o755))
	return errors.Join(err, os.WriteFile(s.ini(), fmt.Appendf(nil, appINI, me.Username, s.dir, s.port, Host, s.programs, c.Settings), 0o600))
}

func (s *Server) ini() string     { return filepath.Join(s.dir, "custom/conf/app.ini") }
func (s *Server) logFile() string { return filepath.Join(s.dir, "log.txt") }

// Dir is the directory given to New.
func (s *Server) Dir() string { return s.dir }

// Port is the TCP port on 127.0.0.1. It stays the same over Stop and Start.
func (s *Server) Port() int { return s.port }

// URL is where this machine reaches the server.
func (s *Server) URL() string { return fmt.Sprintf("http://127.0.0.1:%d", s.port) }

// Runner is the program of Gitea's own runner.
func (s *Server) Runner() string { return filepath.Join(s.programs, "gitea-runner") }

// Database is the server's SQLite file, to be opened for reading only.
func (s *Server) Database() string { return filepath.Join(s.dir, "data/gitea.db") }

// Log is what the server has written so far.
func (s *Server) Log() string {
	b, err := os.ReadFile(s.logFile())
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// command runs gitea with this server's configuration, and nothing of the
// caller's environment but the path to git.
func (s *Server) command(args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(s.programs, "gitea"), append([]string{"--config", s.ini()}, args...)...)
	cmd.Dir = s.dir
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + filepath.Join(s.dir, "home"), "GITEA_WORK_DIR=" + s.dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// Start starts a server that does not run, on the same port, with all it knew.
func (s *Server) Start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	log, err := os.OpenFile(s.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	cmd, started, done := s.command("web"), make(chan error, 1), make(chan struct{})
	cmd.Stdout, cmd.Stderr = log, log
	go func() { // end waits for it
		runtime.LockOSThread() // the death signal is bound to the thread
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
		return errors.Join(err, s.Kill())
	}
	return nil
}

// ready waits until the server answers.
func (s *Server) ready(ctx context.Context) error {
	for {
		err := s.API(ctx, http.MethodGet, "/version", nil, nil)
		if err == nil {
			return nil
		}
		select {
		case <-s.done:
			return fmt.Errorf("gitea ended while starting: %s", tail(s.Log()))
		case <-ctx.Done():
			return fmt.Errorf("gitea is not ready: %w: %w: %s", context.Cause(ctx), err, tail(s.Log()))
		case <-time.After(pollInterval):
		}
	}
}

// administrate makes the administrator and a token.
func (s *Server) administrate(ctx context.Context) error {
	if _, err := s.run(ctx, "admin", "user", "create", "--username", Admin, "--password", adminPassword,
		"--email", Admin+"@example.invalid", "--admin", "--must-change-password=false"); err != nil {
		return err
	}
	token, err := s.run(ctx, "admin", "user", "generate-access-token", "--username", Admin, "--token-name", "test", "--scopes", "all", "--raw")
	s.token = token
	return err
}

// run runs a command of gitea for what it prints.
func (s *Server) run(ctx context.Context, args ...string) (string, error) {
	cmd := s.command(args...)
	cmd.SysProcAttr = nil
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() }) // dead already
	defer stop()
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("gitea %s: %w: %s%s", strings.Join(args[:3], " "), err, tail(out.String()), tail(complaint.String()))
	}
	return strings.TrimSpace(out.String()), nil
}

// Stop ends the server in order. Stopping twice is no error.
func (s *Server) Stop() error { return s.end(syscall.SIGTERM) }

// Kill ends the server at once, as a crash would.
func (s *Server) Kill() error { return s.end(syscall.SIGKILL) }

func (s *Server) end(how syscall.Signal) error {
	if s.cmd == nil {
		return nil
	}
	s.client.CloseIdleConnections()
	if err := s.cmd.Process.Signal(how); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-s.done:
		s.cmd = nil
		return nil
	case <-time.After(stopTimeout):
		return fmt.Errorf("gitea (process %d) still runs after %v", s.cmd.Process.Pid, stopTimeout)
	}
}

// Close kills the server and removes its directory.
func (s *Server) Close() error {
	if err := s.Kill(); err != nil {
		return err
	}
	s.held.Free()
	return os.RemoveAll(s.dir)
}

// Pid is the server's process.
func (s *Server) Pid() int { return s.cmd.Process.Pid }

// Address is host and port as jobs know them.
func (s *Server) Address() string { return net.JoinHostPort(Host, strconv.Itoa(s.port)) }

func tail(s string) string { return strings.TrimSpace(s[max(0, len(s)-4000):]) }
