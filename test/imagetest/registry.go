package imagetest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// A Registry is Debian's docker-registry on loopback, with TLS and a user.
type Registry struct {
	Host     string // host:port
	CAFile   string
	User     string
	Password string

	client *http.Client
	stop   func()
}

// patience bounds the start of a server on a busy machine.
const patience = time.Minute

// config of the server (https://distribution.github.io/distribution/about/configuration).
const config = `version: 0.1
storage: {filesystem: {rootdirectory: %[1]s/data}}
http: {addr: %[2]q, tls: {certificate: %[1]s/cert.pem, key: %[1]s/key.pem}}
auth: {htpasswd: {realm: test, path: %[1]s/htpasswd}}
`

// The one account of the server, whose password is hashed with bcrypt.
const (
	user     = "user"
	password = "correct horse"
	htpasswd = user + ":$2a$05$Msnc0NuD6.5L4Vo59kd/OO3h8EB1wcYBcOEok0KhdfKDXpSjsGKoK\n"
)

// StartRegistry starts one, and stops it when the test ends.
func StartRegistry(t testing.TB) *Registry {
	t.Helper()
	r := &Registry{User: user, Password: password}
	for range 5 { // another process may take the port first
		if err := r.start(t); err == nil {
			return r
		} else if !errors.Is(err, errEnded) {
			t.Fatal(err)
		}
	}
	t.Fatal("registry: no port to be had")
	return nil
}

var errEnded = errors.New("registry ended")

func (r *Registry) start(t testing.TB) error {
	dir := t.TempDir()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	r.Host = l.Addr().String()
	err = errors.Join(l.Close(), certificate(dir),
		os.WriteFile(filepath.Join(dir, "htpasswd"), []byte(htpasswd), 0o600),
		os.WriteFile(filepath.Join(dir, "config.yml"), fmt.Appendf(nil, config, dir, r.Host), 0o600))
	if err != nil {
		return err
	}
	r.CAFile = filepath.Join(dir, "cert.pem")
	ca, err := os.ReadFile(r.CAFile)
	if err != nil {
		return err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	r.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return err
	}
	cmd := exec.Command("docker-registry", "serve", filepath.Join(dir, "config.yml"))
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := errors.Join(cmd.Start(), log.Close()); err != nil {
		return fmt.Errorf("docker-registry (Debian package docker-registry): %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	r.stop = sync.OnceFunc(func() {
		_ = cmd.Process.Kill() // it may have ended
		<-ended
	})
	t.Cleanup(r.stop)
	return r.answers(ended)
}

// answers waits until the server does.
func (r *Registry) answers(ended chan error) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+r.Host+"/v2/", nil)
		if err != nil {
			return err
		}
		if resp, err := r.client.Do(req); err == nil {
			return resp.Body.Close()
		}
		select {
		case err := <-ended:
			ended <- err
			return errEnded
		case <-ctx.Done():
			return errors.New("registry does not answer")
		case <-tick.C:
		}
	}
}

// certificate makes one for loopback, which is its own authority.
func certificate(dir string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test registry"}, IsCA: true, BasicConstraintsValid: true,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		return err
	}
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(filepath.Join(dir, "cert.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(filepath.Join(dir, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}), 0o600))
}

func (r *Registry) options() []remote.Option {
	return []remote.Option{
		remote.WithTransport(r.client.Transport),
		remote.WithAuth(authn.FromConfig(authn.AuthConfig{Username: r.User, Password: r.Password})),
	}
}

// Push puts an image or an index there.
func (r *Registry) Push(t testing.TB, as string, what remote.Taggable) {
	t.Helper()
	ref, err := name.ParseReference(r.Host + "/" + as)
	if err == nil {
		switch w := what.(type) {
		case v1.Image:
			err = remote.Write(ref, w, r.options()...)
		case v1.ImageIndex:
			err = remote.WriteIndex(ref, w, r.options()...)
		default:
			err = fmt.Errorf("%T is no image", what)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Stop ends the server.
func (r *Registry) Stop() { r.stop() }
