package gitea

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// A handle is what Probe needs, and what Revoke does without.
type handle struct {
	ID    int64  `json:"id"`
	Token string `json:"token"`
}

// Issue implements creds.Issuer. It asks the server for something else first, so
// that one which does not answer is found out before it is told to make a token.
func (i *Issuer) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	l, err := i.issue(ctx, name, g)
	if err != nil {
		return creds.Lease{Handle: l.Handle}, fmt.Errorf("lease %s: %w", name, err)
	}
	return l, nil
}

func (i *Issuer) issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	if err := checkName(name); err != nil {
		return creds.Lease{}, err
	}
	scope, err := i.parseScope(g.Scope)
	if err != nil {
		return creds.Lease{}, err
	}
	expires := g.Expires.UTC().Truncate(time.Second)
	if !expires.After(i.config.Now()) {
		return creds.Lease{}, fmt.Errorf("grant ends at %s, which is over", expires.Format(time.RFC3339))
	}
	if _, err := i.page(ctx, 1); err != nil {
		return creds.Lease{}, err
	}
	return i.make(ctx, name, scope, expires)
}

// make has the server make the token, and uses it once: only then is a later
// refusal a proof.
func (i *Issuer) make(ctx context.Context, name string, scope Scope, expires time.Time) (creds.Lease, error) {
	var made struct {
		ID     int64    `json:"id"`
		Token  string   `json:"sha1"`
		Scopes []string `json:"scopes"`
	}
	status, err := i.asBot(ctx, http.MethodPost, "", map[string]any{
		"name": i.prefix() + name, "scopes": scope.Scopes,
	}, &made)
	if err != nil {
		return creds.Lease{}, err
	}
	if status != http.StatusCreated || made.Token == "" || made.ID <= 0 {
		return creds.Lease{}, fmt.Errorf("token: answer %d has none", status)
	}
	i.config.Trace("gitea.token")
	h, err := json.Marshal(handle{made.ID, made.Token})
	if err != nil {
		return creds.Lease{}, err
	}
	lease := creds.Lease{Handle: h}
	if err := narrow(scope.Scopes, made.Scopes); err != nil {
		return lease, errors.Join(err, i.remove(ctx, name))
	}
	switch refusal, err := i.use(ctx, made.Token); {
	case err != nil && !errors.Is(err, creds.ErrStillValid):
		return lease, err
	case err == nil:
		return lease, fmt.Errorf("the server refuses the token that it has just made: %s", refusal)
	}
	url := i.config.JobURL
	if url == "" {
		url = i.config.URL
	}
	lease.Values = map[string]creds.Secret{"token": creds.NewSecret(made.Token)}
	lease.Facts = map[string]string{"username": i.config.User, "url": url, "token_id": strconv.FormatInt(made.ID, 10)}
	lease.ByName, lease.ExpiresAt = true, expires
	return lease, nil
}

// narrow wants no more than was asked for in what the server gave.
func narrow(asked, given []string) error {
	for _, scope := range given {
		if !covers(asked, scope) {
			return fmt.Errorf("the server gave the scope %q, which was not asked for", scope)
		}
	}
	if slices.Contains(asked, publicOnly) && !slices.Contains(given, publicOnly) {
		return errors.New("the server gave a token that is not for the public only")
	}
	if len(given) == 0 {
		return errors.New("the server does not say which scopes it gave: it is older than Gitea 1.20")
	}
	return nil
}
