package postgres_test

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/credstest"
	"github.com/mayfly-ci/mayfly/creds/postgres"
)

// A life is what the agent that is killed needs.
type life struct {
	Config   postgres.Config
	Password string
}

func TestMain(m *testing.M) {
	credstest.Main(m, func(l life, trace func(string)) (creds.Issuer, creds.Grant, error) {
		l.Config.Password, l.Config.Owner, l.Config.Trace = creds.NewSecret(l.Password), owner, trace
		i, err := postgres.New(l.Config)
		return busy{i}, grant(goodScope), err
	})
}

// busy is an issuer with a job that leaves tables behind, and an agent that wants
// the proof.
type busy struct{ *postgres.Issuer }

func (b busy) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	lease, err := b.Issuer.Issue(ctx, name, g)
	if err != nil {
		return lease, err
	}
	for _, database := range []string{"app", "other"} {
		conn, err := pgx.Connect(ctx, strings.Replace(lease.Values["url"].Reveal(), "/app?", "/"+database+"?", 1))
		if err != nil {
			return lease, err
		}
		if _, err := conn.Exec(ctx, "CREATE TABLE left_behind (a int)"); err != nil {
			return lease, err
		}
	}
	return lease, nil
}

func (b busy) Revoke(ctx context.Context, name string, handle []byte) error {
	if err := b.Issuer.Revoke(ctx, name, handle); err != nil {
		return err
	}
	_, err := b.Probe(ctx, name, handle)
	return err
}

// testKilledAtEveryPoint: the next life knows the name and nothing else.
func testKilledAtEveryPoint(t *testing.T, w *world) {
	w.run("other", "GRANT CREATE ON SCHEMA public TO PUBLIC")
	credstest.KilledAtEveryPoint(t, life{w.config(), w.Password()}, 9, func(point, name string, _ []byte) {
		if err := w.issuer.Revoke(t.Context(), name, nil); err != nil {
			t.Errorf("killed at %s: Revoke: %v", point, err)
		}
		p, err := w.issuer.Probe(t.Context(), name, nil)
		if err != nil || !strings.Contains(p.How, "no login tried") || !strings.Contains(p.Refusal, "no such role") {
			t.Errorf("killed at %s: Probe: got %+v and %v, want a proof that says what it rests on", point, p, err)
		}
		for _, database := range []string{"app", "other"} {
			if got := w.ask(database, "SELECT count(*)::text FROM pg_class WHERE relname = 'left_behind'"); got != "0" {
				t.Errorf("killed at %s: table left in %s", point, database)
			}
		}
		infos, err := w.issuer.List(t.Context())
		if err != nil || slices.ContainsFunc(infos, func(i creds.Info) bool { return i.Name == name }) {
			t.Errorf("killed at %s: List: got %+v and %v, want %s not in it", point, infos, err, name)
		}
	})
}
