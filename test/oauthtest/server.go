// Package oauthtest starts a real OAuth 2.0 server for tests, with token
// exchange, introspection and revocation: test/servers/oauth, on loopback.
package oauthtest

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/test/servertest"
)

// Bounds. A start takes 0.1 s; the rest is room for a machine that does other
// things.
const (
	startTimeout = time.Minute
	pollInterval = 10 * time.Millisecond
)

// A Server is one process. What it knows ends with it.
type Server struct {
	url string
	cmd *exec.Cmd
}

// Start makes a server for a test, which exchanges tokens that are signed with
// the keys at that URL. It ends with tb, and by itself when the test dies. What
// goes wrong is fatal.
func Start(tb testing.TB, keys string) *Server {
	tb.Helper()
	programs, err := servertest.Dir(context.Background(), "oauth")
	if err != nil {
		tb.Fatalf("oauthtest: %v", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatalf("oauthtest: %v", err)
	}
	address := l.Addr().String()
	// The process gets the socket itself: nobody else can take the port.
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		tb.Fatalf("oauthtest: %v", err)
	}
	_ = l.Close() // the file is another descriptor of it
	logPath := filepath.Join(tb.TempDir(), "log")
	log, err := os.Create(logPath)
	if err != nil {
		tb.Fatalf("oauthtest: %v", err)
	}
	cmd := exec.Command(filepath.Join(programs, "oauth"), address, keys)
	cmd.ExtraFiles, cmd.Stdout, cmd.Stderr = []*os.File{f}, log, log
	cmd.Env = []string{"GOMAXPROCS=2"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	s := &Server{"http://" + address, cmd}
	started, done := make(chan error, 1), make(chan struct{})
	go func() { // the cleanup waits for it
		runtime.LockOSThread() // the death signal is bound to the thread
		defer runtime.UnlockOSThread()
		defer close(done)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // it is killed
		}
	}()
	err = <-started
	_, _ = f.Close(), log.Close()
	if err != nil {
		tb.Fatalf("oauthtest: %v", err)
	}
	tb.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
	})
	if err := s.ready(done); err != nil {
		b, _ := os.ReadFile(logPath)
		tb.Fatalf("oauthtest: %v\n%s", err, b)
	}
	return s
}

// ready waits until the server answers.
func (s *Server) ready(done <-chan struct{}) error {
	bound := time.After(startTimeout)
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		err := s.tell(context.Background(), "up")
		if err == nil {
			return nil
		}
		select {
		case <-done:
			return fmt.Errorf("ended while starting: %w", err)
		case <-bound:
			return fmt.Errorf("not ready within %v: %w", startTimeout, err)
		case <-tick.C:
		}
	}
}

// URL is the issuer's.
func (s *Server) URL() string { return s.url }

// Down makes the server drop every connection. Up ends that, with all that it
// knew.
func (s *Server) Down(ctx context.Context) error { return s.tell(ctx, "down") }

// Up undoes Down.
func (s *Server) Up(ctx context.Context) error { return s.tell(ctx, "up") }

func (s *Server) tell(ctx context.Context, what string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url+"/test/"+what, nil)
	if err != nil {
		return err
	}
	req.Close = true
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	_, _ = io.Copy(io.Discard, res.Body)
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", what, res.Status)
	}
	return res.Body.Close()
}

// Pause freezes the server: the kernel still accepts connections, nobody
// answers. Resume undoes it.
func (s *Server) Pause() error { return s.cmd.Process.Signal(syscall.SIGSTOP) }

// Resume lets a paused server go on.
func (s *Server) Resume() error { return s.cmd.Process.Signal(syscall.SIGCONT) }
