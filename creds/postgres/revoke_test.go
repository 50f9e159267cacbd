package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/postgres"
	"github.com/mayfly-ci/mayfly/test/servertest"
)

// testOwnedObjects: a job leaves all kinds of things in two databases.
func testOwnedObjects(t *testing.T, w *world) {
	w.run("postgres", "GRANT CREATE ON DATABASE other TO PUBLIC")
	w.run("other", "GRANT CREATE ON SCHEMA public TO PUBLIC")
	l := w.issue("job-1", goodScope)
	role := l.Facts["username"]
	w.as(l, "app",
		"CREATE TABLE shop.a (id serial PRIMARY KEY, item int)", "CREATE TABLE shop.b (a int REFERENCES shop.a)",
		"CREATE VIEW shop.v AS SELECT a.id, name FROM shop.a JOIN shop.items ON item = items.id", "CREATE MATERIALIZED VIEW shop.m AS SELECT * FROM shop.v",
		"CREATE TYPE shop.mood AS ENUM ('good')", "CREATE DOMAIN shop.d AS int", "CREATE TABLE shop.c (m shop.mood, d shop.d)",
		"CREATE FUNCTION shop.f() RETURNS int LANGUAGE sql SECURITY DEFINER AS 'SELECT 1'", "CREATE INDEX ON shop.c (d)",
		"CREATE SCHEMA mine", "CREATE TABLE mine.t (a int DEFAULT shop.f())", "SELECT lo_create(0)",
		"ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO PUBLIC", "CREATE TEMPORARY TABLE tmp (a int)",
		"ALTER ROLE CURRENT_USER SET work_mem = '1MB'", "INSERT INTO shop.items (name) VALUES ('by the job')")
	w.as(l, "other", "CREATE TABLE public.far (a int)", "CREATE SCHEMA far", "CREATE TABLE far.t (a int)")
	w.wantDead("job-1", l)
	for _, database := range []string{"app", "other"} {
		if got := w.ask(database, "SELECT string_agg(relname, ' ') FROM pg_class WHERE relname IN ('a', 'b', 'v', 'm', 'c', 't', 'far', 'tmp')"); got != "" {
			t.Errorf("left in %s: %s", database, got)
		}
	}
	if got := w.ask("app", "SELECT count(DISTINCT name)::text FROM shop.items WHERE name IN ('kept', 'by the job')"); got != "2" {
		t.Errorf("%s of 2 rows are there, want both kept: data written under a grant is not the job's", got)
	}
	if got := w.ask("app", "SELECT relacl::text FROM pg_class WHERE oid = 'shop.items'::regclass"); strings.Contains(got, role) {
		t.Errorf("privileges left on shop.items: %s", got)
	}
}

// TestManyObjects needs more locks than the server has for one transaction.
func TestManyObjects(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "max_locks_per_transaction=10", "max_connections=20", "max_prepared_transactions=0")
	l := w.issue("many", goodScope)
	conn := w.as(l, "app")
	for n := range 30 { // several times what fits in the lock table
		_, err := conn.Exec(t.Context(), fmt.Sprintf(`DO $$ BEGIN FOR i IN 1..10 LOOP
			EXECUTE format('CREATE TABLE shop.t%d_%%s (a serial PRIMARY KEY, b text)', i); END LOOP; END $$`, n))
		if err != nil {
			t.Fatal(err)
		}
	}
	w.as(l, "app", "CREATE VIEW shop.top AS SELECT a FROM shop.t0_1", "CREATE VIEW shop.topmost AS SELECT a FROM shop.top")
	w.wantDead("many", l)
	if got := w.ask("app", "SELECT count(*)::text FROM pg_class WHERE relname LIKE 't%\\_%' AND relnamespace = 'shop'::regnamespace"); got != "0" {
		t.Errorf("%s tables left", got)
	}
}

