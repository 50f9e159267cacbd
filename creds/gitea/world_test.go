package gitea_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/gitea"
	"github.com/mayfly-ci/mayfly/test/giteatest"
)

const (
	owner     = "inst-1"
	bot       = "bot"
	password  = "Bot-pass-1"
	readScope = `{"scopes": ["read:repository", "read:user"]}`
)

// A world is a Gitea with a bot.
type world struct {
	*giteatest.Server
	t      testing.TB
	issuer *gitea.Issuer
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{Server: giteatest.Start(t, giteatest.Config{}), t: t}
	if err := w.NewUser(t.Context(), bot, password); err != nil {
		t.Fatal(err)
	}
	w.issuer = w.newIssuer(w.config())
	return w
}

// give is how the agent gets a secret.
func give(secret string) func() (creds.Secret, error) {
	return func() (creds.Secret, error) { return creds.NewSecret(secret), nil }
}

func (w *world) config() gitea.Config {
	return gitea.Config{
		URL: w.URL(), User: bot, Password: give(password), Owner: owner,
		Scopes: []string{"write:repository", "read:user", "write:package"},
	}
}

func (w *world) newIssuer(c gitea.Config) *gitea.Issuer {
	w.t.Helper()
	i, err := gitea.New(c)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(i.Close)
	return i
}

func grant(scope string) creds.Grant {
	return creds.Grant{
		Subject: creds.Subject{Provider: "local", Repository: "o/r", Ref: "refs/heads/main", Job: "mf-1"},
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

// as makes a request with a token of a job.
func (w *world) as(ctx context.Context, l creds.Lease, method, path string) (int, error) {
	req, err := http.NewRequestWithContext(ctx, method, w.URL()+"/api/v1"+path, nil)
	if err != nil {
		return 0, err
	}
	req.Header.Set("Authorization", "token "+l.Values["token"].Reveal())
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	return res.StatusCode, res.Body.Close()
}

// use is what a job does with its token.
func (w *world) use(ctx context.Context, l creds.Lease) error {
	status, err := w.as(ctx, l, http.MethodGet, "/user/repos")
	if err == nil && status != http.StatusOK {
		err = fmt.Errorf("status %d", status)
	}
	return err
}
