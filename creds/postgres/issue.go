package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/mayfly-ci/mayfly/creds"
)

// SQLSTATEs (PostgreSQL, appendix A) that decide something.
const (
	notGranted         = "01007" // a warning: GRANT gave less than it was asked for
	invalidLogin       = "28000"
	invalidPassword    = "28P01"
	noDatabase         = "3D000"
	noSchema           = "3F000"
	noTable            = "42P01"
	noObject           = "42704"
	noPrivilege        = "42501"
	wrongKind          = "42809"
	grantLoop          = "0LP01"
	serialization      = "40001"
	deadlock           = "40P01"
	lockNotAvailable   = "55P03"
	objectInUse        = "55006"
	tooManyConnections = "53300"
	outOfMemory        = "53200"
	dependents         = "2BP01"
	internal           = "XX000" // among others "tuple concurrently updated"
)

// issueAttempts bounds how often Issue starts again because somebody else
// changed the privileges of the same object at the same time.
const issueAttempts = 10

// A label is the comment on a role: how the reaper finds it and what an
// auditor reads.
type label struct {
	Owner   string        `json:"owner"`
	Name    string        `json:"name"`
	Expires time.Time     `json:"expires"`
	Subject creds.Subject `json:"subject"`
}

// A handle is what a probe needs and cannot derive from the name.
type handle struct {
	Password string `json:"password"`
	Database string `json:"database"`
	OID      uint32 `json:"oid"`
}

// A birth is all that is needed to make a role.
type birth struct {
	role, verifier string
	scope          Scope
	label          label
}

// Issue implements creds.Issuer. The role appears whole or not at all.
func (i *Issuer) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	role, err := roleName(name)
	if err != nil {
		return creds.Lease{}, err
	}
	scope, err := i.parseScope(g.Scope)
	if err != nil {
		return creds.Lease{}, err
	}
	expires := g.Expires.UTC().Truncate(time.Microsecond) // what PostgreSQL stores
	if !expires.After(i.config.Now()) {
		return creds.Lease{}, fmt.Errorf("role %s: grant expired at %s", role, expires.Format(time.RFC3339))
	}
	password := newPassword()
	secret, err := verifier(password)
	if err != nil {
		return creds.Lease{}, err
	}
	b := birth{role, secret, scope, label{i.config.Owner, name, expires, g.Subject}}
	var oid uint32
	for attempt := 0; ; attempt++ {
		err := i.admin.with(ctx, scope.Database, func(conn *pgx.Conn) error {
			oid, err = i.create(ctx, conn, b)
			return err
		})
		if err == nil {
			break
		}
		if attempt == issueAttempts || !transient(err) {
			return creds.Lease{}, fmt.Errorf("issue role %s: %w", role, refusal(err))
		}
		if err := wait(ctx, time.Duration(attempt)*time.Millisecond); err != nil {
			return creds.Lease{}, fmt.Errorf("issue role %s: %w", role, err)
		}
	}
	return i.lease(b, password, oid)
}

func (i *Issuer) lease(b birth, password string, oid uint32) (creds.Lease, error) {
	h, err := json.Marshal(handle{password, b.scope.Database, oid})
	if err != nil {
		return creds.Lease{}, fmt.Errorf("handle of %s: %w", b.role, err)
	}
	host, port := i.config.jobAddress()
	dsn := url.URL{
		Scheme: "postgres", User: url.UserPassword(b.role, password), Host: net.JoinHostPort(host, port),
		Path: "/" + b.scope.Database, RawQuery: url.Values{"sslmode": {i.config.sslMode()}}.Encode(),
	}
	return creds.Lease{
		Values: map[string]creds.Secret{"password": creds.NewSecret(password), "url": creds.NewSecret(dsn.String())},
		Facts: map[string]string{
			"username": b.role, "host": host, "port": port, "database": b.scope.Database, "sslmode": i.config.sslMode(),
		},
		Handle: h, ByName: true, ExpiresAt: b.label.Expires,
	}, nil
}

