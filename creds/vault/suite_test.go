package vault_test

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/credstest"
)

const (
	tokenScope = `{"token": true, "path": "secret/data/app", "unleased": true}`
	dbScope    = `{"path": "database/creds/app"}`
)

// TestOneServer runs, one after the other, all that can share a server.
func TestOneServer(t *testing.T) {
	w := newWorld(t)
	for _, test := range []struct {
		name string
		run  func(*testing.T, *world)
	}{
		{"Values", testValues},
		{"Binding", testBinding},
		{"Narrowed", testNarrowed},
		{"ShortLogin", testShortLogin},
		{"Unleased", testUnleased},
		{"Wrapping", testWrapping},
		{"RevocationFails", testRevocationFails},
		{"WithoutAgentRole", testWithoutAgentRole},
		{"LookupForbidden", testLookupForbidden},
		{"KilledAtEveryPoint", testKilledAtEveryPoint},
		{"Down", testDown},
		{"WrongAuthority", testWrongAuthority},
		{"ConformanceOfTokens", testConformanceOfTokens},
		{"ConformanceOfDatabaseRoles", testConformanceOfDatabaseRoles},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.run(t, &world{w.Server, t, w.db, w.identity, w.url, w.keys, w.issuer})
		})
	}
}

func (w *world) suite(scope string) credstest.Harness {
	return credstest.Harness{
		Issuer: w.issuer, Owner: owner, Scope: json.RawMessage(scope), BadScopes: badScopes(),
		Down: w.Stop, Up: w.Restart,
		Freeze: func(context.Context) error { return w.Pause() }, Thaw: func(context.Context) error { return w.Resume() },
	}
}

func badScopes() []json.RawMessage {
	var bad []json.RawMessage
	for _, s := range []string{
		`{}`, `[]`, `{"token": true} {}`,
		`{"path": "secret/../sys/raw"}`, `{"path": "/secret"}`, `{"path": "v1/secret"}`, `{"path": "secret/a?list=true"}`, `{"path": "secret/a%2fb"}`,
		`{"path": "auth/token/create"}`, `{"path": "sys/seal", "data": {}}`,
		`{"path": "secret/data/app"}`, `{"path": "secret/data/none", "unleased": true}`, `{"path": "database/creds/none"}`,
		`{"token": true, "wrap": 5}`, `{"path": "database/creds/app", "wrap": -1}`,
		`{"token": true, "role": "agent"}`, `{"token": true, "role": "a/b"}`,
		`{"token": true, "policies": ["root"]}`, `{"token": true, "policies": ["agent"]}`,
	} {
		bad = append(bad, json.RawMessage(s))
	}
	return bad
}

func testConformanceOfTokens(t *testing.T, w *world) {
	h := w.suite(tokenScope)
	h.Use = w.readKV
	credstest.Run(t, func(*testing.T) credstest.Harness { return h })
}

func testConformanceOfDatabaseRoles(t *testing.T, w *world) {
	h := w.suite(dbScope)
	h.Use, h.Hold = w.useDB, w.hold
	credstest.Run(t, func(*testing.T) credstest.Harness { return h })
}

// hold runs a query that lasts.
func (w *world) hold(ctx context.Context, l creds.Lease) (<-chan error, error) {
	cmd := w.psql(ctx, l, "SELECT pg_sleep(600)")
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // ends with the session, which the suite waits for
	eventually(w.t, "the query runs", func() bool {
		out, err := w.psql(ctx, l, "DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_stat_activity WHERE usename = current_user AND query LIKE '%pg_sleep(600)%' AND state = 'active' AND pid <> pg_backend_pid()) THEN RAISE 'no'; END IF; END $$").CombinedOutput()
		return err == nil && len(out) == 0
	})
	return ended, nil
}

func testValues(t *testing.T, w *world) {
	l := w.issue("values", tokenScope)
	if got := l.Values["password"].Reveal(); got != "kv-secret-value" {
		t.Errorf("password: got %q", got)
	}
	if got := l.Values["n"].Reveal(); got != "7654321987" {
		t.Errorf("a number: got %q, want it in digits", got)
	}
	for _, fact := range []string{"vault_addr", "accessor", "path", "jti"} {
		if l.Facts[fact] == "" {
			t.Errorf("fact %s: empty", fact)
		}
	}
	w.wantDead("values", l, "lookup-self with the token", "is as good as before")
}

