package githubapp_test

import (
	"errors"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/credstest"
	"github.com/mayfly-ci/mayfly/creds/githubapp"
)

// A life is what the agent that is killed needs.
type life struct{ Address, Key string }

func TestMain(m *testing.M) {
	credstest.Main(m, func(l life, trace func(string)) (creds.Issuer, creds.Grant, error) {
		i, err := githubapp.New(githubapp.Config{
			Address: l.Address, App: clientID, Installation: installation, Trace: trace,
			Key: func() (creds.Secret, error) { return creds.NewSecret(l.Key), nil },
		})
		return i, grant(oneScope), err
	})
}

// TestKilledAtEveryPoint: what is in the journal is revoked; what is not is in
// nobody's hands and ends by itself, which is said.
func TestKilledAtEveryPoint(t *testing.T) {
	t.Parallel()
	f := newFake(t)
	i := newIssuer(t, f.config())
	credstest.KilledAtEveryPoint(t, life{f.URL, f.pem()}, 2, func(point, name string, handle []byte) {
		if (handle == nil) != (point == "githubapp.token") {
			t.Fatalf("killed at %s: journal: %q", point, handle)
		}
		err := i.Revoke(t.Context(), name, handle)
		if handle == nil {
			if !errors.Is(err, creds.ErrNotRevocable) {
				t.Errorf("killed at %s: Revoke: got %v, want ErrNotRevocable", point, err)
			}
			f.set(func() { clear(f.tokens) }) // it ends by itself
			return
		}
		if err != nil {
			t.Errorf("killed at %s: Revoke: %v", point, err)
		}
		if _, err := i.Probe(t.Context(), name, handle); err != nil || f.live() != 0 {
			t.Errorf("killed at %s: Probe: %v, %d tokens live", point, err, f.live())
		}
	})
}
