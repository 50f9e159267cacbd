package postgres_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/postgres"
)

func TestValidate(t *testing.T) {
	t.Parallel()
	good := postgres.Config{Host: "db", Database: "postgres", User: "postgres", Owner: "i"}
	if err := good.Validate(); err != nil {
		t.Errorf("good configuration: %v", err)
	}
	for want, change := range map[string]func(*postgres.Config){
		"host":          func(c *postgres.Config) { c.Host = "" },
		"one name":      func(c *postgres.Config) { c.Host = "a,b" },
		"port":          func(c *postgres.Config) { c.Port = 70000 },
		"database":      func(c *postgres.Config) { c.Database = "" },
		"user":          func(c *postgres.Config) { c.User = "" },
		"password_file": func(c *postgres.Config) { c.Password, c.PasswordFile = creds.NewSecret("hunter22"), "f" },
		"sslmode":       func(c *postgres.Config) { c.SSLMode = "prefer" },
		"root_ca":       func(c *postgres.Config) { c.SSLMode, c.RootCA = "require", "f" },
		"job_host":      func(c *postgres.Config) { c.Host = "/run/postgresql" },
		"job_port":      func(c *postgres.Config) { c.JobPort = -1 },
		"owner":         func(c *postgres.Config) { c.Owner = "" },
		"allowed_roles": func(c *postgres.Config) { c.AllowedRoles = []string{""} },
		"zero byte":     func(c *postgres.Config) { c.User = "a\x00b" },
		"connection to": func(c *postgres.Config) { c.RootCA = "/no/such/file" },
	} {
		c := good
		change(&c)
		if _, err := postgres.New(c); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hunter22") {
			t.Errorf("New: got %v, want word of %q and no password", err, want)
		}
	}
}

// testPasswordIsNotPrinted looks at every way in which connecting goes wrong.
func testPasswordIsNotPrinted(t *testing.T, w *world) {
	const secret = `s3cret'\ pass:word@/?x=y%41`
	for what, change := range map[string]func(*postgres.Config){
		"wrong password": func(*postgres.Config) {},
		"no such host":   func(c *postgres.Config) { c.Host = "no such host.invalid" },
		"no server":      func(c *postgres.Config) { c.Port = 1 },
		"no TLS":         func(c *postgres.Config) { c.SSLMode = "" },
		"odd user":       func(c *postgres.Config) { c.User = `o'dd \user` },
		"socket":         func(c *postgres.Config) { c.Host, c.JobHost = "/no/such/dir", "db" },
	} {
		c := w.config()
		c.Password = creds.NewSecret(secret)
		change(&c)
		i, err := postgres.New(c)
		if err == nil {
			t.Cleanup(i.Close)
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			_, issued := i.Issue(ctx, "x", grant(goodScope))
			_, listed := i.List(ctx)
			err = errors.Join(issued, listed, i.Revoke(ctx, "x", nil))
			cancel()
		}
		got := fmt.Sprintf("%v %+v %#v %v", err, err, err, c)
		if err == nil || strings.Contains(got, "s3cret") || strings.Contains(got, "pass:word") {
			t.Errorf("%s: got %s, want an error without the password", what, strings.ReplaceAll(got, secret, "SECRET"))
		}
	}
}

