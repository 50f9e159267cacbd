package gitea_test

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/credstest"
)

// TestOneServer runs, one after the other, all that can share a server.
func TestOneServer(t *testing.T) {
	w := newWorld(t)
	for _, test := range []struct {
		name string
		run  func(*testing.T, *world)
	}{
		{"Scopes", testScopes},
		{"NoWayToStay", testNoWayToStay},
		{"BotWithAToken", testBotWithAToken},
		{"WrongPassword", testWrongPassword},
		{"ManyTokens", testManyTokens},
		{"OtherInstallation", testOtherInstallation},
		{"KilledAtEveryPoint", testKilledAtEveryPoint},
		{"Down", testDown},
		{"Conformance", testConformance},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, &world{w.Server, t, w.issuer}) })
	}
}

func testConformance(t *testing.T, w *world) {
	var bad []json.RawMessage
	for _, s := range []string{
		`{}`, `[]`, `{"scopes": []}`, `{"scopes": ["read:repository"]} {}`,
		`{"scopes": ["all"]}`, `{"scopes": ["read:user", "all"]}`, `{"scopes": ["write:user"]}`, `{"scopes": ["write:admin"]}`,
		`{"scopes": ["sudo"]}`, `{"scopes": ["read:nothing"]}`, `{"scopes": [""]}`, `{"scopes": ["public-only"]}`,
		`{"scopes": ["read:issue"]}`, `{"scopes": ["read:repository,all"]}`,
	} {
		bad = append(bad, json.RawMessage(s))
	}
	h := credstest.Harness{
		Issuer: w.issuer, Owner: owner, Scope: json.RawMessage(readScope), BadScopes: bad, Use: w.use,
		Down: func(context.Context) error { return w.Stop() }, Up: w.Start,
		Freeze: func(context.Context) error { return w.Pause() }, Thaw: func(context.Context) error { return w.Resume() },
	}
	credstest.Run(t, func(*testing.T) credstest.Harness { return h })
}

// testScopes: a token does what its scopes say and no more, and is seen alive
// and dead although it may not ask who it is.
func testScopes(t *testing.T, w *world) {
	l := w.issue("scopes", `{"scopes": ["write:package"]}`)
	if status, err := w.as(t.Context(), l, http.MethodGet, "/user/repos"); err != nil || status != http.StatusForbidden {
		t.Errorf("repositories with write:package: got %d and %v, want 403", status, err)
	}
	if status, err := w.as(t.Context(), l, http.MethodGet, "/packages/"+bot); err != nil || status != http.StatusOK {
		t.Errorf("packages with write:package: got %d and %v, want 200", status, err)
	}
	for _, fact := range []string{"username", "url", "token_id"} {
		if l.Facts[fact] == "" {
			t.Errorf("fact %s: empty", fact)
		}
	}
	if _, err := w.issuer.Probe(t.Context(), "scopes", l.Handle); !errors.Is(err, creds.ErrStillValid) {
		t.Errorf("Probe: got %v, want it valid", err)
	}
	w.wantDead("scopes", l)
}

// wantDead revokes and wants a proof by use.
func (w *world) wantDead(name string, l creds.Lease) {
	w.t.Helper()
	if err := w.issuer.Revoke(w.t.Context(), name, l.Handle); err != nil {
		w.t.Fatalf("Revoke: %v", err)
	}
	p, err := w.issuer.Probe(w.t.Context(), name, l.Handle)
	if err != nil || !strings.HasPrefix(p.How, "GET /api/v1/user with the token") || !strings.HasPrefix(p.Refusal, "401: ") {
		w.t.Errorf("Probe: got %+v and %v, want the refusal of its use", p, err)
	}
	if err := w.use(w.t.Context(), l); err == nil {
		w.t.Error("the token still works")
	}
}

// testNoWayToStay: with the widest scopes that are given, a job makes no token
// and no key that would outlive its own. With write:user it would.
func testNoWayToStay(t *testing.T, w *world) {
	for _, scopes := range [][]string{{"write:repository", "read:user", "write:package"}, {"write:user"}} {
		token := w.issue("stay", `{"scopes": ["write:repository", "read:user", "write:package"]}`).Values["token"].Reveal()
		attack := scopes[0] == "write:user"
		if attack { // the bot makes it itself: the issuer does not
			token = w.botToken("stays", scopes)
		}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, w.URL()+"/api/v1/users/"+bot+"/tokens", strings.NewReader(`{"name": "child", "scopes": ["read:user"]}`))
		if err != nil {
			t.Fatal(err)
		}
		req.SetBasicAuth(bot, token)
		req.Header.Set("Content-Type", "application/json")
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if made := res.StatusCode == http.StatusCreated; made != attack {
			t.Errorf("a token of a token with %q: status %d; made: %v, want %v", scopes, res.StatusCode, made, attack)
		}
		if err := w.issuer.Revoke(t.Context(), "stay", nil); err != nil {
			t.Fatal(err)
		}
	}
}

