package postgres_test

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/credstest"
)

func testConformance(t *testing.T, w *world) {
	credstest.Run(t, func(*testing.T) credstest.Harness { return w.harness().suite() })
}

// testConformanceWithoutSuperuser: the least that the administrator can be.
func testConformanceWithoutSuperuser(t *testing.T, w *world) {
	w.run("postgres", "CREATE ROLE deputy LOGIN CREATEROLE PASSWORD 'd3puty-password'", "GRANT pg_signal_backend TO deputy", "GRANT ALL ON DATABASE app TO deputy WITH GRANT OPTION")
	w.run("app", "ALTER SCHEMA shop OWNER TO deputy", "ALTER TABLE shop.items OWNER TO deputy")
	c := w.config()
	c.User, c.Password = "deputy", creds.NewSecret("d3puty-password")
	w.issuer = w.newIssuer(c)
	credstest.Run(t, func(*testing.T) credstest.Harness { return w.harness().suite() })
}

// A harness uses leases of a world.
type harness struct{ *world }

func (h harness) suite() credstest.Harness {
	bad := []json.RawMessage{}
	for _, scope := range refusedScopes() {
		bad = append(bad, json.RawMessage(scope))
	}
	return credstest.Harness{
		Issuer: h.issuer, Owner: owner, Scope: json.RawMessage(goodScope), BadScopes: bad,
		Use: h.use, Hold: h.hold,
		Down: h.Stop, Up: func(ctx context.Context) error { return h.Restart(ctx) },
		Freeze: func(context.Context) error { return h.Pause() }, Thaw: func(context.Context) error { return h.Resume() },
	}
}

// use logs in and does what the scope allows.
func (h harness) use(ctx context.Context, l creds.Lease) error {
	conn, err := pgx.Connect(ctx, l.Values["url"].Reveal())
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(ctx) }()
	_, err = conn.Exec(ctx, "INSERT INTO items (name) VALUES ($1)", l.Facts["username"])
	return err
}

// hold leaves a transaction open in one session and a query running in it.
func (h harness) hold(ctx context.Context, l creds.Lease) (<-chan error, error) {
	conn, err := pgx.Connect(ctx, l.Values["url"].Reveal())
	if err != nil {
		return nil, err
	}
	if _, err := conn.Exec(ctx, "BEGIN"); err != nil {
		return nil, err
	}
	if _, err := conn.Exec(ctx, "INSERT INTO items (name) VALUES ('half done')"); err != nil {
		return nil, err
	}
	ended := make(chan error, 1)
	go func() { // ends with the session, which the suite waits for
		_, err := conn.Exec(ctx, "SELECT pg_sleep(600)")
		ended <- err
		_ = conn.Close(ctx)
	}()
	eventually(h.t, "the query runs", func() bool {
		return h.ask("app", "SELECT count(*)::text FROM pg_stat_activity WHERE usename = $1 AND query LIKE '%pg_sleep%' AND state = 'active'", l.Facts["username"]) == "1"
	})
	return ended, nil
}

