// Package miniotest starts a real MinIO for tests: an object store with S3 and the
// STS over TLS, on loopback, that believes an issuer of identities.
package miniotest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1" // MinIO names a role so
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
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
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/mayfly-ci/mayfly/test/servertest"
)

// Audience is the one that identities must have.
const Audience = "sts.amazonaws.com"

// Root may do everything.
const (
	RootUser     = "miniotest"
	RootPassword = "miniotest-root-password"
)

// Bounds. A start takes 1.4 s; the rest is room for a machine that does other
// things.
const (
	startTimeout = 90 * time.Second
	pollInterval = 50 * time.Millisecond
)

// A Server is one MinIO. Its methods may not be called at the same time, except Do
// and what clients like.
type Server struct {
	program, dir, issuer string
	address              string
	client               *http.Client

	cmd  *exec.Cmd
	done chan struct{} // closed when the process is gone
}

// Start makes an empty server for a test, which believes the issuer at that URL. The
// issuer must answer already. It ends with tb, and by itself when the test dies.
// What goes wrong is fatal.
func Start(tb testing.TB, issuer string) *Server {
	tb.Helper()
	s := Prepare(tb, issuer)
	s.Serve(tb)
	return s
}

// Prepare is Start without the start, for an issuer that does not answer yet.
func Prepare(tb testing.TB, issuer string) *Server {
	tb.Helper()
	dir := tb.TempDir()
	programs, err := servertest.Dir(context.Background(), "minio")
	if err != nil {
		tb.Fatalf("miniotest: %v", err)
	}
	s := &Server{program: filepath.Join(programs, "minio"), dir: dir, issuer: issuer}
	if err := errors.Join(s.certificate(), s.port()); err != nil {
		tb.Fatalf("miniotest: %v", err)
	}
	return s
}

// Serve starts a server that was prepared.
func (s *Server) Serve(tb testing.TB) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	tb.Cleanup(func() { _ = s.Stop(context.Background()) })
	if err := s.start(ctx); err != nil {
		tb.Fatalf("miniotest: %v\n%s", err, s.Log())
	}
}

// Address is the URL of the server.
func (s *Server) Address() string { return s.address }

// CAFile is the certificate that it proves itself with, in PEM.
func (s *Server) CAFile() string { return filepath.Join(s.dir, "certs", "public.crt") }

// Client is one that trusts the server and nobody else.
func (s *Server) Client() *http.Client { return s.client }

// Role is what identities get, in MinIO's form of an ARN: all of the object store.
func (s *Server) Role() string {
	sum := sha1.Sum([]byte(Audience))
	return "arn:minio:iam:::role/" + base64.RawURLEncoding.EncodeToString(sum[:])
}

// Log is the end of what the server has written so far.
func (s *Server) Log() string {
	b, err := os.ReadFile(filepath.Join(s.dir, "log"))
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-2000):])
}

// port chooses one that was free a moment ago.
func (s *Server) port() error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	s.address = "https://" + l.Addr().String()
	return l.Close()
}

func (s *Server) certificate() error {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "miniotest"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, private.Public(), private)
	if err != nil {
		return err
	}
	b, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return err
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(cert)
	s.client = &http.Client{
		Timeout:   30 * time.Second,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}},
	}
	return errors.Join(
		os.MkdirAll(filepath.Dir(s.CAFile()), 0o700),
		os.WriteFile(s.CAFile(), cert, 0o600),
		os.WriteFile(filepath.Join(s.dir, "certs", "private.key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: b}), 0o600))
}

// start runs the process and waits until it serves.
func (s *Server) start(ctx context.Context) error {
	log, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command(s.program, "server", "--quiet", "--certs-dir", filepath.Join(s.dir, "certs"),
		"--address", strings.TrimPrefix(s.address, "https://"), filepath.Join(s.dir, "data"))
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, log, log
	cmd.Env = []string{
		"HOME=" + s.dir, "PATH=/usr/bin:/bin", "GOMAXPROCS=2", "MINIO_BROWSER=off", "MINIO_UPDATE=off",
		"MINIO_ROOT_USER=" + RootUser, "MINIO_ROOT_PASSWORD=" + RootPassword,
		"MINIO_IDENTITY_OPENID_CONFIG_URL=" + s.issuer + "/.well-known/openid-configuration",
		"MINIO_IDENTITY_OPENID_CLIENT_ID=" + Audience, "MINIO_IDENTITY_OPENID_CLIENT_SECRET=unused",
		"MINIO_IDENTITY_OPENID_ROLE_POLICY=readwrite",
	}
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
	return s.ready(ctx)
}

// ready waits until root can list the buckets, and until the server knows whom it
// does not know: it loads its sessions after it begins to serve.
func (s *Server) ready(ctx context.Context) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		status, _, err := s.Do(ctx, Root(), http.MethodGet, "/", "")
		if err == nil && status == http.StatusOK {
			nobody := aws.Credentials{AccessKeyID: "NOBODYISNOBODYIS", SecretAccessKey: "nobody"}
			if status, _, err = s.Do(ctx, nobody, http.MethodGet, "/", ""); err == nil && status == http.StatusForbidden {
				return nil
			}
		}
		select {
		case <-s.done:
			return errors.New("server ended while starting")
		case <-ctx.Done():
			return fmt.Errorf("not within %v: server answers: status %d: %w", startTimeout, status, errors.Join(err, context.Cause(ctx)))
		case <-tick.C:
		}
	}
}

// Root are the credentials that may do everything.
func Root() aws.Credentials {
	return aws.Credentials{AccessKeyID: RootUser, SecretAccessKey: RootPassword}
}

// Do makes a request that is signed for S3, and returns status and answer.
func (s *Server) Do(ctx context.Context, c aws.Credentials, method, path, body string) (int, string, error) {
	req, err := http.NewRequestWithContext(ctx, method, s.address+path, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	sum := sha256.Sum256([]byte(body))
	hash := hex.EncodeToString(sum[:])
	req.Header.Set("X-Amz-Content-Sha256", hash)
	if err := v4.NewSigner().SignHTTP(ctx, c, req, hash, "s3", "us-east-1", time.Now()); err != nil {
		return 0, "", err
	}
	res, err := s.client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(res.Body)
	return res.StatusCode, string(b), err
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
		return fmt.Errorf("minio still running: %w", context.Cause(ctx))
	}
}

// Restart starts it again on the same port, with all that it knew.
func (s *Server) Restart(ctx context.Context) error {
	return errors.Join(s.Stop(ctx), s.start(ctx))
}

// Pause freezes the server: the kernel still accepts connections, nobody
// answers. Resume and Stop undo it.
func (s *Server) Pause() error { return s.cmd.Process.Signal(syscall.SIGSTOP) }

// Resume lets a paused server go on.
func (s *Server) Resume() error { return s.cmd.Process.Signal(syscall.SIGCONT) }