// testDependents: others built on what the job made.
func testDependents(t *testing.T, w *world) {
	build := func(name string) creds.Lease {
		l := w.issue(name, goodScope)
		w.as(l, "app", "CREATE TABLE shop.base (a int)", "GRANT SELECT ON shop.base TO keeper")
		w.run("app", "CREATE VIEW keep.v AS SELECT * FROM shop.base", "ALTER VIEW keep.v OWNER TO keeper")
		return l
	}
	l := build("dep-1")
	err := w.issuer.Revoke(t.Context(), "dep-1", l.Handle)
	if err == nil || !strings.Contains(err.Error(), "view keep.v") || !strings.Contains(err.Error(), "drop_dependents") {
		t.Errorf("Revoke: got %v, want an error that names view keep.v and the way out", err)
	}
	if got := w.ask("app", "SELECT count(*)::text FROM keep.v"); got != "0" {
		t.Errorf("view of somebody else: got %q, want it usable", got)
	}
	// What stays is a name without a key.
	if p, err := w.issuer.Probe(t.Context(), "dep-1", l.Handle); err != nil || !strings.Contains(p.Refusal, "may not log in") {
		t.Errorf("Probe: got %+v and %v, want a proof that the role may not log in", p, err)
	}
	w.run("app", "DROP VIEW keep.v")
	w.wantDead("dep-1", l)

	c := w.config()
	c.DropDependents = true
	w.issuer = w.newIssuer(c)
	l = build("dep-2")
	w.wantDead("dep-2", l)
	if got := w.ask("app", "SELECT count(*)::text FROM pg_class WHERE relname = 'v'"); got != "0" {
		t.Errorf("view over the job's table is still there, want it dropped with drop_dependents")
	}
}

// testPreparedTransactions are what no session ends.
func testPreparedTransactions(t *testing.T, w *world) {
	w.run("other", "GRANT CREATE ON SCHEMA public TO PUBLIC")
	l := w.issue("two-phase", goodScope)
	for _, database := range []string{"app", "other"} {
		w.as(l, database, "BEGIN", "CREATE TABLE public_"+database+" (a int)", `PREPARE TRANSACTION 'it''s \ `+database+`'`)
	}
	w.wantDead("two-phase", l)
	if got := w.ask("app", "SELECT count(*)::text FROM pg_prepared_xacts"); got != "0" {
		t.Errorf("%s prepared transactions left", got)
	}
}

// testLockedByOthers: the table of the job is in use by somebody else.
func testLockedByOthers(t *testing.T, w *world) {
	l := w.issue("locked", goodScope)
	w.as(l, "app", "CREATE TABLE shop.base (a int)")
	reader := w.connect(w.dsn("app"))
	for _, s := range []string{"BEGIN", "LOCK TABLE shop.base IN ACCESS SHARE MODE"} {
		if _, err := reader.Exec(t.Context(), s); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	start := time.Now()
	if err := w.issuer.Revoke(ctx, "locked", nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Revoke: got %v, want it to try until its context ends", err)
	}
	if d := time.Since(start); d > time.Minute {
		t.Errorf("Revoke came back after %v, want it when its context ends", d)
	}
	if _, err := reader.Exec(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	w.wantDead("locked", l)
}

// testForeignRoles: the name alone must not let us drop somebody else's role.
func testForeignRoles(t *testing.T, w *world) {
	other := w.config()
	other.Owner = "inst-2"
	theirs := w.newIssuer(other)
	if _, err := theirs.Issue(t.Context(), "theirs", grant("")); err != nil {
		t.Fatal(err)
	}
	w.run("postgres", "CREATE ROLE mayfly_plain LOGIN", "CREATE ROLE mayfly_talk", "COMMENT ON ROLE mayfly_talk IS 'of inst-1'",
		"CREATE ROLE mayfly_copy", `COMMENT ON ROLE mayfly_copy IS '{"owner": "inst-1", "name": "another"}'`)
	w.issue("ours", "")
	for _, name := range []string{"theirs", "plain", "talk", "copy"} {
		if err := w.issuer.Revoke(t.Context(), name, nil); err == nil || !strings.Contains(err.Error(), "by hand") {
			t.Errorf("Revoke of %s: got %v, want it refused", name, err)
		}
		if got := w.ask("postgres", "SELECT count(*)::text FROM pg_roles WHERE rolname = $1", "mayfly_"+name); got != "1" {
			t.Errorf("role of %s is gone", name)
		}
	}
	if p, err := w.issuer.Probe(t.Context(), "plain", nil); !errors.Is(err, creds.ErrStillValid) {
		t.Errorf("Probe of a role that may log in: got %+v and %v, want ErrStillValid", p, err)
	}
	infos, err := w.issuer.List(t.Context())
	listed := map[string]bool{}
	for _, info := range infos {
		listed[info.Name] = true
	}
	if err != nil || !listed["ours"] || listed["theirs"] || listed["plain"] || listed["talk"] || listed["copy"] {
		t.Errorf("List: got %+v and %v, want ours and nothing of others", infos, err)
	}
}

// testServerGoesAway at every point of a revocation, and comes back.
func testServerGoesAway(t *testing.T, w *world) {
	points := 0
	for n := 0; n <= points; n++ {
		name := "away-" + string(rune('a'+n))
		l := w.issue(name, goodScope)
		w.as(l, "app", "CREATE TABLE shop.base (a int)")
		seen := 0
		c := w.config()
		c.Trace = func(string) {
			if seen++; seen == n {
				if err := w.Kill(t.Context()); err != nil {
					t.Error(err)
				}
			}
		}
		i := w.newIssuer(c)
		err := i.Revoke(t.Context(), name, nil)
		if n == 0 {
			if points = seen; points < 5 || err != nil {
				t.Fatalf("Revoke passed %d points and said %v, want several and nil", points, err)
			}
			continue
		}
		if err == nil && n < points {
			t.Errorf("Revoke while the server died at point %d: got nil, want an error", n)
		}
		if p, err := i.Probe(t.Context(), name, l.Handle); err == nil || errors.Is(err, creds.ErrStillValid) {
			t.Errorf("Probe while the server is down: got %+v and %v, want neither proof nor ErrStillValid", p, err)
		}
		if err := w.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.wantDead(name, l)
	}
}

// testLogsInMeanwhile: a job that never stops to connect does not survive.
func testLogsInMeanwhile(t *testing.T, w *world) {
	for _, name := range []string{"busy-1", "busy-2", "busy-3"} {
		l := w.issue(name, goodScope)
		var wg sync.WaitGroup
		stop := make(chan struct{})
		for range 3 {
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
					}
					conn, err := pgx.Connect(t.Context(), l.Values["url"].Reveal())
					if err == nil {
						t.Cleanup(func() { _ = conn.Close(context.Background()) })
					}
				}
			})
		}
		eventually(t, "the job is connected", func() bool {
			return w.ask("app", "SELECT count(*)::text FROM pg_stat_activity WHERE usename = $1", l.Facts["username"]) != "0"
		})
		w.wantDead(name, l)
		close(stop)
		wg.Wait()
		if got := w.ask("app", `SELECT count(*)::text FROM pg_stat_activity WHERE backend_type = 'client backend' AND usesysid NOT IN (SELECT oid FROM pg_roles)`); got != "0" {
			t.Errorf("%s sessions of a role that is gone", got)
		}
	}
}

