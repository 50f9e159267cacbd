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
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/test/servertest"
)

// startTimeout bounds a start, which takes 0.1 s; the rest is room for a machine that
// does other things.
const startTimeout = time.Minute

// A Server is one process. What it knows ends with it.
type Server struct {
	servertest.Process
	url string
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
	cmd := exec.Command(filepath.Join(programs, "oauth"), address, keys)
	cmd.ExtraFiles, cmd.Env = []*os.File{f}, []string{"GOMAXPROCS=2"}
	log := filepath.Join(tb.TempDir(), "log")
	s := &Server{url: "http://" + address}
	err = s.Run(cmd, log)
	_ = f.Close() // the process has it
	if err != nil {
		tb.Fatalf("oauthtest: %v", err)
	}
	tb.Cleanup(func() { _ = s.Stop(context.Background()) })
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if err := s.Until(ctx, func() error { return s.tell(ctx, "up") }); err != nil {
		tb.Fatalf("oauthtest: %v\n%s", err, servertest.Tail(log))
	}
	return s
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
