// Package openbaotest starts a real OpenBao for tests: a server of its own with
// Vault's API over TLS, on loopback, that keeps what it knows in files, so that
// it can be stopped and started again.
package openbaotest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/test/servertest"
)

// startTimeout bounds a start, which takes 0.3 s; the rest is room for a machine that
// does other things.
const startTimeout = 60 * time.Second

// A Server is one OpenBao. Its methods may not be called at the same time,
// except Do and what clients like.
type Server struct {
	servertest.Process
	program, dir string
	address      string
	client       *http.Client
	root, unseal string
}

// Start makes a server for a test, with nothing in it but the defaults. It ends
// with tb, and by itself when the test dies. What goes wrong is fatal.
func Start(tb testing.TB) *Server {
	tb.Helper()
	dir := tb.TempDir()
	programs, err := servertest.Dir(context.Background(), "openbao")
	if err != nil {
		tb.Fatalf("openbaotest: %v", err)
	}
	port, err := servertest.Hold()
	if err != nil {
		tb.Fatalf("openbaotest: %v", err)
	}
	tb.Cleanup(port.Free)
	s := &Server{program: filepath.Join(programs, "openbao"), dir: dir, address: "https://" + port.Address()}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	tb.Cleanup(func() { _ = s.Stop(context.Background()) })
	if err = s.prepare(); err == nil {
		err = s.start(ctx)
	}
	if err == nil {
		err = s.initialise(ctx)
	}
	if err != nil {
		tb.Fatalf("openbaotest: %v\n%s", err, s.Log())
	}
	return s
}

// At is a server that somebody else started, for Do.
func At(address, caFile, token string) (*Server, error) {
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, err
	}
	client, err := servertest.Client(pem)
	return &Server{address: address, root: token, client: client}, err
}

// Address is the URL of the server.
func (s *Server) Address() string { return s.address }

// CAFile is the certificate that it proves itself with, in PEM.
func (s *Server) CAFile() string { return filepath.Join(s.dir, "cert.pem") }

// Client is one that trusts the server and nobody else.
func (s *Server) Client() *http.Client { return s.client }

// RootToken may do everything.
func (s *Server) RootToken() string { return s.root }

// Log is the end of what the server has written so far.
func (s *Server) Log() string { return servertest.Tail(filepath.Join(s.dir, "log")) }

// prepare writes the files of a server.
func (s *Server) prepare() error {
	cert, key, err := servertest.Certificate("openbaotest")
	if err == nil {
		s.client, err = servertest.Client(cert)
	}
	err = errors.Join(err, os.WriteFile(s.CAFile(), cert, 0o600), os.WriteFile(filepath.Join(s.dir, "key.pem"), key, 0o600))
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(s.dir, "config.hcl"), fmt.Appendf(nil, `
storage "file" { path = "%[1]s/data" }
listener "tcp" {
  address       = "%[2]s"
  tls_cert_file = "%[1]s/cert.pem"
  tls_key_file  = "%[1]s/key.pem"
}
api_addr = "https://%[2]s"
`, s.dir, strings.TrimPrefix(s.address, "https://")), 0o600)
}

// start runs the process and waits until it answers at all.
func (s *Server) start(ctx context.Context) error {
	cmd := exec.Command(s.program, "server", "-config="+filepath.Join(s.dir, "config.hcl"))
	cmd.Dir = s.dir
	cmd.Env = []string{"HOME=" + s.dir, "PATH=/usr/bin:/bin", "GOMAXPROCS=2"}
	if err := s.Run(cmd, filepath.Join(s.dir, "log")); err != nil {
		return err
	}
	return s.until(ctx, http.StatusOK, http.StatusTooManyRequests, http.StatusNotImplemented, http.StatusServiceUnavailable)
}

// until waits for a state of health.
func (s *Server) until(ctx context.Context, states ...int) error {
	return s.Until(ctx, func() error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.address+"/v1/sys/health", nil)
		if err != nil {
			return err
		}
		res, err := s.client.Do(req)
		if err != nil {
			return err
		}
		_, _ = io.Copy(io.Discard, res.Body)
		_ = res.Body.Close()
		if !slices.Contains(states, res.StatusCode) {
			return fmt.Errorf("it answers %s", res.Status)
		}
		return nil
	})
}

func (s *Server) initialise(ctx context.Context) error {
	var made struct {
		Keys []string `json:"keys_base64"`
		Root string   `json:"root_token"`
	}
	err := s.do(ctx, http.MethodPut, "sys/init", map[string]int{"secret_shares": 1, "secret_threshold": 1}, &made)
	if err != nil {
		return err
	}
	s.root, s.unseal = made.Root, made.Keys[0]
	return s.open(ctx)
}

func (s *Server) open(ctx context.Context) error {
	if err := s.do(ctx, http.MethodPut, "sys/unseal", map[string]string{"key": s.unseal}, nil); err != nil {
		return err
	}
	return s.until(ctx, http.StatusOK)
}

// Do makes a request as root. into gets the answer, unless it is nil.
func (s *Server) Do(ctx context.Context, method, path string, body, into any) error {
	return s.do(ctx, method, path, body, into)
}

func (s *Server) do(ctx context.Context, method, path string, body, into any) error {
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, s.address+"/v1/"+path, bytes.NewReader(text))
	if err != nil {
		return err
	}
	req.Header.Set("X-Vault-Token", s.root)
	res, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %d %s", method, path, res.StatusCode, b)
	}
	if into == nil {
		return nil
	}
	return json.Unmarshal(b, into)
}

// Restart starts it again on the same port, with all that it knew.
func (s *Server) Restart(ctx context.Context) error {
	s.client.CloseIdleConnections()
	if err := errors.Join(s.Stop(ctx), s.start(ctx)); err != nil {
		return err
	}
	return s.open(ctx)
}
