package aws_test

import (
	"errors"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/aws"
	"github.com/mayfly-ci/mayfly/creds/credstest"
	"github.com/mayfly-ci/mayfly/creds/oidc"
)

// A life is what the agent that is killed needs.
type life struct {
	Service, Endpoint, Region, Role, CAFile string
	RevokerKey, RevokerSecret               string
	URL                                     string // of the identity
	Keys                                    []byte
}

func TestMain(m *testing.M) {
	credstest.Main(m, func(l life, trace func(string)) (creds.Issuer, creds.Grant, error) {
		signer, err := oidc.New(oidc.Config{URL: l.URL, Owner: owner, Store: &safe{l.Keys}})
		if err != nil {
			return nil, creds.Grant{}, err
		}
		c := aws.Config{
			Service: l.Service, Endpoint: l.Endpoint, Region: l.Region, Role: l.Role, CAFile: l.CAFile, RevokerKey: l.RevokerKey,
			Sign: (&identity{Issuer: signer}).sign, Trace: trace,
		}
		if l.RevokerKey != "" {
			c.RevokerSecret = func() (creds.Secret, error) { return creds.NewSecret(l.RevokerSecret), nil }
		}
		i, err := aws.New(c)
		return i, grant(mainScope), err
	})
}

// testKilledAtMinIO: what is in the journal is taken back; what is not is in nobody's
// hands and ends by itself, which is said.
func testKilledAtMinIO(t *testing.T, w *world) {
	c := w.config()
	l := life{Service: c.Service, Endpoint: c.Endpoint, Role: c.Role, CAFile: c.CAFile, URL: w.identity.url, Keys: w.identity.keys.b}
	credstest.KilledAtEveryPoint(t, l, 2, func(point, name string, handle []byte) {
		err := w.issuer.Revoke(t.Context(), name, handle)
		if handle == nil {
			if point != "aws.session" || !errors.Is(err, creds.ErrNotRevocable) {
				t.Errorf("killed at %s, no handle: Revoke: got %v, want ErrNotRevocable", point, err)
			}
			return
		}
		if err != nil {
			t.Errorf("killed at %s: Revoke: %v", point, err)
		}
		if _, err := w.issuer.Probe(t.Context(), name, handle); err != nil {
			t.Errorf("killed at %s: Probe: %v", point, err)
		}
	})
}