// create makes the role in one transaction.
//
// The session bears the role's name while the transaction is open. If we die or
// lose patience meanwhile, the server may still hold statements that it has
// received and not executed, the commit among them: a revocation that found no
// role would be wrong a moment later. So Revoke first ends every session of
// that name and then looks.
func (i *Issuer) create(ctx context.Context, conn *pgx.Conn, b birth) (oid uint32, err error) {
	if _, err := conn.Exec(ctx, "BEGIN"); err != nil {
		return 0, err
	}
	var now time.Time
	var super, loaded bool
	err = conn.QueryRow(ctx, `SELECT clock_timestamp(), rolsuper, set_config('application_name', $1, true) <> ''
		FROM pg_roles WHERE rolname = current_user`, b.role).Scan(&now, &super, &loaded)
	if err != nil {
		return 0, err
	}
	i.config.Trace("postgres.issue.begun")
	if err := checkRoles(ctx, conn, b.scope.Roles); err != nil {
		return 0, err
	}
	// The server looks at its own clock. The time left, read after the
	// server's, rounds down.
	until := now.Add(b.label.Expires.Sub(i.config.Now())).UTC().Truncate(time.Microsecond)
	statements, err := b.statements(conn.PgConn(), until)
	if err != nil {
		return 0, err
	}
	if !super { // or it could not drop later what the role will own
		statements = append(statements, "GRANT "+quote(b.role)+" TO CURRENT_USER")
	}
	delete(conn.PgConn().CustomData(), notGranted)
	if err := script(ctx, conn, statements...); err != nil {
		return 0, err
	}
	if why, ok := conn.PgConn().CustomData()[notGranted]; ok {
		return 0, fmt.Errorf("%w: administrator may not give all of it: %v", creds.ErrBadScope, why)
	}
	if err := conn.QueryRow(ctx, "SELECT oid FROM pg_roles WHERE rolname = $1", b.role).Scan(&oid); err != nil {
		return 0, err
	}
	i.config.Trace("postgres.issue.created")
	if _, err := conn.Exec(ctx, "COMMIT"); err != nil {
		return 0, err
	}
	i.config.Trace("postgres.issue.committed")
	return oid, nil
}

// script runs statements in one round trip. They are ours: names in them are
// quoted, and nothing else comes from outside.
func script(ctx context.Context, conn *pgx.Conn, statements ...string) error {
	_, err := conn.PgConn().Exec(ctx, strings.Join(statements, "; ")).ReadAll()
	return err
}

func (b birth) statements(c *pgconn.PgConn, until time.Time) ([]string, error) {
	text, err := json.Marshal(b.label)
	if err != nil {
		return nil, err
	}
	comment, err := c.EscapeString(ascii(string(text)))
	if err != nil {
		return nil, err
	}
	inherit := "NOINHERIT"
	if len(b.scope.Roles) > 0 {
		inherit = "INHERIT"
	}
	role := quote(b.role)
	return slices.Concat([]string{
		"CREATE ROLE " + role + " LOGIN " + inherit + " NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION NOBYPASSRLS" +
			" CONNECTION LIMIT " + strconv.Itoa(b.scope.Connections) + " PASSWORD '" + b.verifier + "'" +
			" VALID UNTIL '" + until.Format("2006-01-02 15:04:05.000000+00") + "'",
		"COMMENT ON ROLE " + role + " IS '" + comment + "'",
	}, b.scope.statements(b.role)), nil
}

// checkRoles refuses roles that could make something that outlives the job, or
// rule the server: membership gives the right to act as them.
func checkRoles(ctx context.Context, conn *pgx.Conn, roles []string) error {
	if len(roles) == 0 {
		return nil
	}
	rows, err := conn.Query(ctx, `SELECT DISTINCT r.rolname || ' can act as ' || p.rolname FROM pg_roles r
		JOIN pg_roles p ON pg_has_role(r.oid, p.oid, 'MEMBER') WHERE r.rolname = ANY($1) AND (p.rolsuper
		OR p.rolcreaterole OR p.rolcreatedb OR p.rolreplication OR p.rolbypassrls OR p.rolname IN
		('pg_execute_server_program', 'pg_write_server_files', 'pg_read_server_files'))`, roles)
	if err != nil {
		return err
	}
	found, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	if len(found) > 0 {
		return fmt.Errorf("%w: roles: %s, which rules more than a database", creds.ErrBadScope, strings.Join(found, ", "))
	}
	return nil
}

// refusal marks what the server says about a scope that asks for what does not
// exist or may not be given. The transaction is rolled back by then.
func refusal(err error) error {
	if slices.Contains([]string{noDatabase, noSchema, noTable, noObject, noPrivilege, wrongKind, grantLoop}, code(err)) {
		return fmt.Errorf("%w: %w", creds.ErrBadScope, err)
	}
	return err
}

// transient says that the same would succeed if nobody did the same meanwhile.
func transient(err error) bool {
	switch code(err) {
	case serialization, deadlock, lockNotAvailable, objectInUse:
		return true
	case internal:
		var pg *pgconn.PgError
		return errors.As(err, &pg) && strings.HasPrefix(pg.Routine, "simple_heap_") // "tuple concurrently updated"
	}
	return false
}

// code is the SQLSTATE of err, or "".
func code(err error) string {
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		return pg.Code
	}
	return ""
}

// ascii escapes JSON so that databases of any encoding can store it.
func ascii(text string) string {
	var out strings.Builder
	for _, r := range text {
		if r < utf8.RuneSelf {
			out.WriteRune(r)
			continue
		}
		q := strconv.QuoteRuneToASCII(r) // '\u00e9' or, beyond 16 bits, '\U0001f600'
		if r <= 0xffff {
			out.WriteString(q[1 : len(q)-1])
			continue
		}
		r -= 0x10000
		fmt.Fprintf(&out, `\u%04x\u%04x`, 0xd800+r>>10, 0xdc00+r&0x3ff)
	}
	return out.String()
}
