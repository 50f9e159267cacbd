package main

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/configs"
	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/audit"
)

// issuerRows are what each type of issuer is told, of a provider whose name nobody can look up,
// and the scope of a lease. A type without a row is an error.
func issuerRows() map[string]struct{ section, scope string } {
	return map[string]struct{ section, scope string }{
		"aws":        {"service: minio, endpoint: 'https://aws.way.invalid', role: 'arn:minio:iam:::role/x'", `{"whole_role": true}`},
		"gitea":      {"url: 'https://gitea.way.invalid', user: bot, password_file: secret, scopes: [read:user]", `{"scopes": ["read:user"]}`},
		"githubapp":  {"address: 'https://githubapp.way.invalid', app: x, installation: 1, private_key_file: app.pem", `{"repository_ids": [1], "permissions": {"contents": "read"}}`},
		"kubernetes": {"address: 'https://kubernetes.way.invalid', namespace: n, token_file: secret", `{"service_account": "a"}`},
		"oauth2":     {"token_url: 'https://oauth2.way.invalid/t', revocation_url: 'https://oauth2.way.invalid/r', use_url: 'https://oauth2.way.invalid/u', client_id: c, client_secret_file: secret, scopes: [s]", `{"scopes": ["s"]}`},
		"postgres":   {"host: postgres.way.invalid, database: d, user: u, password_file: secret", `{}`},
		"ssh":        {"ca_private_key_file: ca, principals: [p], address: 'ssh.way.invalid:22', known_hosts: known, krl_file: list", `{"principals": ["p"]}`},
		"static":     {}, // asks nobody
		"vault":      {"address: 'https://vault.way.invalid', role: r", `{"token": true}`},
	}
}

// TestIssuersLeaveByTheWayOut: every type of issuer dials through the parent proxy,
// writes that down for its job, believes the authorities of its own section alone,
// and speaks no old TLS.
func TestIssuersLeaveByTheWayOut(t *testing.T) {
	t.Parallel()
	cert, authority := newAuthority(t)
	_, other := newAuthority(t)
	for name, c := range map[string]struct {
		pinned string // what the issuer's ca_file has
		newest uint16 // TLS of the provider
		heard  bool
	}{
		"its authority":     {authority, tls.VersionTLS13, true},
		"another authority": {other, tls.VersionTLS13, false},
		"old TLS":           {authority, tls.VersionTLS11, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProvider(t, cert, c.newest)
			record := &recorded{}
			issuers := issuersBehind(t, p, record, authority, c.pinned)
			for kind, row := range issuerRows() {
				if row.section == "" {
					continue
				}
				_, err := issuers[kind].Issue(audit.WithJob(t.Context(), "job-"+kind), "lease-"+kind, creds.Grant{
					Scope: json.RawMessage(row.scope), Expires: time.Now().Add(2 * time.Hour), Subject: creds.Subject{Provider: "local", Repository: "o/r", Ref: "refs/heads/main", Job: "job-" + kind, Origin: creds.Origin{JobID: "job-" + kind}},
				})
				port := map[string]string{"postgres": "5432", "ssh": "22"}[kind]
				if port == "" && slices.Contains(p.heard(), kind+".way.invalid") != c.heard {
					t.Errorf("%s: the provider heard %q, of this one: %v wanted; %v", kind, p.heard(), c.heard, err)
				}
				if port == "" {
					port = "443"
					record.want(t, "agent.request", kind, port)
				}
				record.want(t, "agent.connect", kind, port)
				if dialled := "CONNECT " + kind + ".way.invalid:" + port; err == nil || !slices.Contains(p.heard(), dialled) {
					t.Errorf("%s: the proxy heard %q, want %q; %v", kind, p.heard(), dialled, err)
				}
			}
		})
	}
}