// wantDead revokes and wants a proof that has these words.
func (w *world) wantDead(name string, l creds.Lease, words ...string) {
	w.t.Helper()
	if err := w.issuer.Revoke(w.t.Context(), name, l.Handle); err != nil {
		w.t.Fatalf("Revoke: %v", err)
	}
	p, err := w.issuer.Probe(w.t.Context(), name, l.Handle)
	if err != nil {
		w.t.Fatalf("Probe: %v", err)
	}
	for _, word := range words {
		if !strings.Contains(p.How+p.Refusal, word) {
			w.t.Errorf("proof %+v, want %q in it", p, word)
		}
	}
}

// testBinding: what the server is told about a job is what it decides on.
func testBinding(t *testing.T, w *world) {
	for name, change := range map[string]func(*creds.Subject){
		"good":       func(*creds.Subject) {},
		"branch":     func(s *creds.Subject) { s.Ref = "refs/heads/other" },
		"repository": func(s *creds.Subject) { s.Repository = "o/fork" },
	} {
		g := grant(`{"token": true, "role": "main"}`)
		change(&g.Subject)
		l, err := w.issuer.Issue(t.Context(), "bind-"+name, g)
		if (err == nil) != (name == "good") {
			t.Errorf("%s: got %v", name, err)
		}
		if err := w.issuer.Revoke(t.Context(), "bind-"+name, l.Handle); err != nil {
			t.Error(err)
		}
	}
	// A job's identity is not the agent's, whatever it is called.
	g := grant(`{"token": true}`)
	g.Subject.Job, g.Subject.Repository = "installation:inst-1", "installation:inst-1"
	id, err := w.sign(t.Context(), g.Subject, "x")
	if err != nil {
		t.Fatal(err)
	}
	body := map[string]string{"role": "agent", "jwt": id.Token.Reveal()}
	if err := w.Do(t.Context(), "POST", "auth/jwt/login", body, nil); err == nil || !strings.Contains(err.Error(), "sub") {
		t.Errorf("login of a job at the agent's role: got %v, want it refused for its sub", err)
	}
}

func testNarrowed(t *testing.T, w *world) {
	l := w.issue("narrow", `{"token": true, "policies": ["default"]}`)
	if err := w.readKV(t.Context(), l); err == nil {
		t.Error("a token without the policy reads the secret")
	}
	w.wantDead("narrow", l)
}

// testShortLogin: all ends with the login, and the lease says so.
func testShortLogin(t *testing.T, w *world) {
	l := w.issue("short", `{"token": true, "role": "short"}`)
	if left := time.Until(l.ExpiresAt); left > 2*time.Minute || left < time.Minute {
		t.Errorf("lease of a login for 2 minutes ends in %v", left)
	}
	w.wantDead("short", l)
}

func testUnleased(t *testing.T, w *world) {
	l, err := w.issuer.Issue(t.Context(), "unleased", grant(`{"path": "secret/data/app"}`))
	if !errors.Is(err, creds.ErrBadScope) || !strings.Contains(err.Error(), "unleased: true") {
		t.Errorf("a secret without lease: got %v, want it refused, with what to write", err)
	}
	if l.Handle == nil {
		t.Fatal("failed Issue: no handle of the token that it made")
	}
	w.wantDead("unleased", l)
}

func testWrapping(t *testing.T, w *world) {
	unwrap := func(l creds.Lease) int {
		status, err := w.as(t.Context(), l.Values["wrapping_token"], "POST", "sys/wrapping/unwrap")
		if err != nil {
			t.Fatal(err)
		}
		return status
	}
	used := w.issue("wrap-used", `{"path": "secret/data/app", "unleased": true, "wrap": 60}`)
	if used.Values["password"].Reveal() != "kv-secret-value" {
		t.Error("the value is not in the lease, and so not masked")
	}
	if first, second := unwrap(used), unwrap(used); first != 200 || second == 200 {
		t.Errorf("unwrapped twice: got %d and %d", first, second)
	}
	w.wantDead("wrap-used", used)
	unused := w.issue("wrap-unused", `{"path": "secret/data/app", "unleased": true, "wrap": 60}`)
	if _, err := w.issuer.Probe(t.Context(), "wrap-unused", unused.Handle); !errors.Is(err, creds.ErrStillValid) {
		t.Errorf("Probe: got %v, want it valid", err)
	}
	w.wantDead("wrap-unused", unused, "wrapping token")
	if status := unwrap(unused); status == 200 {
		t.Error("unwrapped after it was revoked")
	}
}

