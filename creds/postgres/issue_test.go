package postgres_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/mayfly-ci/mayfly/creds"
)

// testRole looks at what a lease is on the server.
func testRole(t *testing.T, w *world) {
	g := grant(goodScope)
	g.Subject.Repository, g.Subject.Ref = `ö"';\ 😀 -- `, "refs/heads/\u2028"
	l, err := w.issuer.Issue(t.Context(), "mf-0-l-db", g)
	if err != nil {
		t.Fatal(err)
	}
	role := l.Facts["username"]
	want := map[string]string{"username": "mayfly_mf-0-l-db", "host": "127.0.0.1", "port": fmt.Sprint(w.Port()), "database": "app", "sslmode": "disable"}
	for k, v := range want {
		if l.Facts[k] != v {
			t.Errorf("fact %s: got %q, want %q", k, l.Facts[k], v)
		}
	}
	if !l.ByName || !l.ExpiresAt.Equal(g.Expires.Truncate(time.Microsecond)) {
		t.Errorf("lease: ByName %v until %v, want true until %v", l.ByName, l.ExpiresAt, g.Expires)
	}
	if got := w.ask("app", `SELECT concat_ws(' ', rolcanlogin, rolsuper, rolinherit, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls, rolconnlimit,
		rolvaliduntil BETWEEN now() + '9min' AND now() + '10min') FROM pg_roles WHERE rolname = $1`, role); got != "t f f f f f f 5 t" {
		t.Errorf("attributes of the role: %s", got)
	}
	var comment struct {
		Owner, Name string
		Expires     time.Time
		Subject     creds.Subject
	}
	text := w.ask("app", "SELECT shobj_description(oid, 'pg_authid') FROM pg_roles WHERE rolname = $1", role)
	if err := json.Unmarshal([]byte(text), &comment); err != nil || comment.Owner != owner || comment.Name != "mf-0-l-db" || comment.Subject != g.Subject || !comment.Expires.Equal(l.ExpiresAt) {
		t.Errorf("comment: %s (%v), want owner, name, expiry and subject", text, err)
	}
	if strings.ContainsFunc(text, func(r rune) bool { return r > 126 }) {
		t.Errorf("comment is not ASCII: %s", text)
	}
	if got := w.ask("app", "SELECT split_part(rolpassword, ':', 1) FROM pg_authid WHERE rolname = $1", role); got != "SCRAM-SHA-256$4096" {
		t.Errorf("password stored as %s, want SCRAM-SHA-256 with 4096 iterations", got)
	}
	allowed, refused := w.as(l, "app"), []string{"SELECT * FROM shop.secrets", "TRUNCATE shop.items", "CREATE ROLE x", "SET ROLE keeper", "CREATE TABLE keep.x ()"}
	for _, s := range refused {
		if _, err := allowed.Exec(t.Context(), s); err == nil {
			t.Errorf("%s: allowed, want it refused", s)
		}
	}
	if err := w.issuer.Revoke(t.Context(), "mf-0-l-db", l.Handle); err != nil {
		t.Fatal(err)
	}
	log, err := w.Log()
	if err != nil || !strings.Contains(log, "CREATE ROLE") || strings.Contains(log, l.Values["password"].Reveal()) {
		t.Errorf("server log (%v): want the statements (%v) and not the password (%v)", err,
			strings.Contains(log, "CREATE ROLE"), strings.Contains(log, l.Values["password"].Reveal()))
	}
}

// testEmptyScope asks for nothing and gets it.
func testEmptyScope(t *testing.T, w *world) {
	for n, scope := range []string{"", " ", "{}", "null"} {
		l := w.issue(fmt.Sprintf("empty-%d", n), scope)
		conn := w.as(l, "postgres")
		if _, err := conn.Exec(t.Context(), "CREATE TABLE public.x ()"); err == nil {
			t.Errorf("scope %q: may create tables", scope)
		}
	}
}

func testNames(t *testing.T, w *world) {
	for _, name := range []string{"", "A", "a_b", "a b", `a";DROP ROLE keeper;--`, "a'b", "ä", "a\x00", strings.Repeat("a", 41)} {
		if _, err := w.issuer.Issue(t.Context(), name, grant("")); err == nil {
			t.Errorf("Issue of %q: got nil, want an error", name)
		}
		if err := w.issuer.Revoke(t.Context(), name, nil); err == nil {
			t.Errorf("Revoke of %q: got nil, want an error", name)
		}
		if _, err := w.issuer.Probe(t.Context(), name, nil); err == nil {
			t.Errorf("Probe of %q: got nil, want an error", name)
		}
	}
}

