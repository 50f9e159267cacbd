package postgres_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/postgres"
	"github.com/mayfly-ci/mayfly/test/postgrestest"
)

const owner = "inst-1"

// goodScope is what newWorld can give.
const goodScope = `{"database": "app", "privileges": ["temporary", "create"], "connections": 5, "search_path": ["shop", "public"], "schemas": [
	{"name": "shop", "privileges": ["usage", "create"],
	 "tables": [{"names": ["items"], "privileges": ["select", "insert", "update", "delete"]}],
	 "sequences": [{"names": ["*"], "privileges": ["usage"]}]}]}`

// A world is a server with a database "app" and an issuer for it.
type world struct {
	*postgrestest.Server
	t      testing.TB
	issuer *postgres.Issuer
}

func newWorld(t testing.TB, settings ...string) *world {
	t.Helper()
	w := &world{Server: postgrestest.Start(t, settings...), t: t}
	w.run("postgres", "CREATE DATABASE app", "CREATE DATABASE other", "CREATE ROLE keeper", "CREATE ROLE readers", "GRANT ALL ON DATABASE app, other TO keeper")
	w.run("app", "CREATE SCHEMA shop", "CREATE TABLE shop.items (id serial PRIMARY KEY, name text)", "CREATE TABLE shop.secrets (a int)",
		"INSERT INTO shop.items (name) VALUES ('kept')", "CREATE SCHEMA keep AUTHORIZATION keeper", "GRANT ALL ON SCHEMA shop TO keeper")
	w.issuer = w.newIssuer(w.config())
	return w
}

func (w *world) config() postgres.Config {
	return postgres.Config{
		Host: w.Host(), Port: w.Port(), Database: postgrestest.Database, User: postgrestest.User,
		Password: creds.NewSecret(w.Password()), SSLMode: "disable", Owner: owner, AllowedRoles: []string{"readers", "keeper", "chief"},
	}
}

func (w *world) newIssuer(c postgres.Config) *postgres.Issuer {
	w.t.Helper()
	i, err := postgres.New(c)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(i.Close)
	return i
}

func (w *world) harness() harness { return harness{w} }

// dsn is the administrator's.
func (w *world) dsn(database string) string {
	return fmt.Sprintf("postgres://%s:%s@%s:%d/%s?sslmode=disable", postgrestest.User, w.Password(), w.Host(), w.Port(), url.PathEscape(database))
}

// run executes statements as the administrator.
func (w *world) run(database string, statements ...string) {
	w.t.Helper()
	conn := w.connect(w.dsn(database))
	for _, s := range statements {
		if _, err := conn.PgConn().Exec(w.t.Context(), s).ReadAll(); err != nil {
			w.t.Fatalf("%s: %v", s, err)
		}
	}
}

// ask returns the only column of the only row as text.
func (w *world) ask(database, query string, args ...any) string {
	w.t.Helper()
	var got *string
	if err := w.connect(w.dsn(database)).QueryRow(w.t.Context(), query, args...).Scan(&got); err != nil {
		w.t.Fatalf("%s: %v", query, err)
	}
	if got == nil {
		return ""
	}
	return *got
}

// connect opens a connection that closes with the test.
func (w *world) connect(dsn string) *pgx.Conn {
	w.t.Helper()
	conn, err := pgx.Connect(w.t.Context(), dsn)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

// as runs statements with the lease, in one session that stays open.
func (w *world) as(l creds.Lease, database string, statements ...string) *pgx.Conn {
	w.t.Helper()
	dsn := strings.Replace(l.Values["url"].Reveal(), "/"+l.Facts["database"]+"?", "/"+database+"?", 1)
	conn := w.connect(dsn)
	for _, s := range statements {
		if _, err := conn.PgConn().Exec(w.t.Context(), s).ReadAll(); err != nil {
			w.t.Fatalf("job: %s: %v", s, err)
		}
	}
	return conn
}

func grant(scope string) creds.Grant {
	return creds.Grant{
		Subject: creds.Subject{Provider: "local", Repository: "o/r", Job: "mf-1"},
		Scope:   json.RawMessage(scope), Expires: time.Now().Add(10 * time.Minute),
	}
}

func (w *world) issue(name, scope string) creds.Lease {
	w.t.Helper()
	l, err := w.issuer.Issue(w.t.Context(), name, grant(scope))
	if err != nil {
		w.t.Fatalf("Issue: %v", err)
	}
	return l
}

// wantDead revokes by the name alone and wants nothing left but the proof.
func (w *world) wantDead(name string, l creds.Lease) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
	defer cancel()
	if err := w.issuer.Revoke(ctx, name, nil); err != nil {
		w.t.Fatalf("Revoke: %v", err)
	}
	p, err := w.issuer.Probe(w.t.Context(), name, l.Handle)
	if err != nil || !strings.Contains(p.Refusal, "28P01") || !strings.Contains(p.Refusal, "no such role") {
		w.t.Errorf("Probe: got %+v and %v, want a login refused with 28P01 and no such role", p, err)
	}
	if got := w.ask("app", `SELECT count(*)::text FROM pg_shdepend d LEFT JOIN pg_authid a ON a.oid = refobjid
		WHERE refclassid = 'pg_authid'::regclass AND a.oid IS NULL`); got != "0" {
		w.t.Errorf("%s objects depend on a role that is gone, want none", got)
	}
}

// eventually waits until ok.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	bound := time.After(time.Minute)
	for !ok() {
		select {
		case <-tick.C:
		case <-bound:
			t.Fatalf("not within a minute: %s", what)
		}
	}
}

// median is in milliseconds.
func median(d []time.Duration) float64 {
	slices.Sort(d)
	return float64(d[len(d)/2]) / float64(time.Millisecond)
}
