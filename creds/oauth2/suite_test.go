package oauth2_test

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/credstest"
	"github.com/mayfly-ci/mayfly/creds/oauth2"
)

// TestOneServer runs, one after the other, all that can share a server.
func TestOneServer(t *testing.T) {
	w := newWorld(t)
	for _, test := range []struct {
		name string
		run  func(*testing.T, *world)
	}{
		{"Binding", testBinding},
		{"WiderThanAsked", testWiderThanAsked},
		{"LongerThanGranted", testLongerThanGranted},
		{"ProofsApart", testProofsApart},
		{"WrongSecret", testWrongSecret},
		{"SecretInTheBody", testSecretInTheBody},
		{"OfAnotherClient", testOfAnotherClient},
		{"KilledAtEveryPoint", testKilledAtEveryPoint},
		{"Down", testDown},
		{"ConformanceOfClientCredentials", func(t *testing.T, w *world) { conform(t, w) }},
		{"ConformanceOfExchange", testConformanceOfExchange},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, &world{w.Server, t, w.identity, w.issuer}) })
	}
}

func conform(t *testing.T, w *world) {
	var bad []json.RawMessage
	for _, s := range []string{
		`{}`, `[]`, `{"scopes": []}`, `{"scopes": ["api:read"]} {}`, `{"scopes": ["api:admin"]}`, `{"scopes": ["api:read api:write"]}`,
		`{"scopes": ["api:read"], "audience": "elsewhere"}`,
		`{"scopes": ["api:none"]}`, // which the server does not have
	} {
		bad = append(bad, json.RawMessage(s))
	}
	h := credstest.Harness{
		Issuer: w.issuer, Owner: owner, Scope: json.RawMessage(readScope), BadScopes: bad, Use: w.use,
		Down: w.Down, Up: w.Up,
		Freeze: func(context.Context) error { return w.Pause() }, Thaw: func(context.Context) error { return w.Resume() },
	}
	credstest.Run(t, func(*testing.T) credstest.Harness { return h })
}

func (w *world) exchanging() *oauth2.Issuer {
	c := config(w.URL())
	c.Sign = w.sign
	return w.newIssuer(c)
}

func testConformanceOfExchange(t *testing.T, w *world) {
	w.issuer = w.exchanging()
	conform(t, w)
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
	if err := w.useToken(w.t.Context(), tokenOf(w.t, l)); err == nil {
		w.t.Error("the token still works")
	}
}

// testBinding: what the server is told about a job is what it decides on.
func testBinding(t *testing.T, w *world) {
	w.issuer = w.exchanging()
	l := w.issue("bind", readScope)
	if l.Facts["jti"] == "" || l.Facts["scope"] != "api:read" {
		t.Errorf("facts: got %v", l.Facts)
	}
	w.wantDead("bind", l, "introspection", "active: false", "/api with the token", "invalid_token")
	g := grant(readScope)
	g.Subject.Ref = "refs/heads/other"
	l, err := w.issuer.Issue(t.Context(), "branch", g)
	if err == nil || !strings.Contains(err.Error(), "not for this branch") || l.Handle != nil {
		t.Errorf("job of another branch: got %v, want it refused", err)
	}
	// An identity that is for somebody else is worth nothing here.
	c := config(w.URL())
	c.Sign = func(_ context.Context, s creds.Subject, lease string) (oauth2.Identity, error) {
		id, err := w.identity.Mint(s, "https://elsewhere.example", nil)
		return oauth2.Identity{Token: id.Value, ID: id.ID}, err
	}
	if _, err := w.newIssuer(c).Issue(t.Context(), "aud", grant(readScope)); err == nil {
		t.Error("identity for another audience: got a token")
	}
}

// testWiderThanAsked: the server's client "generous" is given a scope more.
func testWiderThanAsked(t *testing.T, w *world) {
	c := config(w.URL())
	c.ClientID, c.ClientSecret = "generous", give("generous-secret")
	w.issuer = w.newIssuer(c)
	l, err := w.issuer.Issue(t.Context(), "wide", grant(readScope))
	if err == nil || !strings.Contains(err.Error(), `"api:admin", which was not asked for`) || len(l.Values) > 0 {
		t.Errorf("Issue: got %v, want it refused", err)
	}
	if err := w.useToken(t.Context(), tokenOf(t, l)); err == nil {
		t.Error("the token that may more is alive")
	}
	w.wantDead("wide", l)
}

// testLongerThanGranted: the server's tokens live five minutes, or with "brief"
// half of one.
func testLongerThanGranted(t *testing.T, w *world) {
	g := grant(readScope)
	g.Expires = time.Now().Add(time.Minute)
	l, err := w.issuer.Issue(t.Context(), "long", g)
	if err == nil || !strings.Contains(err.Error(), "the grant ends at") || len(l.Values) > 0 {
		t.Errorf("Issue: got %v, want it refused", err)
	}
	if err := w.useToken(t.Context(), tokenOf(t, l)); err == nil {
		t.Error("the token that outlives its grant is alive")
	}
	g.Scope = json.RawMessage(`{"scopes": ["api:read", "brief"]}`)
	l, err = w.issuer.Issue(t.Context(), "brief", g)
	if err != nil || time.Until(l.ExpiresAt) > 30*time.Second {
		t.Fatalf("brief: got %v, until %v", err, l.ExpiresAt)
	}
	w.wantDead("brief", l)
}

