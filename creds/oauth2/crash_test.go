package oauth2_test

import (
	"errors"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/credstest"
	"github.com/mayfly-ci/mayfly/creds/oauth2"
)

func TestMain(m *testing.M) {
	credstest.Main(m, func(url string, trace func(string)) (creds.Issuer, creds.Grant, error) {
		c := config(url)
		c.Trace = trace
		i, err := oauth2.New(c)
		return i, grant(`{"scopes": ["api:read", "brief"]}`), err
	})
}

// testKilledAtEveryPoint: the next life knows the name and nothing else, and claims
// nothing: the token ends when the server said.
func testKilledAtEveryPoint(t *testing.T, w *world) {
	credstest.KilledAtEveryPoint(t, w.URL(), 2, func(point, name string, _ []byte) {
		if err := w.issuer.Revoke(t.Context(), name, nil); !errors.Is(err, creds.ErrNotRevocable) {
			t.Errorf("killed at %s: Revoke: got %v, want ErrNotRevocable", point, err)
		}
		if p, err := w.issuer.Probe(t.Context(), name, nil); err == nil || errors.Is(err, creds.ErrStillValid) {
			t.Errorf("killed at %s: Probe: got %+v and %v, want that nobody can say", point, p, err)
		}
	})
}
