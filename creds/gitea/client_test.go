package gitea_test

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/gitea"
)

// TestOnlyTheServersWordIsAProof: what a proxy or a server in trouble says is not
// about the token.
func TestOnlyTheServersWordIsAProof(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		status       int
		body         string
		proof, alive bool
	}{
		"refusal":         {401, `{"message": "invalid token TOKEN"}`, true, false},
		"page of a proxy": {401, "<html>go away</html>", false, false},
		"JSON of a proxy": {401, `{"error": "no"}`, false, false},
		"trouble":         {500, `{"message": "database is locked"}`, false, false},
		"other refusal":   {403, `{"message": "user is prohibited from signing in"}`, false, false},
		"lacks scope":     {403, `{"message": "token does not have at least one of required scope(s)"}`, false, true},
		"accepted":        {200, `{"login": "bot"}`, false, true},
		"welcome page":    {200, "<html>hello</html>", false, false},
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(c.status)
			_, _ = w.Write([]byte(strings.ReplaceAll(c.body, "TOKEN", strings.TrimPrefix(r.Header.Get("Authorization"), "token "))))
		}))
		i, err := gitea.New(gitea.Config{URL: server.URL, User: bot, Password: give(password), Owner: "o", Scopes: []string{"read:user"}})
		if err != nil {
			t.Fatal(err)
		}
		p, err := i.Probe(t.Context(), "l", []byte(`{"id": 7, "token": "0123456789abcdef"}`))
		if (err == nil) != c.proof || errors.Is(err, creds.ErrStillValid) != c.alive {
			t.Errorf("%s: got %+v and %v, proof: %v, alive: %v", name, p, err, c.proof, c.alive)
		}
		if strings.Contains(p.Refusal, "0123456789abcdef") {
			t.Errorf("%s: the token is in %+v", name, p)
		}
		i.Close()
		server.Close()
	}
}

// TestWiderThanAsked: a server that gives more than it was asked for is not
// believed, and its token is deleted at once.
func TestWiderThanAsked(t *testing.T) {
	t.Parallel()
	for given, wider := range map[string]bool{
		`["read:user"]`: false, `["all"]`: true, `["write:user"]`: true, `["read:user", "write:package"]`: true, `[]`: true,
	} {
		deleted := false
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch r.Method + " " + r.URL.Path {
			case "POST /api/v1/users/bot/tokens":
				w.WriteHeader(http.StatusCreated)
				_, _ = w.Write([]byte(`{"id": 7, "sha1": "0123456789abcdef", "scopes": ` + given + `}`))
			case "GET /api/v1/users/bot/tokens":
				_, _ = w.Write([]byte(`[]`))
			case "DELETE /api/v1/users/bot/tokens/mayfly.o.l":
				deleted = true
				w.WriteHeader(http.StatusNoContent)
			case "GET /api/v1/user":
				_, _ = w.Write([]byte(`{}`))
			default:
				t.Errorf("request %s %s", r.Method, r.URL)
			}
		}))
		i, err := gitea.New(gitea.Config{URL: server.URL, User: bot, Password: give(password), Owner: "o", Scopes: []string{"read:user"}})
		if err != nil {
			t.Fatal(err)
		}
		l, err := i.Issue(t.Context(), "l", grant(`{"scopes": ["read:user"]}`))
		if (err != nil) != wider || deleted != wider || wider && (len(l.Values) > 0 || l.Handle == nil) {
			t.Errorf("given %s: got %v, deleted %v, wider: %v", given, err, deleted, wider)
		}
		i.Close()
		server.Close()
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	good := gitea.Config{URL: "https://forge.example.com", User: bot, Password: give(password), Owner: "o", Scopes: []string{"read:user"}}
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	for want, change := range map[string]func(*gitea.Config){
		`url ""`:           func(c *gitea.Config) { c.URL = "" },
		"in the clear":     func(c *gitea.Config) { c.URL = "http://forge.example.com" },
		"job_url":          func(c *gitea.Config) { c.JobURL = "forge" },
		"ca_file":          func(c *gitea.Config) { c.URL, c.CAFile = "http://127.0.0.1:1", "ca.pem" },
		`user "a/b"`:       func(c *gitea.Config) { c.User = "a/b" },
		"password_file":    func(c *gitea.Config) { c.Password = nil },
		"scopes: missing":  func(c *gitea.Config) { c.Scopes = nil },
		`scopes: "all"`:    func(c *gitea.Config) { c.Scopes = []string{"all"} },
		`"write:user": no`: func(c *gitea.Config) { c.Scopes = []string{"write:user"} },
		`"write:x": want`:  func(c *gitea.Config) { c.Scopes = []string{"write:x"} },
		"owner":            func(c *gitea.Config) { c.Owner = "a.b" },
	} {
		c := good
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
}