// testProofsApart: either way of asking is enough to tell.
func testProofsApart(t *testing.T, w *world) {
	for name, change := range map[string]func(*oauth2.Endpoints){
		"introspection": func(e *oauth2.Endpoints) { e.Use = "" },
		"use":           func(e *oauth2.Endpoints) { e.Introspection = "" },
	} {
		c := config(w.URL())
		change(&c.Endpoints)
		w.issuer = w.newIssuer(c)
		l := w.issue(name, readScope)
		if _, err := w.issuer.Probe(t.Context(), name, l.Handle); !errors.Is(err, creds.ErrStillValid) {
			t.Errorf("%s: Probe: got %v, want it valid", name, err)
		}
		w.wantDead(name, l)
	}
}

func testWrongSecret(t *testing.T, w *world) {
	l := w.issue("secret", readScope)
	c := config(w.URL())
	c.ClientSecret = give("not-the-secret")
	i := w.newIssuer(c)
	_, err := i.Issue(t.Context(), "wrong", grant(readScope))
	if err == nil || !strings.Contains(err.Error(), "client_secret_file") || strings.Contains(err.Error(), "not-the-secret") {
		t.Errorf("Issue: got %v, want to read where to look, and no secret", err)
	}
	if err := i.Revoke(t.Context(), "secret", l.Handle); err == nil {
		t.Error("Revoke: got nil, although the server does not know us")
	}
	if p, err := i.Probe(t.Context(), "secret", l.Handle); err == nil || errors.Is(err, creds.ErrStillValid) {
		t.Errorf("Probe: got %+v and %v, want that nobody can say", p, err)
	}
	w.wantDead("secret", l)
}

func testSecretInTheBody(t *testing.T, w *world) {
	c := config(w.URL())
	c.Post = true
	c.Endpoints.Introspection = "" // this server's wants the header
	w.issuer = w.newIssuer(c)
	w.wantDead("post", w.issue("post", `{"scopes": ["api:read", "api:write"]}`))
}

// testOfAnotherClient: a server that lets the client not see the token calls it
// inactive, alive or dead, which must not pass for a proof.
func testOfAnotherClient(t *testing.T, w *world) {
	l := w.issue("other", readScope)
	c := config(w.URL())
	c.ClientID, c.ClientSecret = "generous", give("generous-secret")
	p, err := w.newIssuer(c).Probe(t.Context(), "other", l.Handle)
	if !errors.Is(err, creds.ErrStillValid) {
		t.Errorf("Probe as another client: got %+v and %v, want use to say that it is valid", p, err)
	}
	w.wantDead("other", l)
}

// testDown: the server is away while the job ends, and the agent dies meanwhile.
func testDown(t *testing.T, w *world) {
	l := w.issue("down", readScope)
	if err := w.Down(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.issuer.Revoke(t.Context(), "down", l.Handle); err == nil {
		t.Error("Revoke while the server is down: got nil")
	}
	if err := w.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.use(t.Context(), l); err != nil {
		t.Errorf("harness: token is dead: %v", err)
	}
	w.issuer = w.newIssuer(config(w.URL())) // another life
	w.wantDead("down", l)
}

func TestValidate(t *testing.T) {
	t.Parallel()
	if err := config("https://id.example.com").Validate(); err != nil {
		t.Error(err)
	}
	for want, change := range map[string]func(*oauth2.Config){
		`token_url ""`:       func(c *oauth2.Config) { c.Endpoints.Token = "" },
		`revocation_url ""`:  func(c *oauth2.Config) { c.Endpoints.Revocation = "" },
		"in the clear":       func(c *oauth2.Config) { c.Endpoints.Use = "http://api.example.com" },
		"nobody could tell":  func(c *oauth2.Config) { c.Endpoints.Use, c.Endpoints.Introspection = "", "" },
		"ca_file":            func(c *oauth2.Config) { c.Endpoints.Token, c.CAFile = "http://127.0.0.1:1", "ca.pem" },
		"client_id":          func(c *oauth2.Config) { c.ClientID = "" },
		"client_secret_file": func(c *oauth2.Config) { c.ClientSecret = nil },
		"scopes: missing":    func(c *oauth2.Config) { c.Scopes = nil },
		`scopes: "a b"`:      func(c *oauth2.Config) { c.Scopes = []string{"a b"} },
		"owner":              func(c *oauth2.Config) { c.Owner = "" },
	} {
		c := config("https://id.example.com")
		c.Scopes = slices.Clone(c.Scopes)
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
}
