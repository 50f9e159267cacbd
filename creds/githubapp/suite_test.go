package githubapp_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/credstest"
	"github.com/mayfly-ci/mayfly/creds/githubapp"
)

const (
	owner     = "inst-1"
	oneScope  = `{"repository_ids": [1], "permissions": {"contents": "read"}}`
	userAgent = "a job"
)

func (f *fakeGitHub) config() githubapp.Config {
	return githubapp.Config{
		Address: f.URL, App: clientID, Installation: installation,
		Key: func() (creds.Secret, error) { return creds.NewSecret(f.pem()), nil },
	}
}

func noKey() (creds.Secret, error) { return creds.Secret{}, errors.New("no key") }

func newIssuer(t testing.TB, c githubapp.Config) *githubapp.Issuer {
	t.Helper()
	i, err := githubapp.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(i.Close)
	return i
}

func grant(scope string) creds.Grant {
	return creds.Grant{
		Subject: creds.Subject{Provider: "local", Repository: "o/r1", Job: "mf-1"},
		Scope:   json.RawMessage(scope), Expires: time.Now().Add(2 * time.Hour),
	}
}

// use is a request of a job.
func (f *fakeGitHub) use(ctx context.Context, l creds.Lease) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, f.URL+"/installation/repositories", nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+l.Values["token"].Reveal())
	req.Header.Set("Accept", "application/vnd.github+json")
	req.Header.Set("X-Github-Api-Version", "2022-11-28")
	req.Header.Set("User-Agent", userAgent)
	res, err := f.Client().Do(req)
	if err != nil {
		return err
	}
	b, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d: %s", res.StatusCode, b)
	}
	return errors.Join(err, res.Body.Close())
}

func TestConformance(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	i := newIssuer(t, f.config())
	down := func(down bool) func(context.Context) error {
		return func(context.Context) error { f.set(func() { f.down = down }); return nil }
	}
	var bad []json.RawMessage
	for _, s := range []string{
		`{}`, `[]`, oneScope + " {}", `{"repository_ids": [1]}`, `{"permissions": {"contents": "read"}}`,
		`{"repository_ids": [], "permissions": {"contents": "read"}}`, `{"repository_ids": [1], "permissions": {}}`,
		`{"repository_ids": [0], "permissions": {"contents": "read"}}`, `{"repository_ids": ["o/r"], "permissions": {"contents": "read"}}`,
		`{"repository_ids": [1], "permissions": {"contents": "none"}}`, `{"repository_ids": [1], "permissions": {"": "read"}}`,
		`{"repository_ids": [3], "permissions": {"contents": "read"}}`, `{"repository_ids": [1], "permissions": {"issues": "write"}}`,
		`{"repository_ids": [1` + strings.Repeat(",1", 100) + `], "permissions": {"contents": "read"}}`,
	} {
		bad = append(bad, json.RawMessage(s))
	}
	credstest.Run(t, func(*testing.T) credstest.Harness {
		return credstest.Harness{
			Issuer: i, Owner: owner, Scope: json.RawMessage(oneScope), BadScopes: bad, Lasts: 2 * time.Hour, Use: f.use,
			Down: down(true), Up: down(false),
			Freeze: func(context.Context) error { f.set(func() { f.frozen = make(chan struct{}) }); return nil },
			Thaw:   func(context.Context) error { f.set(func() { close(f.frozen); f.frozen = nil }); return nil },
		}
	})
	if n := f.live(); n > 1 { // a request that was cut short may have made one
		t.Errorf("%d tokens live after the suite", n)
	}
}

// TestWider: what is not just what was asked for is revoked before anybody has it.
func TestWider(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	i := newIssuer(t, f.config())
	for name, change := range map[string]func(*token, map[string]any){
		"all repositories": func(_ *token, a map[string]any) { a["repository_selection"] = "all" },
		"another, said":    func(_ *token, a map[string]any) { a["repositories"] = repositories([]int64{1, 2}) },
		"another, in fact": func(t *token, _ map[string]any) { t.repositories = []int64{1, 2} },
		"none":             func(t *token, a map[string]any) { t.repositories = nil },
		"more rights":      func(_ *token, a map[string]any) { a["permissions"] = map[string]string{"contents": "write"} },
		"a right from tomorrow": func(_ *token, a map[string]any) {
			a["permissions"] = map[string]string{"contents": "read", "teleports": "write"}
		},
		"metadata to write": func(_ *token, a map[string]any) {
			a["permissions"] = map[string]string{"contents": "read", "metadata": "write"}
		},
		"fewer rights": func(_ *token, a map[string]any) { a["permissions"] = map[string]string{"metadata": "read"} },
		"longer":       func(_ *token, a map[string]any) { a["expires_at"] = time.Now().Add(3 * time.Hour).Format(time.RFC3339) },
		"for ever":     func(_ *token, a map[string]any) { delete(a, "expires_at") },
	} {
		f.set(func() { f.change = change })
		l, err := i.Issue(t.Context(), "wide", grant(oneScope))
		if err == nil || l.Values != nil || l.Handle == nil {
			t.Errorf("%s: got %v, want it refused, and the handle", name, err)
		}
		if n := f.live(); n != 0 {
			t.Errorf("%s: %d tokens live", name, n)
		}
		if err := i.Revoke(t.Context(), "wide", l.Handle); err != nil {
			t.Errorf("%s: Revoke: %v", name, err)
		}
	}
	f.set(func() { f.change = func(_ *token, a map[string]any) { delete(a, "repositories") } })
	l, err := i.Issue(t.Context(), "unsaid", grant(oneScope))
	if err != nil {
		t.Errorf("repositories that are not in the answer, and right: %v", err)
	}
	if err := i.Revoke(t.Context(), "unsaid", l.Handle); err != nil {
		t.Error(err)
	}
}