// testRevocationFails: a role that owns something, and statements that do not
// expect it. The password goes on working, and is not called dead.
func testRevocationFails(t *testing.T, w *world) {
	l := w.issue("stubborn", `{"path": "database/creds/stubborn"}`)
	if out, err := w.psql(t.Context(), l, "CREATE TABLE public.owned (a int)").CombinedOutput(); err != nil {
		t.Fatalf("%s", out)
	}
	if err := w.issuer.Revoke(t.Context(), "stubborn", l.Handle); err == nil || !strings.Contains(err.Error(), "2BP01") {
		t.Errorf("Revoke: got %v, want the database's refusal", err)
	}
	if err := w.useDB(t.Context(), l); err != nil {
		t.Fatalf("harness: the role is dead after all: %v", err)
	}
	if p, err := w.issuer.Probe(t.Context(), "stubborn", l.Handle); !errors.Is(err, creds.ErrStillValid) {
		t.Errorf("Probe: got %+v and %v, want it valid", p, err)
	}
	w.root("DROP TABLE public.owned")
	w.wantDead("stubborn", l, "invalid lease")
	if err := w.useDB(t.Context(), l); err == nil {
		t.Error("the role still logs in")
	}
}

func testWithoutAgentRole(t *testing.T, w *world) {
	c := w.config()
	c.AgentRole = ""
	w.issuer = w.newIssuer(c)
	if _, err := w.issuer.List(t.Context()); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("List: got %v, want ErrUnsupported", err)
	}
	l := w.issue("alone", tokenScope)
	if err := w.issuer.Revoke(t.Context(), "alone", nil); !errors.Is(err, creds.ErrNotRevocable) {
		t.Errorf("Revoke without a handle: got %v, want ErrNotRevocable", err)
	}
	w.wantDead("alone", l)
	l, err := w.issuer.Issue(t.Context(), "alone-db", grant(dbScope))
	if err == nil || !strings.Contains(err.Error(), "agent_role") || len(l.Values) > 0 {
		t.Errorf("Issue of what nobody could see dead: got %v, want it refused", err)
	}
	if err := w.issuer.Revoke(t.Context(), "alone-db", l.Handle); err != nil {
		t.Error(err)
	}
}

// testLookupForbidden: a token that cannot look itself up is refused at once,
// since that refusal would later pass for a proof.
func testLookupForbidden(t *testing.T, w *world) {
	w.do("PUT", "sys/policies/acl/blind", `{"policy": "path \"auth/token/create\" { capabilities = [\"update\"] } path \"auth/token/lookup-self\" { capabilities = [\"deny\"] }"}`)
	w.role("blind", `"bound_claims": {"provider": "local"}, "token_policies": ["blind"], "token_ttl": "1h"`)
	l, err := w.issuer.Issue(t.Context(), "blind", grant(`{"token": true, "role": "blind"}`))
	if err == nil || !strings.Contains(err.Error(), "default") {
		t.Errorf("Issue: got %v, want it refused, with what to do", err)
	}
	if err := w.issuer.Revoke(t.Context(), "blind", l.Handle); err != nil {
		t.Error(err)
	}
	_, err = w.issuer.Issue(t.Context(), "weak", grant(`{"token": true, "role": "weak"}`))
	if err == nil || !strings.Contains(err.Error(), "auth/token/create") {
		t.Errorf("Issue with a role that may make no token: got %v, want to read which policy is missing", err)
	}
}

// testDown: the server is away while the job ends.
func testDown(t *testing.T, w *world) {
	l := w.issue("down", dbScope)
	if err := w.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.issuer.Revoke(t.Context(), "down", l.Handle); err == nil {
		t.Error("Revoke while the server is down: got nil")
	}
	if err := w.useDB(t.Context(), l); err != nil {
		t.Errorf("harness: role is dead: %v", err)
	}
	if err := w.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.issuer = w.newIssuer(w.config()) // another life
	w.wantDead("down", l, "invalid lease")
	if err := w.useDB(t.Context(), l); err == nil {
		t.Error("the role still logs in")
	}
	infos, err := w.issuer.List(t.Context())
	if err != nil || slices.ContainsFunc(infos, func(i creds.Info) bool { return i.Name == "down" }) {
		t.Errorf("List: got %+v and %v", infos, err)
	}
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
		_, err := w.newIssuer(c).Issue(t.Context(), "ca", grant(tokenScope))
		if err == nil || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("ca_file %q: got %v, want the certificate refused", c.CAFile, err)
		}
	}
}
