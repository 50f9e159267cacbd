package githubapp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// maxRepositories fits in one page of the list that is compared.
const maxRepositories = 100

// A handle is what Revoke and Probe need.
type handle struct {
	Token string `json:"token"`
}

// Issue implements creds.Issuer. If it fails after the token was made, the lease has
// its handle and nothing else.
func (i *Issuer) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	if err := checkName(name); err != nil {
		return creds.Lease{}, err
	}
	scope, err := parseScope(g.Scope)
	if err != nil {
		return creds.Lease{}, err
	}
	if left := g.Expires.Sub(i.config.Now()); left < life {
		return creds.Lease{}, fmt.Errorf("lease %s: grant ends in %v, and GitHub's tokens live for %v: give the lease and its job some minutes more than that", name, left.Round(time.Second), life)
	}
	if err := i.take(name); err != nil {
		return creds.Lease{}, err
	}
	lease, err := i.mint(ctx, scope, g.Expires)
	if err != nil {
		return creds.Lease{Handle: lease.Handle}, fmt.Errorf("lease %s: %w", name, err)
	}
	return lease, nil
}

// take keeps a name from being issued twice by one life of the agent; the agent
// gives no name again in another.
func (i *Issuer) take(name string) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.names[name] {
		return fmt.Errorf("lease %s: issued already", name)
	}
	i.names[name] = true
	return nil
}

// An answer is GitHub's to the request for a token, with all permissions that it
// names, whether anybody has heard of them or not.
type answer struct {
	Token        string            `json:"token"`
	ExpiresAt    time.Time         `json:"expires_at"`
	Permissions  map[string]string `json:"permissions"`
	Selection    string            `json:"repository_selection"`
	Repositories []repository      `json:"repositories"`
}

type repository struct {
	ID   int64  `json:"id"`
	Name string `json:"full_name"`
}

func (i *Issuer) mint(ctx context.Context, scope Scope, expires time.Time) (creds.Lease, error) {
	var a answer
	err := i.asApp(ctx, http.MethodPost, fmt.Sprintf("app/installations/%d/access_tokens", i.config.Installation), scope, &a)
	switch {
	case refused(err, http.StatusUnprocessableEntity):
		return creds.Lease{}, fmt.Errorf("%w: the installation has not all of it: %w", creds.ErrBadScope, err)
	case err != nil:
		return creds.Lease{}, err
	case a.Token == "":
		return creds.Lease{}, errors.New("token: none in the answer")
	}
	i.config.Trace("githubapp.token")
	text, err := json.Marshal(handle{a.Token})
	lease := creds.Lease{Handle: text}
	if err == nil {
		err = i.compare(ctx, a, scope, expires)
	}
	if err != nil {
		return lease, errors.Join(err, i.end(ctx, a.Token))
	}
	ids := strings.Trim(strings.Join(strings.Fields(fmt.Sprint(scope.Repositories)), ","), "[]")
	lease.Values = map[string]creds.Secret{"token": creds.NewSecret(a.Token)}
	lease.Facts = map[string]string{"api": i.config.address(), "repository_ids": ids}
	lease.ExpiresAt = a.ExpiresAt.UTC()
	return lease, nil
}

// compare wants the token to have what was asked for and nothing else, and to be
// accepted: only then is a later refusal a proof.
func (i *Issuer) compare(ctx context.Context, a answer, scope Scope, expires time.Time) error {
	if a.ExpiresAt.IsZero() || a.ExpiresAt.After(expires) {
		return fmt.Errorf("token: ends at %s, the grant at %s: give the lease and its job more time than an hour", a.ExpiresAt.UTC().Format(time.RFC3339), expires.UTC().Format(time.RFC3339))
	}
	given := maps.Clone(a.Permissions)
	if given["metadata"] == "read" && scope.Permissions["metadata"] == "" {
		delete(given, "metadata") // every token has it
	}
	if !maps.Equal(given, scope.Permissions) {
		return fmt.Errorf("token: has permissions %v, asked for %v: revoked", given, scope.Permissions)
	}
	if a.Selection != "selected" {
		return fmt.Errorf("token: is for %q repositories, asked for some: revoked", a.Selection)
	}
	reach, err := i.repositories(ctx, a.Token)
	if err != nil {
		return fmt.Errorf("token: what it reaches cannot be seen: %w", err)
	}
	lists := [][]repository{reach}
	if a.Repositories != nil {
		lists = append(lists, a.Repositories)
	}
	for _, list := range lists {
		var ids []int64
		for _, r := range list {
			ids = append(ids, r.ID)
		}
		slices.Sort(ids)
		if !slices.Equal(ids, scope.Repositories) {
			return fmt.Errorf("token: is for the repositories %v, asked for %v: revoked", ids, scope.Repositories)
		}
	}
	return nil
}

// repositories are those that a token reaches. It is also how a token is tried.
func (i *Issuer) repositories(ctx context.Context, token string) ([]repository, error) {
	var a struct {
		Total        *int         `json:"total_count"`
		Repositories []repository `json:"repositories"`
	}
	if err := i.do(ctx, token, http.MethodGet, "installation/repositories?per_page=100", nil, &a); err != nil {
		return nil, err
	}
	if a.Total == nil || *a.Total != len(a.Repositories) {
		return nil, errors.New("GET installation/repositories: the list is not whole")
	}
	return a.Repositories, nil
}
