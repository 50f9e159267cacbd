package gitea_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/credstest"
	"github.com/mayfly-ci/mayfly/creds/gitea"
)

func TestMain(m *testing.M) {
	credstest.Main(m, func(url string, trace func(string)) (creds.Issuer, creds.Grant, error) {
		i, err := gitea.New(gitea.Config{
			URL: url, User: bot, Password: give(password), Owner: owner, Scopes: []string{"read:repository", "read:user"}, Trace: trace,
		})
		return i, grant(readScope), err
	})
}

// testKilledAtEveryPoint: the next life knows the name and nothing else.
func testKilledAtEveryPoint(t *testing.T, w *world) {
	credstest.KilledAtEveryPoint(t, w.URL(), 2, func(point, name string, _ []byte) {
		_, err := w.issuer.Probe(t.Context(), name, nil)
		if alive := point == "gitea.token"; errors.Is(err, creds.ErrStillValid) != alive {
			t.Errorf("killed at %s: Probe: got %v, alive: %v", point, err, alive)
		}
		if err := w.issuer.Revoke(t.Context(), name, nil); err != nil {
			t.Errorf("killed at %s: Revoke: %v", point, err)
		}
		p, err := w.issuer.Probe(t.Context(), name, nil)
		if err != nil || !strings.Contains(p.How, "no use tried") {
			t.Errorf("killed at %s: Probe: got %+v and %v, want a proof that says what it rests on", point, p, err)
		}
		infos, err := w.issuer.List(t.Context())
		if err != nil || slices.ContainsFunc(infos, func(i creds.Info) bool { return i.Name == name }) {
			t.Errorf("killed at %s: List: got %+v and %v, want %s not in it", point, infos, err, name)
		}
	})
}
