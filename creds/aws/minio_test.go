package aws_test

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/credstest"
)

// TestMinIO runs, one after the other, all that can share a server.
func TestMinIO(t *testing.T) {
	w := newWorld(t)
	for _, test := range []struct {
		name string
		run  func(*testing.T, *world)
	}{
		{"Narrowed", testNarrowed},
		{"Sender", testSender},
		{"WholeRole", testWholeRole},
		{"GrantEnds", testGrantEnds},
		{"Revoked", testRevoked},
		{"HandleLost", testHandleLost},
		{"UnknownRole", testUnknownRole},
		{"KilledAtEveryPoint", testKilledAtMinIO},
		{"Down", testDown},
		{"WrongAuthority", testWrongAuthority},
		{"Conformance", testConformance},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.run(t, &world{w.Server, t, w.identity, w.issuer})
		})
	}
}

func badScopes(more ...string) []json.RawMessage {
	var bad []json.RawMessage
	for _, s := range append(more,
		`{}`, `[]`, `{"whole_role": true} {}`, `{"statements": []}`, `{"statements": {}}`,
		`{"whole_role": true, "statements": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}`,
		`{"statements": [{"Effect": "allow", "Action": "s3:GetObject", "Resource": "arn:aws:s3:::a"}]}`,
		`{"statements": [{"Effect": "Allow", "Resource": "arn:aws:s3:::a"}]}`,
		`{"statements": [{"Effect": "Allow", "Action": "s3:GetObject"}]}`,
		`{"statements": [{"Effect": "Allow", "Action": "s3:GetObject", "Resource": "arn:aws:s3:::a", "Principal": "*"}]}`,
		`{"statements": [{"Effect": "Allow", "Action": "s3:GetObject", "Resource": "arn:aws:s3:::`+strings.Repeat("a", 2048)+`"}]}`,
	) {
		bad = append(bad, json.RawMessage(s))
	}
	return bad
}

func testConformance(t *testing.T, w *world) {
	credstest.Run(t, func(*testing.T) credstest.Harness {
		return credstest.Harness{
			Issuer: w.issuer, Owner: owner, Scope: json.RawMessage(mainScope),
			BadScopes: badScopes(
				`{"statements": [{"Effect": "Allow", "Action": "admin:*", "Resource": "*"}]}`,
				`{"statements": [{"Effect": "Allow", "NotAction": "s3:GetObject", "Resource": "*"}]}`),
			Use:  w.use,
			Down: w.Stop, Up: w.Restart,
			Freeze: func(context.Context) error { return w.Pause() }, Thaw: func(context.Context) error { return w.Resume() },
		}
	})
}

// testNarrowed: the role may do everything, the session what the grant says.
func testNarrowed(t *testing.T, w *world) {
	l := issue(t, w.issuer, "narrow", mainScope)
	for path, want := range map[string]int{"/app/main/a": 200, "/app/other/a": 403} {
		if got := w.status(l, http.MethodGet, path); got != want {
			t.Errorf("%s: got %d, want %d", path, got, want)
		}
	}
	if l.ByName {
		t.Error("ByName: a session of MinIO needs its handle")
	}
	for _, fact := range []string{"access_key_id", "endpoint", "region", "jti"} {
		if l.Facts[fact] == "" {
			t.Errorf("fact %s: empty", fact)
		}
	}
	w.wantDead("narrow", l)
}

// testSender: a session that is for a network is of no use from another.
func testSender(t *testing.T, w *world) {
	for network, want := range map[string]int{"127.0.0.0/8": 200, "192.0.2.0/24": 403} {
		name := "from-" + network[:3]
		l := issue(t, w.issuer, name, `{"statements": [{"Effect": "Allow", "Action": "s3:GetObject", "Resource": "arn:aws:s3:::app/main/*",
			"Condition": {"IpAddress": {"aws:SourceIp": "`+network+`"}}}]}`)
		if got := w.status(l, http.MethodGet, "/app/main/a"); got != want {
			t.Errorf("from 127.0.0.1, for %s: got %d, want %d", network, got, want)
		}
		w.wantDead(name, l)
	}
}

func testWholeRole(t *testing.T, w *world) {
	l := issue(t, w.issuer, "whole", `{"whole_role": true}`)
	for _, path := range []string{"/app/main/a", "/app/other/a"} {
		if got := w.status(l, http.MethodGet, path); got != 200 {
			t.Errorf("%s: got %d, want 200", path, got)
		}
	}
	w.wantDead("whole", l)
}

