package gateway_test

import (
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
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
)

// identity is a certificate of that name and its private key, as PEM.
func identity(t *testing.T, name string) (chain, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, k.Public(), k)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}))
}

// certified is a destination that asks for a certificate, and a rule that has one.
func certified(t *testing.T, want tls.ClientAuthType) (*secured, egress.Rule) {
	t.Helper()
	s := newSecured(t, true, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		owner := "nobody"
		if len(r.TLS.PeerCertificates) > 0 {
			owner = r.TLS.PeerCertificates[0].Subject.CommonName
		}
		fmt.Fprintf(w, "%s %s", owner, r.Header.Get("Authorization"))
	}))
	s.out.TLS.ClientAuth = want
	chain, key := identity(t, "the lease")
	return s, egress.Rule{
		ID: "lease", Name: "web.example", Port: s.port, Protocol: egress.HTTPS, CA: s.ca,
		Resolve: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}, Requests: []egress.Request{{Methods: []string{"GET"}, Path: "/api/**"}},
		Inject: &egress.Injection{Lease: "lease", As: egress.Certificate, Value: creds.NewSecret(key), Chain: chain, Placeholder: placeToken},
	}
}

// TestCertificate: the destination sees the owner of the certificate, whatever
// the job says in its requests; without the rule the job does not get there.
func TestCertificate(t *testing.T) {
	t.Parallel()
	s, rule := certified(t, tls.RequireAnyClientCert)
	if status, _, body, _ := s.send(true, "GET", "/api/x"); status != 0 {
		t.Fatalf("without a certificate: got %d %q", status, body)
	}
	err := s.gw.Open(t.Context(), "lease", egress.Opening{Parent: "job", Ledger: s.ledger, Rules: egress.Rules{Allow: []egress.Rule{rule}}})
	if !errors.Is(err, egress.ErrBadRules) || !strings.Contains(err.Error(), "no other rule can be for it") {
		t.Errorf("beside a rule for the same connections: got %v", err)
	}
	s.box = newBox(t, gateway.Config{}, rule)
	s.pool = x509.NewCertPool()
	ca, err := s.gw.Authority("job")
	if err != nil || !s.pool.AppendCertsFromPEM(ca) {
		t.Fatalf("Authority: %v", err)
	}
	for _, h2 := range []bool{true, false} {
		if _, _, body, _ := s.send(h2, "GET", "/api/x", "Authorization: Bearer other"); body != "the lease Bearer other" {
			t.Errorf("got %q", body)
		}
		if status, _, body, _ := s.send(h2, "GET", "/other"); status != http.StatusForbidden {
			t.Errorf("a request that the rule does not name: got %d %q", status, body)
		}
		if _, _, body, _ := s.send(h2, "GET", "/api/x", "X-Note: "+placeToken); !strings.Contains(body, "tripwire") {
			t.Errorf("the placeholder: got %q", body)
		}
	}
	s.await("line of the request", has(func(l egress.Line) bool { return l.Verdict == egress.Ended && l.Request.Lease == "lease" }))
}

// TestBadCertificate: what is no certificate with its key is refused, and the
// error does not say the key.
func TestBadCertificate(t *testing.T) {
	t.Parallel()
	s, rule := certified(t, tls.NoClientCert)
	_, other := identity(t, "other")
	good := *rule.Inject
	for name, change := range map[string]func(*egress.Injection){
		"no certificate": func(in *egress.Injection) { in.Chain = "" },
		"another's key":  func(in *egress.Injection) { in.Value = creds.NewSecret(other) },
		"no key":         func(in *egress.Injection) { in.Value = creds.NewSecret(realToken) },
		"stripped":       func(in *egress.Injection) { in.Strip = true },
		"for a bearer":   func(in *egress.Injection) { in.As = egress.Bearer },
	} {
		in := good
		change(&in)
		rule.Inject = &in
		rule.Port = 444
		err := s.gw.Open(t.Context(), "bad", egress.Opening{Parent: "job", Ledger: s.ledger, Rules: egress.Rules{Allow: []egress.Rule{rule}}})
		if !errors.Is(err, egress.ErrBadRules) || strings.Contains(err.Error(), "PRIVATE") || strings.Contains(err.Error(), realToken) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}