// TestRevoked: dead is what GitHub does not know.
func TestRevoked(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	i := newIssuer(t, f.config())
	l, err := i.Issue(t.Context(), "job", grant(oneScope))
	if err != nil {
		t.Fatal(err)
	}
	if err := i.Revoke(t.Context(), "job", nil); !errors.Is(err, creds.ErrNotRevocable) {
		t.Errorf("Revoke without a handle: got %v, want ErrNotRevocable", err)
	}
	f.set(func() { f.lag = 1 })
	if err := i.Revoke(t.Context(), "job", l.Handle); err != nil {
		t.Fatal(err)
	}
	if _, err := i.Probe(t.Context(), "job", l.Handle); !errors.Is(err, creds.ErrStillValid) {
		t.Errorf("Probe before it is known everywhere: got %v, want ErrStillValid", err)
	}
	p, err := i.Probe(t.Context(), "job", l.Handle)
	if err != nil || !strings.Contains(p.Refusal, "Bad credentials") {
		t.Errorf("Probe: got %+v and %v", p, err)
	}
	if err := f.use(t.Context(), l); err == nil || !strings.Contains(err.Error(), "401") {
		t.Errorf("use of a revoked token: got %v, want 401", err)
	}
}

// TestShortGrant: an hour is the life of every token.
func TestShortGrant(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	g := grant(oneScope)
	g.Expires = time.Now().Add(59 * time.Minute)
	_, err := newIssuer(t, f.config()).Issue(t.Context(), "short", g)
	if err == nil || !strings.Contains(err.Error(), "1h0m0s") || len(f.tokens) > 0 {
		t.Errorf("Issue for 59 minutes: got %v, want it refused, with what there is, and nothing made", err)
	}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	if err := newIssuer(t, f.config()).Check(t.Context()); err != nil {
		t.Errorf("Check: %v", err)
	}
	other, c := newFake(t), f.config()
	c.Key = other.config().Key
	if err := newIssuer(t, c).Check(t.Context()); err == nil || !strings.Contains(err.Error(), "private_key_file") {
		t.Errorf("Check with another key: got %v, want to read where to look", err)
	}
	c.Key = func() (creds.Secret, error) { return creds.NewSecret("hello-secret"), nil }
	if err := newIssuer(t, c).Check(t.Context()); err == nil || strings.Contains(err.Error(), "hello") {
		t.Errorf("Check with no key: got %v", err)
	}
}

// TestOnlyGitHubsWordIsAProof: what a proxy says is not about the token.
func TestOnlyGitHubsWordIsAProof(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		status int
		body   string
		proof  bool
	}{
		"refusal":         {401, `{"message": "Bad credentials"}`, true},
		"proxy's refusal": {401, `{"message": "Proxy wants TOKEN"}`, false},
		"page of a proxy": {401, "<html>Bad credentials</html>", false},
		"forbidden":       {403, `{"message": "Resource not accessible by integration"}`, false},
		"limited":         {403, `{"message": "API rate limit exceeded"}`, false},
		"not found":       {404, `{"message": "Not Found"}`, false},
		"unavailable":     {503, `{"message": "Bad credentials"}`, false},
		"redirect":        {307, "", false},
		"accepted":        {200, `{"total_count": 0, "repositories": []}`, false},
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "http://127.0.0.1:1/")
			w.WriteHeader(c.status)
			_, _ = io.WriteString(w, strings.ReplaceAll(c.body, "TOKEN", r.Header.Get("Authorization")))
		}))
		i := newIssuer(t, githubapp.Config{Address: server.URL, App: "a", Installation: 1, Key: noKey})
		p, err := i.Probe(t.Context(), "l", []byte(`{"token": "ghs_secret"}`))
		if (err == nil) != c.proof || errors.Is(err, creds.ErrStillValid) != (name == "accepted") {
			t.Errorf("%s: got %+v and %v, proof wanted: %v", name, p, err, c.proof)
		}
		if !c.proof && name != "accepted" && i.Revoke(t.Context(), "l", []byte(`{"token": "ghs_secret"}`)) == nil {
			t.Errorf("%s: Revoke: got nil", name)
		}
		if strings.Contains(fmt.Sprint(p, err), "ghs_secret") {
			t.Errorf("%s: the token is in %+v, %v", name, p, err)
		}
		server.Close()
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	good := githubapp.Config{App: "Iv1", Installation: 1, Key: noKey}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for want, change := range map[string]func(*githubapp.Config){
		"in the clear":     func(c *githubapp.Config) { c.Address = "http://github.internal" },
		"address":          func(c *githubapp.Config) { c.Address = "https://github.internal/" },
		"ca_file":          func(c *githubapp.Config) { c.Address, c.CAFile = "http://127.0.0.1:1", "ca.pem" },
		"app":              func(c *githubapp.Config) { c.App = "" },
		"installation":     func(c *githubapp.Config) { c.Installation = 0 },
		"private_key_file": func(c *githubapp.Config) { c.Key = nil },
	} {
		c := good
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
}