// testHostileIdentifiers are legal names of things that exist.
func testHostileIdentifiers(t *testing.T, w *world) {
	const evil = `x"; DROP TABLE shop.items; --`
	q := pgx.Identifier{evil}.Sanitize()
	w.run("postgres", "CREATE DATABASE "+q)
	w.run(evil, "CREATE SCHEMA "+q, "CREATE TABLE "+q+"."+q+" (a int)")
	name, err := json.Marshal(evil)
	if err != nil {
		t.Fatal(err)
	}
	l := w.issue("evil", strings.ReplaceAll(`{"database": E, "search_path": [E], "schemas": [{"name": E, "tables": [{"names": [E], "privileges": ["select"]}]}]}`, "E", string(name)))
	conn := w.connect(l.Values["url"].Reveal())
	if _, err := conn.Exec(t.Context(), "SELECT * FROM "+q); err != nil {
		t.Errorf("select from the table with the odd name: %v", err)
	}
	w.wantDead("evil", l)
	if got := w.ask("app", "SELECT count(*)::text FROM shop.items WHERE name = 'kept'"); got != "1" {
		t.Errorf("shop.items has %s of its row, want 1", got)
	}
}

// testMembership: only roles that are allowed and cannot make what outlives a job.
func testMembership(t *testing.T, w *world) {
	w.run("postgres", "CREATE ROLE chief CREATEROLE")
	w.run("app", "GRANT USAGE ON SCHEMA shop TO readers", "GRANT SELECT ON shop.secrets TO readers")
	l := w.issue("member", `{"database": "app", "roles": ["readers"]}`)
	w.as(l, "app", "SELECT * FROM shop.secrets")
	w.wantDead("member", l)
	for _, setup := range []string{"", "ALTER ROLE chief NOCREATEROLE SUPERUSER", "ALTER ROLE chief NOSUPERUSER CREATEDB", "ALTER ROLE chief NOCREATEDB; GRANT pg_execute_server_program TO chief"} {
		if setup != "" {
			w.run("postgres", setup)
		}
		if _, err := w.issuer.Issue(t.Context(), "chief", grant(`{"roles": ["chief"]}`)); !errors.Is(err, creds.ErrBadScope) {
			t.Errorf("membership of chief after %q: got %v, want ErrBadScope", setup, err)
		}
		if err := w.issuer.Revoke(t.Context(), "chief", nil); err != nil {
			t.Error(err)
		}
	}
}

// testPartialGrant: PostgreSQL only warns when GRANT gives less than asked.
func testPartialGrant(t *testing.T, w *world) {
	w.run("postgres", "CREATE ROLE minter LOGIN CREATEROLE PASSWORD 'm1nter-password'", "GRANT ALL ON DATABASE app TO minter WITH GRANT OPTION")
	w.run("app", "GRANT USAGE ON SCHEMA shop TO minter WITH GRANT OPTION", "GRANT SELECT ON shop.items TO minter WITH GRANT OPTION", "GRANT SELECT ON shop.secrets TO minter")
	c := w.config()
	c.User, c.Password = "minter", creds.NewSecret("m1nter-password")
	i := w.newIssuer(c)
	scope := `{"database": "app", "schemas": [{"name": "shop", "tables": [{"names": [%q], "privileges": [%s]}]}]}`
	for n, bad := range []string{fmt.Sprintf(scope, "items", `"select", "insert"`), fmt.Sprintf(scope, "secrets", `"select"`)} {
		if _, err := i.Issue(t.Context(), fmt.Sprintf("part-%d", n), grant(bad)); !errors.Is(err, creds.ErrBadScope) {
			t.Errorf("Issue of %s: got %v, want ErrBadScope", bad, err)
		}
	}
	if _, err := i.Issue(t.Context(), "whole", grant(fmt.Sprintf(scope, "items", `"select"`))); err != nil {
		t.Errorf("Issue of what may be given: %v", err)
	}
}

// testExpiry is kept by the server alone.
func testExpiry(t *testing.T, w *world) {
	g := grant(goodScope)
	g.Expires = time.Now().Add(6 * time.Second) // in which the job logs in
	l, err := w.issuer.Issue(t.Context(), "short", g)
	if err != nil {
		t.Fatal(err)
	}
	_ = w.as(l, "app").Close(t.Context())
	eventually(t, "the login is refused", func() bool {
		conn, err := pgx.Connect(t.Context(), l.Values["url"].Reveal())
		if err != nil {
			return strings.Contains(err.Error(), "28P01")
		}
		_ = conn.Close(t.Context())
		return false
	})
	if now := time.Now(); now.Before(g.Expires.Add(-time.Second)) {
		t.Errorf("refused %v before its time", g.Expires.Sub(now))
	}
	eventually(t, "Probe has a proof that the role expired", func() bool {
		p, err := w.issuer.Probe(t.Context(), "short", l.Handle)
		return err == nil && strings.Contains(p.Refusal, "expired")
	})
	w.wantDead("short", l)
}

