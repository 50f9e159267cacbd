package login_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/postgrestest"
)

// ports has the usual ports mean those of the test's servers.
func ports(ssh, db int) func(context.Context, string, string) (net.Conn, error) {
	to := map[string]int{"127.0.0.1:22": ssh, "127.0.0.1:5432": db}
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, fmt.Sprintf("127.0.0.1:%d", to[address]))
	}
}

// database is a server with TLS, as the owner of db.corp, and a database app.
func database(ctx context.Context, t *testing.T) (server *postgrestest.Server, ca string) {
	t.Helper()
	server = postgrestest.Start(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	agenttest.Must(t, err)
	c := &x509.Certificate{
		DNSNames: []string{"db.corp"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	agenttest.Must(t, err)
	private, err := x509.MarshalPKCS8PrivateKey(key)
	agenttest.Must(t, err)
	ca = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
	for name, content := range map[string]string{
		"tls.crt": ca, "tls.key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})),
	} {
		path := filepath.Join(server.Dir(), name)
		agenttest.Must(t, os.WriteFile(path, []byte(content), 0o600))
		agenttest.Must(t, server.Grab(path))
	}
	agenttest.Must(t, server.Restart(ctx, "ssl=on", "ssl_cert_file="+server.Dir()+"/tls.crt", "ssl_key_file="+server.Dir()+"/tls.key"))
	w := &agenttest.World{Database: server}
	_, err = agenttest.Query(ctx, w, "create database app")
	agenttest.Must(t, err)
	return server, ca
}

// ledger wants lines in the audit, and the secret nowhere in what the agent
// keeps. Of a wanted line what is empty may be anything.
func (a *agent) ledger(t *testing.T, want []egress.Line, secret string) {
	t.Helper()
	var text strings.Builder
	err := filepath.WalkDir(a.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.HasPrefix(path, filepath.Join(a.dir, "repository")) {
			return err
		}
		b, err := os.ReadFile(path)
		if strings.Contains(string(b), secret) {
			t.Errorf("%s has the credential", path)
		}
		if strings.HasPrefix(path, filepath.Join(a.dir, "audit")) {
			text.Write(b)
		}
		return err
	})
	agenttest.Must(t, err)
	for _, w := range want {
		if !containsLine(text.String(), w) {
			t.Errorf("the audit lacks %+v:\n%s", w, text.String())
		}
	}
}

// containsLine looks for the words of a line in one of the audit's.
func containsLine(text string, want egress.Line) bool {
	words := []string{want.Name, string(want.Verdict), string(want.Protocol), want.Request.Method, want.Request.Path, want.Request.Lease}
	if want.Request.Status != 0 {
		words = append(words, fmt.Sprint(want.Request.Status))
	}
	for line := range strings.SplitSeq(text, "\n") {
		all := true
		for _, w := range words {
			quoted, err := json.Marshal(w)
			all = all && err == nil && (w == "" || strings.Contains(line, string(quoted)))
		}
		if all {
			return true
		}
	}
	return false
}