// testIssueOvertaken freezes the session of an Issue that is under way. Its
// agent gives up and revokes, and then the server executes what it received
// before. At the second point that is the commit.
func testIssueOvertaken(t *testing.T, w *world) {
	for _, point := range []string{"postgres.issue.begun", "postgres.issue.created"} {
		name := strings.ReplaceAll(point, ".", "-")
		pid := 0
		ctx, cancel := context.WithCancel(t.Context())
		c := w.config()
		c.Trace = func(p string) {
			if p != point {
				return
			}
			var err error
			pid, err = strconv.Atoi(w.ask("app", "SELECT pid::text FROM pg_stat_activity WHERE application_name = $1", "mayfly_"+name))
			if err = errors.Join(err, servertest.Freeze(pid)); err != nil {
				t.Error(err)
			}
			time.AfterFunc(300*time.Millisecond, cancel) // it waits for the answer by then
		}
		i := w.newIssuer(c)
		if _, err := i.Issue(ctx, name, grant(goodScope)); err == nil {
			t.Errorf("Issue on a frozen session: got nil, want an error")
		}
		cancel()
		revoked := make(chan error, 1)
		go func() { revoked <- w.issuer.Revoke(t.Context(), name, nil) }()
		select {
		case err := <-revoked:
			t.Errorf("Revoke: got %v while the session of the Issue is there, want it to wait", err)
			revoked <- err
		case <-time.After(200 * time.Millisecond):
		}
		if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
			t.Fatal(err)
		}
		if err := <-revoked; err != nil {
			t.Errorf("Revoke: %v", err)
		}
		eventually(t, "the session of the Issue has ended", func() bool {
			return w.ask("app", "SELECT count(*)::text FROM pg_stat_activity WHERE application_name = $1", "mayfly_"+name) == "0"
		})
		if got := w.ask("app", "SELECT count(*)::text FROM pg_roles WHERE rolname = $1", "mayfly_"+name); got != "0" {
			t.Errorf("role of an Issue overtaken at %s lives after its revocation", point)
		}
	}
}

// testRevokeBesideRevoke: the journal and the reaper may both be at it.
func testRevokeBesideRevoke(t *testing.T, w *world) {
	l := w.issue("twice", goodScope)
	w.as(l, "app", "CREATE TABLE shop.base (a int)")
	issuers := []*postgres.Issuer{w.issuer, w.newIssuer(w.config()), w.newIssuer(w.config())}
	var wg sync.WaitGroup
	for _, i := range issuers {
		wg.Go(func() {
			if err := i.Revoke(t.Context(), "twice", nil); err != nil {
				t.Errorf("Revoke beside others: %v", err)
			}
		})
	}
	wg.Wait()
	w.wantDead("twice", l)
}
