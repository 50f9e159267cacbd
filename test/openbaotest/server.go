// Package openbaotest starts a real OpenBao for tests: a server of its own with
// Vault's API over TLS, on loopback, that keeps what it knows in files, so that
// it can be stopped and started again.
package openbaotest

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
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

// Bounds. A start takes 0.3 s; the rest is room for a machine that does other
// things.
const (
	startTimeout = 60 * time.Second
	pollInterval = 20 * time.Millisecond
)

// A Server is one OpenBao. Its methods may not be called at the same time,
// except Do and what clients like.
type Server struct {
	program, dir string
	address      string
	client       *http.Client
	root, unseal string

	cmd  *exec.Cmd
	done chan struct{} // closed when the process is gone
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
	s := &Server{program: filepath.Join(programs, "openbao"), dir: dir}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	tb.Cleanup(func() { _ = s.Stop(context.Background()) })
	if err := errors.Join(s.prepare(), s.start(ctx), s.initialise(ctx)); err != nil {
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
	s := &Server{address: address, root: token}
	s.trust(pem)
	return s, nil
}

// trust makes the client of a server with that certificate.
func (s *Server) trust(cert []byte) {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(cert)
	s.client = &http.Client{
		Timeout:   30 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}},
	}
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
func (s *Server) Log() string {
	b, err := os.ReadFile(filepath.Join(s.dir, "log"))
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-2000):])
}

// prepare writes the files of a server on a port that was free a moment ago.
func (s *Server) prepare() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	listen := l.Addr().String()
	s.address = "https://" + listen
	if err := errors.Join(l.Close(), s.certificate()); err != nil {
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
`, s.dir, listen), 0o600)
}

func (s *Server) certificate() error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "openbaotest"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	s.trust(cert)
	return errors.Join(
		os.WriteFile(s.CAFile(), cert, 0o600),
		os.WriteFile(filepath.Join(s.dir, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600))
}

// start runs the process and waits until it answers at all.
func (s *Server) start(ctx context.Context) error {
	log, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command(s.program, "server", "-config="+filepath.Join(s.dir, "config.hcl"))
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, log, log
	cmd.Env = []string{"HOME=" + s.dir, "PATH=/usr/bin:/bin", "GOMAXPROCS=2"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, done := make(chan error, 1), make(chan struct{})
	go func() { // Stop waits for it
		// The death signal is bound to the thread that starts the child.
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
	return s.until(ctx, "answers", http.StatusOK, http.StatusTooManyRequests, http.StatusNotImplemented, http.StatusServiceUnavailable)
}

// until waits for a state of health.
func (s *Server) until(ctx context.Context, what string, states ...int) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.address+"/v1/sys/health", nil)
		if err != nil {
			return err
		}
		if res, err := s.client.Do(req); err == nil {
			_, _ = io.Copy(io.Discard, res.Body)
			_ = res.Body.Close()
			for _, state := range states {
				if res.StatusCode == state {
					return nil
				}
			}
		}
		select {
		case <-s.done:
			return errors.New("server ended while starting")
		case <-ctx.Done():
			return fmt.Errorf("not within %v: server %s: %w", startTimeout, what, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

func (s *Server) initialise(ctx context.Context) error {
	if s.done == nil {
		return nil // start has said why
	}
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
	return s.until(ctx, "is open", http.StatusOK)
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

// Stop kills the server: nothing listens on the port afterwards. Stopping twice
// is no error.
func (s *Server) Stop(ctx context.Context) error {
	if s.cmd == nil {
		return nil
	}
	if err := s.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-s.done:
		s.cmd = nil
		s.client.CloseIdleConnections()
		return nil
	case <-ctx.Done():
		return fmt.Errorf("openbao still running: %w", context.Cause(ctx))
	}
}

// Restart starts it again on the same port, with all that it knew.
func (s *Server) Restart(ctx context.Context) error {
	if err := errors.Join(s.Stop(ctx), s.start(ctx)); err != nil {
		return err
	}
	return s.open(ctx)
}

// Pause freezes the server: the kernel still accepts connections, nobody
// answers. Resume and Stop undo it.
func (s *Server) Pause() error { return s.cmd.Process.Signal(syscall.SIGSTOP) }

// Resume lets a paused server go on.
func (s *Server) Resume() error { return s.cmd.Process.Signal(syscall.SIGCONT) }