// testGrantEnds: a session that lives for 15 minutes can do nothing once its grant
// is over.
func testGrantEnds(t *testing.T, w *world) {
	g := grant(`{"whole_role": true}`)
	g.Expires = time.Now().Add(5 * time.Second)
	l, err := w.issuer.Issue(t.Context(), "ends", g)
	if err != nil {
		t.Fatal(err)
	}
	if l.ExpiresAt.After(g.Expires) {
		t.Errorf("lease ends at %v, grant at %v", l.ExpiresAt, g.Expires)
	}
	if err := w.use(t.Context(), l); err != nil && time.Now().Before(l.ExpiresAt) {
		t.Errorf("before the end: %v", err)
	}
	wait(t, "the session is refused after its grant", func() bool { return w.use(t.Context(), l) != nil })
	if time.Now().Before(l.ExpiresAt) {
		t.Error("refused before its end")
	}
	if _, err := w.issuer.Probe(t.Context(), "ends", l.Handle); !errors.Is(err, creds.ErrStillValid) {
		t.Errorf("Probe of a session that may do nothing and is known: got %v, want ErrStillValid", err)
	}
	w.wantDead("ends", l)
}

// testRevoked: the sessions of one job are apart.
func testRevoked(t *testing.T, w *world) {
	a, b := issue(t, w.issuer, "one", mainScope), issue(t, w.issuer, "two", mainScope)
	w.wantDead("one", a)
	if err := w.use(t.Context(), b); err != nil {
		t.Errorf("another session of the same job: %v", err)
	}
	w.wantDead("two", b)
}

// wantDead revokes, uses, and wants a proof.
func (w *world) wantDead(name string, l creds.Lease) {
	w.t.Helper()
	if err := w.issuer.Revoke(w.t.Context(), name, l.Handle); err != nil {
		w.t.Fatalf("Revoke: %v", err)
	}
	if err := w.use(w.t.Context(), l); err == nil || !strings.Contains(err.Error(), "InvalidAccessKeyId") {
		w.t.Errorf("use of a revoked session: got %v, want it refused as unknown", err)
	}
	p, err := w.issuer.Probe(w.t.Context(), name, l.Handle)
	if err != nil || !strings.Contains(p.Refusal, "InvalidAccessKeyId") {
		w.t.Errorf("Probe: got %+v and %v, want a proof", p, err)
	}
}

func testHandleLost(t *testing.T, w *world) {
	l := issue(t, w.issuer, "lost", mainScope)
	if err := w.issuer.Revoke(t.Context(), "lost", nil); !errors.Is(err, creds.ErrNotRevocable) {
		t.Errorf("Revoke: got %v, want ErrNotRevocable", err)
	}
	if p, err := w.issuer.Probe(t.Context(), "lost", nil); err == nil {
		t.Errorf("Probe: got proof %+v of what nobody can try", p)
	}
	w.wantDead("lost", l)
}

func testUnknownRole(t *testing.T, w *world) {
	c := w.config()
	c.Role = "arn:minio:iam:::role/none"
	l, err := newIssuer(t, c).Issue(t.Context(), "aud", grant(mainScope))
	if err == nil || l.Handle != nil {
		t.Errorf("Issue for a role that there is not: got %v", err)
	}
}

// testDown: the server is away while the job ends.
func testDown(t *testing.T, w *world) {
	l := issue(t, w.issuer, "down", mainScope)
	if err := w.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.issuer.Revoke(t.Context(), "down", l.Handle); err == nil || errors.Is(err, creds.ErrNotRevocable) {
		t.Errorf("Revoke while the server is down: got %v", err)
	}
	if err := w.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.use(t.Context(), l); err != nil {
		t.Errorf("harness: session is dead: %v", err)
	}
	w.issuer = newIssuer(t, w.config()) // another life
	w.wantDead("down", l)
}

// testWrongAuthority: a certificate that others signed is not the server's.
func testWrongAuthority(t *testing.T, w *world) {
	stranger := httptest.NewTLSServer(nil)
	defer stranger.Close()
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: stranger.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	c := w.config()
	for _, c.CAFile = range []string{"", file} {
		_, err := newIssuer(t, c).Issue(t.Context(), "ca", grant(mainScope))
		if err == nil || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("ca_file %q: got %v, want the certificate refused", c.CAFile, err)
		}
	}
}
