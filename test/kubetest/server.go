// Package kubetest starts a real API server of Kubernetes for tests, with an etcd of
// its own, on loopback. There is no controller and no node: what is made there
// stays as it is.
package kubetest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
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

// Bounds. A start takes 7 s; the rest is room for a machine that does other things.
const (
	startTimeout = 3 * time.Minute
	pollInterval = 50 * time.Millisecond
)

// AdminToken may do everything.
const AdminToken = "kubetest-admin"

// A Server is one API server.
type Server struct {
	program, dir string
	address      string // https://127.0.0.1:PORT
	etcd, peer   string // http://127.0.0.1:PORT
	client       *http.Client
	ended        []<-chan struct{} // closed when a program is gone
}

// Start makes an empty cluster for a test. It ends with tb, and by itself when the
// test dies. What goes wrong is fatal.
func Start(tb testing.TB) *Server {
	tb.Helper()
	programs, err := servertest.Dir(context.Background(), "kubernetes")
	if err != nil {
		tb.Fatalf("kubetest: %v", err)
	}
	s := &Server{program: filepath.Join(programs, "kube-apiserver"), dir: tb.TempDir()}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if err := errors.Join(s.ports(), s.keys()); err != nil {
		tb.Fatalf("kubetest: %v", err)
	}
	for _, c := range []*exec.Cmd{s.database(), s.server()} {
		if err := s.run(tb, c); err != nil {
			tb.Fatalf("kubetest: %v", err)
		}
	}
	if err := s.ready(ctx); err != nil {
		tb.Fatalf("kubetest: %v\n%s\n%s", err, s.log("etcd"), s.log("kube-apiserver"))
	}
	return s
}

// Address is the URL of the API server.
func (s *Server) Address() string { return s.address }

// CAFile is the certificate that it proves itself with, in PEM.
func (s *Server) CAFile() string { return filepath.Join(s.dir, "certs", "apiserver.crt") }

// Client is one that trusts the server and nobody else.
func (s *Server) Client() *http.Client { return s.client }

func (s *Server) log(program string) string {
	b, err := os.ReadFile(filepath.Join(s.dir, program+".log"))
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-2000):])
}

// ports chooses those that were free a moment ago, all at once, so that they differ.
func (s *Server) ports() error {
	var taken [3]string
	for n := range taken {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		defer func() { _ = l.Close() }()
		taken[n] = l.Addr().String()
	}
	s.address, s.etcd, s.peer = "https://"+taken[0], "http://"+taken[1], "http://"+taken[2]
	return nil
}

// keys writes those that service accounts' tokens are signed with, and who the
// administrator is.
func (s *Server) keys() error {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(s.file("sa.key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600),
		os.WriteFile(s.file("sa.pub"), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), 0o600),
		os.WriteFile(s.file("tokens.csv"), []byte(AdminToken+`,admin,1,"system:masters"`+"\n"), 0o600))
}

func (s *Server) file(name string) string { return filepath.Join(s.dir, name) }

func (s *Server) database() *exec.Cmd {
	return exec.Command("etcd", "--data-dir", s.file("etcd"), "--listen-client-urls", s.etcd, "--advertise-client-urls", s.etcd,
		// It has no peers, and wants to listen for them.
		"--listen-peer-urls", s.peer, "--initial-advertise-peer-urls", s.peer, "--initial-cluster", "default="+s.peer)
}

func (s *Server) server() *exec.Cmd {
	_, port, _ := net.SplitHostPort(s.address[len("https://"):])
	return exec.Command(s.program, "--etcd-servers="+s.etcd, "--bind-address=127.0.0.1", "--advertise-address=192.0.2.1", // it takes no loopback, and nobody is told
		"--secure-port="+port, "--cert-dir="+s.file("certs"),
		"--service-account-key-file="+s.file("sa.pub"), "--service-account-signing-key-file="+s.file("sa.key"),
		"--service-account-issuer="+s.address, "--api-audiences="+s.address, "--authorization-mode=RBAC",
		"--token-auth-file="+s.file("tokens.csv"), "--service-cluster-ip-range=10.99.0.0/24", "--endpoint-reconciler-type=none")
}

// run starts a program that ends with the test.
func (s *Server) run(tb testing.TB, cmd *exec.Cmd) error {
	log, err := os.OpenFile(s.file(filepath.Base(cmd.Path)+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, log, log
	cmd.Env = []string{"HOME=" + s.dir, "PATH=/usr/bin:/bin", "GOMAXPROCS=2"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, done := make(chan error, 1), make(chan struct{})
	go func() { // the clean-up waits for it
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
	s.ended = append(s.ended, done)
	tb.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-done
	})
	return nil
}

// ready waits until the server is.
func (s *Server) ready(ctx context.Context) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		err := s.trust()
		if err == nil {
			err = s.up(ctx)
		}
		if err == nil {
			return nil
		}
		select {
		case <-s.ended[0]:
			return errors.New("etcd ended while starting")
		case <-s.ended[1]:
			return errors.New("kube-apiserver ended while starting")
		case <-ctx.Done():
			return fmt.Errorf("not ready within %v: %w", startTimeout, errors.Join(err, context.Cause(ctx)))
		case <-tick.C:
		}
	}
}

// up says why the server is not. The first namespace is made a moment after it
// calls itself ready.
func (s *Server) up(ctx context.Context) error {
	if err := s.Do(ctx, http.MethodGet, "/readyz", nil, nil); err != nil {
		return err
	}
	return s.Do(ctx, http.MethodGet, "/api/v1/namespaces/default", nil, nil)
}

// trust makes the client when the server has made its certificate.
func (s *Server) trust() error {
	if s.client != nil {
		return nil
	}
	cert, err := os.ReadFile(s.CAFile())
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(cert) {
		return errors.New("the certificate is half written")
	}
	s.client = &http.Client{
		Timeout:   30 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}},
	}
	return nil
}

// Do makes a request as the administrator. into gets the answer, unless it is nil.
func (s *Server) Do(ctx context.Context, method, path string, body, into any) error {
	status, b, err := s.As(ctx, AdminToken, method, path, body)
	switch {
	case err != nil:
		return err
	case status/100 != 2:
		return fmt.Errorf("%s %s: %d %s", method, path, status, b)
	case into == nil:
		return nil
	}
	return json.Unmarshal(b, into)
}

// As makes a request with a token, and returns status and answer.
func (s *Server) As(ctx context.Context, token, method, path string, body any) (int, []byte, error) {
	var text io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return 0, nil, err
		}
		text = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, s.address+path, text)
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json")
	res, err := s.client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(res.Body)
	return res.StatusCode, b, err
}
