// Package miniotest starts a real MinIO for tests: an object store with S3 and the
// STS over TLS, on loopback, that believes an issuer of identities.
package miniotest

import (
	"context"
	"crypto/sha1" // MinIO names a role so
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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

// startTimeout bounds a start, which takes 1.4 s; the rest is room for a machine that
// does other things.
const startTimeout = 90 * time.Second

// A Server is one MinIO. Its methods may not be called at the same time, except Do
// and what clients like.
type Server struct {
	servertest.Process
	program, dir, issuer string
	address              string
	client               *http.Client
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
	port, err := servertest.Hold()
	if err != nil {
		tb.Fatalf("miniotest: %v", err)
	}
	tb.Cleanup(port.Free)
	s := &Server{program: filepath.Join(programs, "minio"), dir: dir, issuer: issuer, address: "https://" + port.Address()}
	if err := s.certificate(); err != nil {
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
func (s *Server) Log() string { return servertest.Tail(filepath.Join(s.dir, "log")) }

func (s *Server) certificate() error {
	cert, key, err := servertest.Certificate("miniotest")
	if err == nil {
		s.client, err = servertest.Client(cert)
	}
	return errors.Join(err,
		os.MkdirAll(filepath.Dir(s.CAFile()), 0o700),
		os.WriteFile(s.CAFile(), cert, 0o600),
		os.WriteFile(filepath.Join(s.dir, "certs", "private.key"), key, 0o600))
}

// start runs the process and waits until root can list the buckets, and until the
// server knows whom it does not know: it loads its sessions after it begins to
// serve.
func (s *Server) start(ctx context.Context) error {
	cmd := exec.Command(s.program, "server", "--quiet", "--certs-dir", filepath.Join(s.dir, "certs"),
		"--address", strings.TrimPrefix(s.address, "https://"), filepath.Join(s.dir, "data"))
	cmd.Dir = s.dir
	cmd.Env = []string{
		"HOME=" + s.dir, "PATH=/usr/bin:/bin", "GOMAXPROCS=2", "MINIO_BROWSER=off", "MINIO_UPDATE=off",
		"MINIO_ROOT_USER=" + RootUser, "MINIO_ROOT_PASSWORD=" + RootPassword,
		"MINIO_IDENTITY_OPENID_CONFIG_URL=" + s.issuer + "/.well-known/openid-configuration",
		"MINIO_IDENTITY_OPENID_CLIENT_ID=" + Audience, "MINIO_IDENTITY_OPENID_CLIENT_SECRET=unused",
		"MINIO_IDENTITY_OPENID_ROLE_POLICY=readwrite",
	}
	if err := s.Run(cmd, filepath.Join(s.dir, "log")); err != nil {
		return err
	}
	nobody := aws.Credentials{AccessKeyID: "NOBODYISNOBODYIS", SecretAccessKey: "nobody"}
	return s.Until(ctx, func() error {
		for _, want := range []struct {
			who    aws.Credentials
			status int
		}{{Root(), http.StatusOK}, {nobody, http.StatusForbidden}} {
			if status, _, err := s.Do(ctx, want.who, http.MethodGet, "/", ""); err != nil || status != want.status {
				return errors.Join(fmt.Errorf("it answers %d, want %d", status, want.status), err)
			}
		}
		return nil
	})
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

// Restart starts it again on the same port, with all that it knew.
func (s *Server) Restart(ctx context.Context) error {
	s.client.CloseIdleConnections()
	return errors.Join(s.Stop(ctx), s.start(ctx))
}
