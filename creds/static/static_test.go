package static_test

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/credstest"
	"github.com/mayfly-ci/mayfly/creds/static"
)

const secret = "npm_0123456789abcdef"

func sealed(at time.Time) func() (creds.Secret, time.Time, error) {
	return func() (creds.Secret, time.Time, error) { return creds.NewSecret(secret), at, nil }
}

func newIssuer(t *testing.T, c static.Config) *static.Issuer {
	t.Helper()
	c.Owner = "inst-1"
	i, err := static.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func grant() creds.Grant {
	return creds.Grant{Subject: creds.Subject{Provider: "local", Job: "mf-1"}, Expires: time.Now().Add(10 * time.Minute)}
}

// TestConformance: a service with one token for ever, which is used as it would
// be. Nothing of the suite that is about an end applies.
func TestConformance(t *testing.T) {
	t.Parallel()
	service := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer "+secret {
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	defer service.Close()
	nothing := func(context.Context) error { return nil }
	h := credstest.Harness{
		Issuer: newIssuer(t, static.Config{Secret: sealed(time.Now().Add(-50 * time.Hour))}), Owner: "inst-1", Endures: true,
		Scope: json.RawMessage(`{}`), BadScopes: []json.RawMessage{json.RawMessage(`[]`), json.RawMessage(`{} {}`)},
		Use: func(ctx context.Context, l creds.Lease) error {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, service.URL, nil)
			if err != nil {
				return err
			}
			req.Header.Set("Authorization", "Bearer "+l.Values["secret"].Reveal())
			res, err := http.DefaultClient.Do(req)
			if err != nil {
				return err
			}
			if res.StatusCode != http.StatusOK {
				return errors.New(res.Status)
			}
			return res.Body.Close()
		},
		Down: nothing, Up: nothing, Freeze: nothing, Thaw: nothing,
	}
	credstest.Run(t, func(*testing.T) credstest.Harness { return h })
}

// TestSaysWhatItIs: the lease is withheld, and its end is told as it is.
func TestSaysWhatItIs(t *testing.T) {
	t.Parallel()
	i := newIssuer(t, static.Config{Secret: sealed(time.Now().Add(-93*24*time.Hour - time.Minute)), User: "ci"})
	l, err := i.Issue(t.Context(), "l", grant())
	if err != nil {
		t.Fatal(err)
	}
	if !l.Withheld || l.Facts["days"] != "93" || l.Facts["username"] != "ci" || l.Handle != nil {
		t.Errorf("lease: got %+v, want it withheld, of 93 days, and no handle", l)
	}
	err = i.Revoke(t.Context(), "l", nil)
	if !errors.Is(err, creds.ErrNotRevocable) || !strings.Contains(err.Error(), "93 days ago") || !strings.Contains(err.Error(), "never held") {
		t.Errorf("Revoke: got %v", err)
	}
	if days, late, err := i.Age(); days != 93 || !late || err != nil {
		t.Errorf("Age: got %d, %v and %v, want 93 days and late", days, late, err)
	}
	young := newIssuer(t, static.Config{Secret: sealed(time.Now()), Replace: 24 * time.Hour})
	if days, late, err := young.Age(); days != 0 || late || err != nil {
		t.Errorf("Age of today's: got %d, %v and %v", days, late, err)
	}
}

// TestRefuses: a secret that lies in the clear, none, and one that cannot be read.
func TestRefuses(t *testing.T) {
	t.Parallel()
	for want, give := range map[string]func() (creds.Secret, time.Time, error){
		"mayfly seal":    sealed(time.Time{}),
		"sealed nothing": func() (creds.Secret, time.Time, error) { return creds.Secret{}, time.Now(), nil },
		"no such file": func() (creds.Secret, time.Time, error) {
			return creds.Secret{}, time.Time{}, errors.New("no such file")
		},
	} {
		i := newIssuer(t, static.Config{Secret: give})
		if _, err := i.Issue(t.Context(), "l", grant()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
		if err := i.Revoke(t.Context(), "l", nil); !errors.Is(err, creds.ErrNotRevocable) {
			t.Errorf("%s: Revoke: got %v", want, err)
		}
	}
	for want, c := range map[string]static.Config{
		"secret_file": {Owner: "o"},
		"owner":       {Secret: sealed(time.Now())},
		"replace":     {Secret: sealed(time.Now()), Owner: "o", Replace: time.Hour},
		"user":        {Secret: sealed(time.Now()), Owner: "o", User: "a:b"},
	} {
		if _, err := static.New(c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
}