// testClockSkew: the server is an hour off the agent, either way.
func testClockSkew(t *testing.T, w *world) {
	for n, off := range []time.Duration{time.Hour, -time.Hour} {
		c := w.config()
		c.Now = func() time.Time { return time.Now().Add(off) }
		g := grant(goodScope)
		g.Expires = c.Now().Add(10 * time.Minute)
		name := fmt.Sprintf("skew-%d", n)
		l, err := w.newIssuer(c).Issue(t.Context(), name, g)
		if err != nil {
			t.Fatal(err)
		}
		if !l.ExpiresAt.Equal(g.Expires.Truncate(time.Microsecond)) {
			t.Errorf("lease expires at %v, want %v on the clock of the agent", l.ExpiresAt, g.Expires)
		}
		if got := w.ask("app", "SELECT (rolvaliduntil BETWEEN now() + '9min' AND now() + '10min')::text FROM pg_roles WHERE rolname = $1", "mayfly_"+name); got != "true" {
			t.Errorf("agent %v off: role is not valid for 10 minutes on the clock of the server", off)
		}
	}
	for _, expires := range []time.Time{{}, time.Now()} {
		g := grant(goodScope)
		g.Expires = expires
		if _, err := w.issuer.Issue(t.Context(), "past", g); err == nil {
			t.Errorf("Issue until %v: got nil, want an error", expires)
		}
	}
}

// TestProbeTellsRefusalsApart: only a refusal of this role is a proof.
func TestProbeTellsRefusalsApart(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "max_connections=12", "superuser_reserved_connections=3")
	l := w.issue("probed", goodScope)
	still := func(why string) {
		t.Helper()
		if p, err := w.issuer.Probe(t.Context(), "probed", l.Handle); !errors.Is(err, creds.ErrStillValid) {
			t.Errorf("Probe when %s: got %+v and %v, want ErrStillValid", why, p, err)
		}
	}
	unknown := func(why string) {
		t.Helper()
		if p, err := w.issuer.Probe(t.Context(), "probed", l.Handle); err == nil || errors.Is(err, creds.ErrStillValid) {
			t.Errorf("Probe when %s: got %+v and %v, want neither proof nor ErrStillValid", why, p, err)
		}
	}
	var conns []*pgx.Conn
	for range 5 {
		conns = append(conns, w.as(l, "app"))
	}
	still("the role has used up its connections")
	for _, c := range conns {
		_ = c.Close(t.Context())
	}
	job := w.as(l, "app", "ALTER ROLE CURRENT_USER PASSWORD 'the job knows better'")
	still("the job has changed its password and is logged in")
	_ = job.Close(t.Context())
	eventually(t, "the job has no session", func() bool {
		return w.ask("app", "SELECT count(*)::text FROM pg_stat_activity WHERE usename = $1", l.Facts["username"]) == "0"
	})
	still("the job has changed its password")
	hba := func(lines ...string) {
		w.run("postgres", "CREATE TABLE hba (l text)", "INSERT INTO hba VALUES ('"+strings.Join(lines, "'), ('")+"')",
			"COPY hba TO '"+w.Dir()+"/data/pg_hba.conf'", "DROP TABLE hba", "SELECT pg_reload_conf()")
	}
	hba("host all postgres all scram-sha-256", "host all all all reject")
	eventually(t, "the rule counts", func() bool {
		_, err := pgx.Connect(t.Context(), l.Values["url"].Reveal())
		return err != nil && strings.Contains(err.Error(), "pg_hba.conf")
	})
	unknown("pg_hba.conf rejects everybody")
	if err := w.issuer.Revoke(t.Context(), "probed", nil); err != nil {
		t.Fatal(err)
	}
	unknown("it is revoked and pg_hba.conf rejects everybody")
	hba("host all all all scram-sha-256")
	eventually(t, "the rule counts", func() bool {
		p, err := w.issuer.Probe(t.Context(), "probed", l.Handle)
		return err == nil && strings.Contains(p.Refusal, "28P01")
	})
	for { // until all slots are taken, the reserved ones too
		conn, err := pgx.Connect(t.Context(), w.dsn("postgres"))
		if err != nil {
			break
		}
		t.Cleanup(func() { _ = conn.Close(context.Background()) })
	}
	unknown("the server has no slot left")
}