// botToken makes a token with the bot's own password.
func (w *world) botToken(name string, scopes []string) string {
	w.t.Helper()
	body, err := json.Marshal(map[string]any{"name": name, "scopes": scopes})
	if err != nil {
		w.t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(w.t.Context(), http.MethodPost, w.URL()+"/api/v1/users/"+bot+"/tokens", strings.NewReader(string(body)))
	if err != nil {
		w.t.Fatal(err)
	}
	req.SetBasicAuth(bot, password)
	req.Header.Set("Content-Type", "application/json")
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	var made struct {
		SHA1 string `json:"sha1"`
	}
	if err := json.NewDecoder(res.Body).Decode(&made); err != nil || made.SHA1 == "" {
		w.t.Fatalf("token %s: status %d, %v", name, res.StatusCode, err)
	}
	return made.SHA1
}

// testBotWithAToken: what the agent holds need not be the bot's password.
func testBotWithAToken(t *testing.T, w *world) {
	c := w.config()
	c.Password = give(w.botToken("agent", []string{"write:user", "read:repository"}))
	w.issuer = w.newIssuer(c)
	w.wantDead("narrow", w.issue("narrow", readScope))
	l, err := w.issuer.Issue(t.Context(), "wide", grant(`{"scopes": ["write:package"]}`))
	if err == nil || len(l.Values) > 0 {
		t.Error("a lease with more than the agent's own token has")
	}
}

func testWrongPassword(t *testing.T, w *world) {
	c := w.config()
	c.Password = give("wrong-password")
	i := w.newIssuer(c)
	_, err := i.Issue(t.Context(), "wrong", grant(readScope))
	if err == nil || !strings.Contains(err.Error(), "password_file") || strings.Contains(err.Error(), "wrong-password") {
		t.Errorf("Issue: got %v, want to read where to look, and no password", err)
	}
	if err := i.Revoke(t.Context(), "wrong", nil); err == nil {
		t.Error("Revoke: got nil, although nobody could look")
	}
}

// testManyTokens: a lease is found behind the first page of the bot's tokens.
func testManyTokens(t *testing.T, w *world) {
	w.issue("page-first", readScope)
	for n := range 60 {
		w.botToken("other-"+strconv.Itoa(n), []string{"read:misc"})
	}
	w.issue("page-last", readScope)
	infos, err := w.issuer.List(t.Context())
	if err != nil || len(infos) != 2 {
		t.Errorf("List: got %+v and %v, want both leases", infos, err)
	}
	for _, name := range []string{"page-first", "page-last"} {
		if err := w.issuer.Revoke(t.Context(), name, nil); err != nil {
			t.Error(err)
		}
	}
	if infos, err := w.issuer.List(t.Context()); err != nil || len(infos) > 0 {
		t.Errorf("List after both were revoked by name: got %+v and %v", infos, err)
	}
}

// testOtherInstallation: agents that share a bot do not see each other's leases.
func testOtherInstallation(t *testing.T, w *world) {
	l := w.issue("shared", readScope)
	c := w.config()
	c.Owner = "inst-2"
	other := w.newIssuer(c)
	if infos, err := other.List(t.Context()); err != nil || len(infos) > 0 {
		t.Errorf("List of another installation: got %+v and %v, want nothing", infos, err)
	}
	if err := other.Revoke(t.Context(), "shared", nil); err != nil {
		t.Error(err)
	}
	if err := w.use(t.Context(), l); err != nil {
		t.Errorf("another installation revoked the lease: %v", err)
	}
	w.wantDead("shared", l)
}

// testDown: the server is away while the job ends, and the agent dies meanwhile.
func testDown(t *testing.T, w *world) {
	l := w.issue("down", readScope)
	if err := w.Stop(); err != nil {
		t.Fatal(err)
	}
	if err := w.issuer.Revoke(t.Context(), "down", l.Handle); err == nil {
		t.Error("Revoke while the server is down: got nil")
	}
	if err := w.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.use(t.Context(), l); err != nil {
		t.Errorf("harness: token is dead: %v", err)
	}
	w.issuer = w.newIssuer(w.config()) // another life
	w.wantDead("down", l)
}
