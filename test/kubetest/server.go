// Package kubetest starts a real API server of Kubernetes for tests, with an etcd of
// its own, on loopback. There is no controller and no node: what is made there
// stays as it is.
package kubetest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
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
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/test/servertest"
)

// startTimeout bounds a start, which takes 7 s; the rest is room for a machine that
// does other things.
const startTimeout = 3 * time.Minute

// AdminToken may do everything.
const AdminToken = "kubetest-admin"

// A Server is one API server.
type Server struct {
	program, dir string
	address      string // https://127.0.0.1:PORT
	etcd, peer   string // http://127.0.0.1:PORT
	client       *http.Client
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
	if err := errors.Join(s.ports(tb), s.keys()); err != nil {
		tb.Fatalf("kubetest: %v", err)
	}
	err = s.run(tb, s.database(), func() error { return answers(ctx, s.etcd+"/health") })
	if err == nil {
		err = s.run(tb, s.server(), func() error { return s.up(ctx) })
	}
	if err != nil {
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

func (s *Server) log(program string) string { return servertest.Tail(s.file(program + ".log")) }

// ports are three that nobody else has.
func (s *Server) ports(tb testing.TB) error {
	for _, to := range []*string{&s.address, &s.etcd, &s.peer} {
		port, err := servertest.Hold()
		if err != nil {
			return err
		}
		tb.Cleanup(port.Free)
		*to = "http://" + port.Address()
	}
	s.address = strings.Replace(s.address, "http:", "https:", 1)
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

// run starts a program that ends with the test, and waits until it is ready.
func (s *Server) run(tb testing.TB, cmd *exec.Cmd, ready func() error) error {
	cmd.Dir, cmd.Env = s.dir, []string{"HOME=" + s.dir, "PATH=/usr/bin:/bin", "GOMAXPROCS=2"}
	var p servertest.Process
	if err := p.Run(cmd, s.file(filepath.Base(cmd.Path)+".log")); err != nil {
		return err
	}
	tb.Cleanup(func() { _ = p.Stop(context.Background()) })
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	return p.Until(ctx, ready)
}

// answers says why a server does not.
func answers(ctx context.Context, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	return res.Body.Close()
}

// up says why the server is not. The first namespace is made a moment after it
// calls itself ready.
func (s *Server) up(ctx context.Context) error {
	if err := s.trust(); err != nil {
		return err
	}
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
	s.client, err = servertest.Client(cert)
	return err
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