// testPasswordFile is read again for each connection.
func testPasswordFile(t *testing.T, w *world) {
	file := filepath.Join(t.TempDir(), "password")
	c := w.config()
	c.Password, c.PasswordFile = creds.Secret{}, file
	i := w.newIssuer(c)
	if _, err := i.List(t.Context()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent file: got %v, want ErrNotExist", err)
	}
	if err := os.WriteFile(file, []byte(w.Password()+"\n"), 0o604); err != nil {
		t.Fatal(err)
	}
	if _, err := i.List(t.Context()); !errors.Is(err, os.ErrPermission) {
		t.Errorf("file open to others: got %v, want ErrPermission", err)
	}
	if err := os.Chmod(file, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := i.List(t.Context()); err != nil {
		t.Errorf("good file: %v", err)
	}
}

// testEnvironmentIsIgnored: what libpq's variables say is for other programs.
func testEnvironmentIsIgnored(t *testing.T, w *world) {
	for k, v := range map[string]string{
		"PGHOST": "elsewhere.invalid", "PGPORT": "1", "PGUSER": "nobody", "PGDATABASE": "nosuch", "PGPASSWORD": "wrong", "PGSSLMODE": "verify-full",
		"PGSSLROOTCERT": "/no/such/file", "PGSSLCERT": "/no/such/file", "PGSSLKEY": "/no/such/file", "PGOPTIONS": "-c search_path=shop", "PGAPPNAME": "psql",
		"PGTARGETSESSIONATTRS": "standby", "PGCHANNELBINDING": "require", "PGREQUIREAUTH": "none", "PGMINPROTOCOLVERSION": "3.2", "PGSSLNEGOTIATION": "direct",
	} {
		t.Setenv(k, v)
	}
	i := w.newIssuer(w.config())
	l, err := i.Issue(t.Context(), "env", grant(goodScope))
	if err != nil {
		t.Fatal(err)
	}
	if err := i.Revoke(t.Context(), "env", l.Handle); err != nil {
		t.Error(err)
	}
	if _, err := i.Probe(t.Context(), "env", l.Handle); err != nil {
		t.Error(err)
	}
}

// testTLS: who the server is, is checked before it hears anything.
func testTLS(t *testing.T, w *world) {
	ca, cert, key := certificate(t, "127.0.0.1")
	for name, content := range map[string][]byte{"tls.crt": cert, "tls.key": key} {
		path := filepath.Join(w.Dir(), name)
		if err := errors.Join(os.WriteFile(path, content, 0o600), w.Grab(path)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Restart(t.Context(), "ssl=on", "ssl_cert_file="+w.Dir()+"/tls.crt", "ssl_key_file="+w.Dir()+"/tls.key"); err != nil {
		t.Fatal(err)
	}
	good := filepath.Join(t.TempDir(), "ca.pem")
	other, _, _ := certificate(t, "127.0.0.1")
	bad := filepath.Join(t.TempDir(), "other.pem")
	if err := errors.Join(os.WriteFile(good, ca, 0o600), os.WriteFile(bad, other, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		mode, ca, host string
		ok             bool
	}{
		{"", good, "127.0.0.1", true},
		{"verify-full", good, "localhost", false},
		{"verify-ca", good, "localhost", true},
		{"verify-full", bad, "127.0.0.1", false},
		{"verify-ca", bad, "127.0.0.1", false},
		{"verify-full", "", "127.0.0.1", false},
		{"require", "", "127.0.0.1", true},
		{"disable", "", "127.0.0.1", true},
	} {
		conf := w.config()
		conf.SSLMode, conf.RootCA, conf.Host = c.mode, c.ca, c.host
		i := w.newIssuer(conf)
		l, err := i.Issue(t.Context(), "tls", grant(""))
		if (err == nil) != c.ok {
			t.Errorf("%+v: got %v", c, err)
		}
		if err != nil {
			continue
		}
		if _, err := i.Probe(t.Context(), "tls", l.Handle); !errors.Is(err, creds.ErrStillValid) {
			t.Errorf("%+v: Probe: got %v, want ErrStillValid", c, err)
		}
		if err := i.Revoke(t.Context(), "tls", l.Handle); err != nil {
			t.Error(err)
		}
	}
}

// TestCleartextIsNotSent: a server that nobody has verified asks for the
// password itself.
func TestCleartextIsNotSent(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	heard := make(chan string, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			heard <- err.Error()
			return
		}
		defer func() { _ = conn.Close() }()
		buf := make([]byte, 4096)
		_, _ = conn.Read(buf)                                  // the startup packet
		_, _ = conn.Write([]byte{'R', 0, 0, 0, 8, 0, 0, 0, 3}) // AuthenticationCleartextPassword
		n, _ := conn.Read(buf)
		heard <- string(buf[:n])
	}()
	i, err := postgres.New(postgres.Config{
		Host: "127.0.0.1", Port: l.Addr().(*net.TCPAddr).Port, Database: "d", User: "u", Owner: "i", SSLMode: "disable", Password: creds.NewSecret("s3cret-word"),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer i.Close()
	if _, err := i.List(t.Context()); err == nil {
		t.Error("List at a server that is none: got nil, want an error")
	}
	if got := <-heard; strings.Contains(got, "s3cret-word") {
		t.Error("the password was sent in the clear to a server that nobody verified")
	}
}

// certificate makes a CA and a server certificate of it, as PEM.
func certificate(t *testing.T, ip string) (ca, cert, key []byte) {
	t.Helper()
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotAfter: time.Now().Add(time.Hour), IsCA: true,
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.ParseIP(ip)}}
	caDER, caErr := x509.CreateCertificate(rand.Reader, root, root, &priv.PublicKey, priv)
	certDER, certErr := x509.CreateCertificate(rand.Reader, leaf, root, &priv.PublicKey, priv)
	keyDER, keyErr := x509.MarshalPKCS8PrivateKey(priv)
	if err := errors.Join(caErr, certErr, keyErr); err != nil {
		t.Fatal(err)
	}
	block := func(kind string, der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}) }
	return block("CERTIFICATE", caDER), block("CERTIFICATE", certDER), block("PRIVATE KEY", keyDER)
}
