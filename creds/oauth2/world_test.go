package oauth2_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/oauth2"
	"github.com/mayfly-ci/mayfly/creds/oidc"
	"github.com/mayfly-ci/mayfly/test/oauthtest"
)

const (
	owner     = "inst-1"
	readScope = `{"scopes": ["api:read"]}`
)

type safe struct{ b []byte }

func (s *safe) Load() ([]byte, error) { return s.b, nil }
func (s *safe) Save(b []byte) error   { s.b = b; return nil }

// A world is a server that trusts an issuer of identities.
type world struct {
	*oauthtest.Server
	t        testing.TB
	identity *oidc.Issuer
	issuer   *oauth2.Issuer
}

func newWorld(t testing.TB) *world {
	t.Helper()
	mux := http.NewServeMux()
	documents := httptest.NewServer(mux)
	t.Cleanup(documents.Close)
	identity, err := oidc.New(oidc.Config{URL: documents.URL, Owner: owner, Store: &safe{}})
	if err != nil {
		t.Fatal(err)
	}
	mux.Handle("/", identity)
	w := &world{t: t, identity: identity, Server: oauthtest.Start(t, documents.URL+"/.well-known/jwks.json")}
	w.issuer = w.newIssuer(config(w.URL()))
	return w
}

// give is how the agent gets a secret.
func give(secret string) func() (creds.Secret, error) {
	return func() (creds.Secret, error) { return creds.NewSecret(secret), nil }
}

func config(url string) oauth2.Config {
	return oauth2.Config{
		Endpoints: oauth2.Endpoints{
			Token: url + "/oauth/token", Revocation: url + "/revoke", Introspection: url + "/oauth/introspect", Use: url + "/api",
		},
		ClientID: "agent", ClientSecret: give("agent-secret"), Owner: owner,
		Scopes: []string{"api:read", "api:write", "api:none", "brief"},
	}
}

// sign says who asks, to this server.
func (w *world) sign(_ context.Context, s creds.Subject, lease string) (oauth2.Identity, error) {
	t, err := w.identity.Mint(s, w.URL(), map[string]string{"lease": lease})
	return oauth2.Identity{Token: t.Value, ID: t.ID}, err
}

func (w *world) newIssuer(c oauth2.Config) *oauth2.Issuer {
	w.t.Helper()
	i, err := oauth2.New(c)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(i.Close)
	return i
}

func grant(scope string) creds.Grant {
	return creds.Grant{
		Subject: creds.Subject{Provider: "local", Repository: "o/r", Ref: "refs/heads/main", Job: "mf-1", Origin: creds.Origin{JobID: "mf-1"}},
		Scope:   json.RawMessage(scope), Expires: time.Now().Add(10 * time.Minute),
	}
}

func (w *world) issue(name, scope string) creds.Lease {
	w.t.Helper()
	l, err := w.issuer.Issue(w.t.Context(), name, grant(scope))
	if err != nil {
		w.t.Fatalf("Issue: %v", err)
	}
	return l
}

// use is what a job does with its token.
func (w *world) use(ctx context.Context, l creds.Lease) error {
	return w.useToken(ctx, l.Values["access_token"].Reveal())
}

func (w *world) useToken(ctx context.Context, token string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.URL()+"/api", nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d", res.StatusCode)
	}
	_ = res.Body.Close()
	return err
}

// tokenOf is what the handle of a lease is about.
func tokenOf(t testing.TB, l creds.Lease) string {
	t.Helper()
	var h struct {
		Token string `json:"token"`
	}
	if err := json.Unmarshal(l.Handle, &h); err != nil || h.Token == "" {
		t.Fatalf("no token in the handle: %v", err)
	}
	return h.Token
}