// refusedScopes ask for what cannot be given, some of them with malice.
func refusedScopes() []string {
	table := func(name string) string {
		quoted, err := json.Marshal(name)
		if err != nil {
			return err.Error()
		}
		return fmt.Sprintf(`{"database": "app", "schemas": [{"name": "shop", "tables": [{"names": [%s], "privileges": ["select"]}]}]}`, quoted)
	}
	return []string{
		`{"database": "nosuch"}`,
		`{"database": "app\"; DROP DATABASE other; --"}`,
		`{"database": "app\u0000x"}`,
		`{"database": "app", "privileges": ["all"]}`,
		`{"database": "app", "privileges": ["connect ON DATABASE other TO public; --"]}`,
		`{"database": "app", "connections": -1}`,
		`{"database": "app", "connections": 100000}`,
		`{"database": "app", "roles": ["postgres"]}`,
		`{"database": "app", "roles": ["pg_read_all_data"]}`,
		`{"database": "app", "roles": ["nosuch"]}`,
		`{"database": "app", "search_path": [""]}`,
		`{"database": "app", "superuser": true}`,
		`{"database": "app"} {}`,
		`{"database": "app", "schemas": [{"name": "nosuch"}]}`,
		`{"database": "app", "schemas": [{"name": "shop", "tables": [{"names": ["items"], "privileges": ["trigger"]}]}]}`,
		`{"database": "app", "schemas": [{"name": "shop", "tables": [{"names": ["items"], "privileges": ["select, insert"]}]}]}`,
		`{"database": "app", "schemas": [{"name": "shop", "tables": [{"names": ["items"]}]}]}`,
		`{"database": "app", "schemas": [{"name": "shop", "tables": [{"names": ["*", "items"], "privileges": ["select"]}]}]}`,
		table(`items" TO public; DROP TABLE shop.items; --`),
		table(`items; DROP TABLE shop.items`),
		table(`nosuch`),
		table(""),
		table(string(make([]byte, 64))),
		`[]`,
	}
}

// BenchmarkIssuer measures each method on a warm connection.
func BenchmarkIssuer(b *testing.B) {
	w := newWorld(b)
	var issue, revoke, probe []time.Duration
	timed := func(into *[]time.Duration, do func() error) {
		start := time.Now()
		if err := do(); err != nil {
			b.Fatal(err)
		}
		*into = append(*into, time.Since(start))
	}
	for n := range b.N {
		name := fmt.Sprintf("bench-%d", n)
		var l creds.Lease
		timed(&issue, func() (err error) { l, err = w.issuer.Issue(b.Context(), name, grant(goodScope)); return err })
		w.as(l, "app", "CREATE TABLE work (a int)", "INSERT INTO items (name) VALUES ('x')")
		timed(&revoke, func() error { return w.issuer.Revoke(b.Context(), name, l.Handle) })
		timed(&probe, func() error { _, err := w.issuer.Probe(b.Context(), name, l.Handle); return err })
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(median(issue), "ms/issue")
	b.ReportMetric(median(revoke), "ms/revoke")
	b.ReportMetric(median(probe), "ms/probe")
}

// TestOneServer runs, one after the other, all that can share a server.
func TestOneServer(t *testing.T) {
	w := newWorld(t, "log_statement=all", "log_min_duration_statement=0", "log_error_verbosity=verbose")
	for _, test := range []struct {
		name string
		run  func(*testing.T, *world)
	}{
		{"Role", testRole},
		{"EmptyScope", testEmptyScope},
		{"Names", testNames},
		{"HostileIdentifiers", testHostileIdentifiers},
		{"Membership", testMembership},
		{"PartialGrant", testPartialGrant},
		{"Expiry", testExpiry},
		{"ClockSkew", testClockSkew},
		{"PasswordIsNotPrinted", testPasswordIsNotPrinted},
		{"PasswordFile", testPasswordFile},
		{"EnvironmentIsIgnored", testEnvironmentIsIgnored},
		{"OwnedObjects", testOwnedObjects},
		{"Dependents", testDependents},
		{"PreparedTransactions", testPreparedTransactions},
		{"LockedByOthers", testLockedByOthers},
		{"ForeignRoles", testForeignRoles},
		{"LogsInMeanwhile", testLogsInMeanwhile},
		{"RevokeBesideRevoke", testRevokeBesideRevoke},
		{"IssueOvertaken", testIssueOvertaken},
		{"ServerGoesAway", testServerGoesAway},
		{"KilledAtEveryPoint", testKilledAtEveryPoint},
		{"Conformance", testConformance},
		{"ConformanceWithoutSuperuser", testConformanceWithoutSuperuser},
		{"TLS", testTLS},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, &world{w.Server, t, w.issuer}) })
	}
}
