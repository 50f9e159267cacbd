package oidc_test

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/credstest"
	"github.com/mayfly-ci/mayfly/creds/oidc"
)

var (
	_ creds.Issuer       = (*oidc.Leases)(nil)
	_ creds.Asker        = (*oidc.Leases)(nil)
	_ creds.ScopeChecker = (*oidc.Leases)(nil)
)

func TestLeasesConformance(t *testing.T) {
	t.Parallel()
	i, err := oidc.New(oidc.Config{URL: issuer, Owner: "inst-1", Store: &store{}})
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]string{} // of request tokens
	leases := &named{Leases: oidc.NewLeases(i), names: names}
	credstest.Run(t, func(*testing.T) credstest.Harness {
		return credstest.Harness{
			Issuer: leases, Owner: "inst-1", Inside: true,
			Scope: json.RawMessage(`{"audiences": ["vault", "sts"]}`),
			BadScopes: []json.RawMessage{
				nil, json.RawMessage(`{}`), json.RawMessage(`{"audiences": []}`), json.RawMessage(`{"audiences": [""]}`),
				json.RawMessage(`{"audiences": ["a b"]}`), json.RawMessage(`{"audiences": ["a", "a"]}`), json.RawMessage(`{"audiences": ["a"]} {}`),
				json.RawMessage(`{"audiences": ["a"], "step": "x"}`), json.RawMessage(`[]`),
			},
			Use: func(ctx context.Context, l creds.Lease) error {
				_, err := leases.Ask(ctx, leases.nameOf(l), "vault")
				return err
			},
		}
	})
}

// grantFor is one of a job, for some audiences.
func grantFor(expires time.Time, audiences string) creds.Grant {
	return creds.Grant{Subject: subject(), Scope: json.RawMessage(`{"audiences": ` + audiences + `}`), Expires: expires}
}

// TestAsk: each token is for one audience of the lease and for one request, is
// about the lease's job, and is given as long as the lease lasts.
func TestAsk(t *testing.T) {
	t.Parallel()
	i, clock := newIssuer(t, nil)
	leases := oidc.NewLeases(i)
	ctx := t.Context()
	if _, err := leases.Issue(ctx, "l-1", grantFor(clock.now.Add(time.Hour), `["vault", "sts"]`)); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, audience := range []string{"vault", "vault", "sts"} {
		a, err := leases.Ask(ctx, "l-1", audience)
		if err != nil {
			t.Fatal(err)
		}
		claims, err := verify(oidc.Token{Value: a.Value}, keysOf(t, i), audience, clock.now)
		if err != nil || claims["lease"] != "l-1" || claims["job_id"] != "mf-1" || claims["jti"] != a.ID || seen[a.ID] || a.Audience != audience {
			t.Errorf("%s: got %v, %v", audience, claims, err)
		}
		if seen[a.ID] = true; a.ExpiresAt.After(clock.now.Add(time.Minute)) {
			t.Errorf("%s: lives until %v", audience, a.ExpiresAt)
		}
	}
	for _, audience := range []string{"", "other", "vault ", "VAULT"} {
		if a, err := leases.Ask(ctx, "l-1", audience); !errors.Is(err, creds.ErrBadScope) || !a.Value.IsZero() {
			t.Errorf("audience %q: got %v, want ErrBadScope", audience, err)
		}
	}
	if _, err := leases.Ask(ctx, "l-2", "vault"); err == nil {
		t.Error("another lease has a token")
	}
	if _, err := leases.Issue(ctx, "one", grantFor(clock.now.Add(time.Hour), `["vault"]`)); err != nil {
		t.Fatal(err)
	}
	if a, err := leases.Ask(ctx, "one", ""); err != nil || a.Audience != "vault" {
		t.Errorf("no audience where there is one: got %v, %v", a.Audience, err)
	}
	clock.now = clock.now.Add(time.Hour)
	if _, err := leases.Ask(ctx, "l-1", "vault"); err == nil {
		t.Error("a token at the lease's end")
	}
}

// TestAskTooOften: what a job asks for has an end.
func TestAskTooOften(t *testing.T) {
	t.Parallel()
	i, clock := newIssuer(t, nil)
	leases := oidc.NewLeases(i)
	if _, err := leases.Issue(t.Context(), "l", grantFor(clock.now.Add(time.Hour), `["a"]`)); err != nil {
		t.Fatal(err)
	}
	n := 0
	for ; n < 1000; n++ {
		if _, err := leases.Ask(t.Context(), "l", "a"); err != nil {
			if !strings.Contains(err.Error(), "no more") {
				t.Fatal(err)
			}
			break
		}
	}
	if n != 100 {
		t.Errorf("%d tokens were given, want 100", n)
	}
}

// TestNoJobNoLease: nobody asks as the agent itself.
func TestNoJobNoLease(t *testing.T) {
	t.Parallel()
	i, clock := newIssuer(t, nil)
	g := grantFor(clock.now.Add(time.Hour), `["a"]`)
	g.Subject = creds.Subject{}
	if _, err := oidc.NewLeases(i).Issue(t.Context(), "l", g); err == nil {
		t.Error("a lease without a job")
	}
}