// issuersBehind are issuers of all types, behind the proxy, by the wiring of every
// agent. The way out itself believes another file of authorities than they do.
func issuersBehind(t *testing.T, p *provider, record audit.Sink, authority, pinned string) map[string]creds.Issuer {
	t.Helper()
	dir := t.TempDir()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	must(t, err)
	for name, text := range map[string]string{
		"secret": "a-secret-of-some-length", "known": "", "way.pem": authority, "pinned.pem": pinned,
		"app.pem": string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})),
	} {
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	if out, err := exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", filepath.Join(dir, "ca")).CombinedOutput(); err != nil {
		t.Fatalf("ssh-keygen: %v: %s", err, out)
	}
	text := "version: 1\npolicy: p\nproviders: {local: {dir: spool}}\noutbound: {proxy: '" + p.proxy + "', ca_file: way.pem}\n" +
		"issuers:\n  identity: {type: oidc, url: 'https://id.way.invalid'}\n"
	rows := issuerRows()
	for kind := range (&wiring{}).makers() {
		row, ok := rows[kind]
		switch ca := map[string]string{"postgres": "root_ca: pinned.pem", "ssh": "user: p"}[kind]; {
		case !ok:
			t.Errorf("type %s has no row in this test: does it leave by the way out?", kind)
		case row.section == "":
		case ca == "":
			text += fmt.Sprintf("  %s: {type: %[1]s, ca_file: pinned.pem, %s}\n", kind, row.section)
		default:
			text += fmt.Sprintf("  %s: {type: %[1]s, %s, %s}\n", kind, ca, row.section)
		}
	}
	config, err := configs.Parse([]byte(text), filepath.Join(dir, "agent.yaml"))
	must(t, err)
	state, err := runner.OpenState(filepath.Join(dir, "state"))
	must(t, err)
	w := &wiring{config: config, state: state, agent: runner.Config{Audit: record}, closers: []func() error{state.Close}}
	t.Cleanup(w.close)
	must(t, w.outbound(record))
	must(t, w.issuers())
	return w.agent.Issuers
}

// A provider is one that answers every name with 500, and the only proxy to it.
type provider struct {
	proxy string

	mu  sync.Mutex
	got []string
}

func (p *provider) hear(what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.got = append(p.got, what)
}

func (p *provider) heard() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.got)
}

func newProvider(t *testing.T, cert tls.Certificate, newest uint16) *provider {
	t.Helper()
	p := &provider{}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.hear(r.Host)
		w.WriteHeader(http.StatusInternalServerError)
	}))
	server.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS10, MaxVersion: newest}
	server.Config.ErrorLog = log.New(io.Discard, "", 0) // of what clients refuse
	server.StartTLS()
	t.Cleanup(server.Close)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	p.proxy = "http://" + l.Addr().String()
	var tunnels sync.WaitGroup
	tunnels.Go(func() {
		for near, err := l.Accept(); err == nil; near, err = l.Accept() {
			tunnels.Go(func() { p.tunnel(near, server.Listener.Addr().String()) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		server.CloseClientConnections()
		tunnels.Wait()
	})
	return p
}

// tunnel is one from the proxy to the provider; who asks for another port than
// 443 finds nobody.
func (p *provider) tunnel(near net.Conn, to string) {
	defer near.Close()
	asked, err := http.ReadRequest(bufio.NewReader(near))
	if err != nil {
		return
	}
	p.hear(asked.Method + " " + asked.Host)
	_, _ = io.WriteString(near, "HTTP/1.1 200 Connection established\r\n\r\n")
	if !strings.HasSuffix(asked.Host, ":443") {
		return
	}
	far, err := net.Dial("tcp", to)
	if err != nil {
		return
	}
	var there sync.WaitGroup
	there.Go(func() {
		_, _ = io.Copy(far, near)
		_ = far.Close()
	})
	_, _ = io.Copy(near, far)
	_ = near.Close()
	there.Wait()
}

// recorded keeps the events.
type recorded struct {
	mu     sync.Mutex
	events []audit.Event
}

func (r *recorded) Append(_ context.Context, e audit.Event) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
	return nil
}

// want looks for a line of an issuer, for its job.
func (r *recorded) want(t *testing.T, action, kind, port string) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.events {
		if e.Action == action && e.Object == "issuer "+kind && e.Job == "job-"+kind && e.Detail["name"] == kind+".way.invalid" && e.Detail["port"] == port {
			return
		}
	}
	t.Errorf("%s: no line %s to port %s for its job in %+v", kind, action, port, r.events)
}

// newAuthority is one with a certificate for *.way.invalid.
func newAuthority(t *testing.T) (tls.Certificate, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{"*.way.invalid"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	must(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}
