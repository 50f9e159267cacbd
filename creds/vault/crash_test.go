package vault_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/credstest"
	"github.com/mayfly-ci/mayfly/creds/oidc"
	"github.com/mayfly-ci/mayfly/creds/vault"
)

// A life is what the agent that is killed needs.
type life struct {
	Config vault.Config
	URL    string // of the identity
	Keys   []byte
}

func TestMain(m *testing.M) {
	credstest.Main(m, func(l life, trace func(string)) (creds.Issuer, creds.Grant, error) {
		identity, err := oidc.New(oidc.Config{URL: l.URL, Owner: owner, Store: &safe{l.Keys}})
		if err != nil {
			return nil, creds.Grant{}, err
		}
		l.Config.Owner, l.Config.Sign, l.Config.Trace = owner, (&world{identity: identity}).sign, trace
		i, err := vault.New(l.Config)
		return i, grant(dbScope), err
	})
}

// testKilledAtEveryPoint: the next life knows the name and nothing else.
func testKilledAtEveryPoint(t *testing.T, w *world) {
	credstest.KilledAtEveryPoint(t, life{w.config(), w.url, w.keys.b}, 5, func(point, name string, _ []byte) {
		if err := w.issuer.Revoke(t.Context(), name, nil); err != nil {
			t.Errorf("killed at %s: Revoke: %v", point, err)
		}
		p, err := w.issuer.Probe(t.Context(), name, nil)
		if err != nil || !strings.Contains(p.How, "no login tried") {
			t.Errorf("killed at %s: Probe: got %+v and %v, want a proof that says what it rests on", point, p, err)
		}
		infos, err := w.issuer.List(t.Context())
		if err != nil || slices.ContainsFunc(infos, func(i creds.Info) bool { return i.Name == name }) {
			t.Errorf("killed at %s: List: got %+v and %v, want %s not in it", point, infos, err, name)
		}
		eventually(t, "the role of a lease killed at "+point+" is gone", func() bool {
			return w.try("DO $$ BEGIN IF EXISTS (SELECT FROM pg_roles WHERE rolname LIKE 'v-%') THEN RAISE 'there'; END IF; END $$") == nil
		})
	})
}
