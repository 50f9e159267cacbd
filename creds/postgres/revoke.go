package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Waits between looks: sessions end within a millisecond or two of being told.
const (
	firstWait = 500 * time.Microsecond
	maxWait   = 100 * time.Millisecond
)

// Revoke implements creds.Issuer. It goes on until the role is gone, an error
// is certain, or ctx ends.
//
// What the role owns is dropped, with everything in it, in every database. What
// others made on top of that stays, and then the role stays too, without login,
// password and sessions, and the error says what is in the way; with
// Config.DropDependents it is dropped. Ownership is never given to somebody
// else: a function that runs as its owner would get the rights of the heir.
func (i *Issuer) Revoke(ctx context.Context, name string, sealed []byte) error {
	role, err := roleName(name)
	if err != nil {
		return err
	}
	h, _ := openHandle(sealed) // what it tells is welcome and not needed
	for delay := firstWait; ; delay = min(2*delay, maxWait) {
		err := i.revoke(ctx, role, h.OID)
		if err == nil {
			return nil
		}
		// Gone since we looked, by its owner or by another revocation: look again.
		gone := code(err) == noDatabase || code(err) == noObject
		if !gone && !transient(err) {
			return fmt.Errorf("revoke role %s: %w", role, detailed(err))
		}
		if wait(ctx, delay) != nil {
			return fmt.Errorf("revoke role %s: %w: %w", role, context.Cause(ctx), err)
		}
	}
}

func (i *Issuer) revoke(ctx context.Context, role string, oid uint32) error {
	var databases []string
	err := i.admin.with(ctx, i.config.Database, func(conn *pgx.Conn) (err error) {
		oid, databases, err = i.disarm(ctx, conn, role, oid)
		return err
	})
	if err != nil || oid == 0 {
		return err
	}
	var errs []error
	for _, database := range databases {
		err := i.admin.with(ctx, database, func(conn *pgx.Conn) error { return i.empty(ctx, conn, role) })
		if err != nil {
			errs = append(errs, fmt.Errorf("database %s: %w", database, err))
		}
		i.config.Trace("postgres.revoke.emptied")
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return i.admin.with(ctx, i.config.Database, func(conn *pgx.Conn) error {
		if err := i.empty(ctx, conn, role); err != nil {
			return err
		}
		if err := script(ctx, conn, "DROP ROLE "+quote(role)); err != nil {
			return err
		}
		i.config.Trace("postgres.revoke.dropped")
		// A login that was half done when the role lost its right to one.
		return i.endSessions(ctx, conn, "usesysid = $1", oid)
	})
}

// disarm finds the role and leaves it without login, password, sessions and
// prepared transactions. It returns its oid, 0 if it is gone, and the other
// databases that know it. known is the oid it had, or 0.
func (i *Issuer) disarm(ctx context.Context, conn *pgx.Conn, role string, known uint32) (uint32, []string, error) {
	// An Issue of that name that is not over yet; see create. A job cannot
	// pose as one: it is not the administrator.
	if err := i.endSessions(ctx, conn, "application_name = $1 AND usename = current_user", role); err != nil {
		return 0, nil, err
	}
	i.config.Trace("postgres.revoke.settled")
	oid, login, err := i.find(ctx, conn, role)
	if err != nil {
		return 0, nil, err
	}
	if oid == 0 && known != 0 {
		return 0, nil, i.endSessions(ctx, conn, "usesysid = $1", known)
	}
	if oid == 0 {
		return 0, nil, nil
	}
	if login {
		if err := script(ctx, conn, "ALTER ROLE "+quote(role)+" NOLOGIN PASSWORD NULL CONNECTION LIMIT 0"); err != nil {
			return 0, nil, err
		}
	}
	i.config.Trace("postgres.revoke.disarmed")
	if err := i.endSessions(ctx, conn, "usesysid = $1", oid); err != nil {
		return 0, nil, err
	}
	i.config.Trace("postgres.revoke.ended")
	if err := i.rollbackPrepared(ctx, conn, role); err != nil {
		return 0, nil, err
	}
	i.config.Trace("postgres.revoke.rolledback")
	rows, err := conn.Query(ctx, `SELECT datname FROM pg_database WHERE datname <> current_database() AND oid IN
		(SELECT dbid FROM pg_shdepend WHERE refclassid = 'pg_authid'::regclass AND refobjid = $1)`, oid)
	if err != nil {
		return 0, nil, err
	}
	databases, err := pgx.CollectRows(rows, pgx.RowTo[string])
	return oid, databases, err
}

// find looks the role up and makes sure that it is a lease of this
// installation: the name alone would let a mistake drop somebody else's role.
// The oid of a role that does not exist is 0.
func (i *Issuer) find(ctx context.Context, conn *pgx.Conn, role string) (oid uint32, login bool, err error) {
	var comment *string
	err = conn.QueryRow(ctx, `SELECT oid, rolcanlogin, shobj_description(oid, 'pg_authid')
		FROM pg_roles WHERE rolname = $1`, role).Scan(&oid, &login, &comment)
	if errors.Is(err, pgx.ErrNoRows) {
		return 0, false, nil
	}
	if err != nil {
		return 0, false, err
	}
	if l, ok := readLabel(role, comment); !ok || l.Owner != i.config.Owner {
		return 0, false, fmt.Errorf("not a lease of installation %s by its comment; if it is one, drop it by hand", i.config.Owner)
	}
	return oid, login, nil
}

// readLabel reads the comment on a role; false if it is none of ours.
func readLabel(role string, comment *string) (label, bool) {
	var l label
	if comment == nil || json.Unmarshal([]byte(*comment), &l) != nil {
		return label{}, false
	}
	return l, l.Owner != "" && rolePrefix+l.Name == role
}

// endSessions ends the sessions that match and waits until they are gone.
func (i *Issuer) endSessions(ctx context.Context, conn *pgx.Conn, match string, arg any) error {
	for delay := firstWait; ; delay = min(2*delay, maxWait) {
		var left int
		err := conn.QueryRow(ctx, `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
			WHERE pid <> pg_backend_pid() AND `+match, arg).Scan(&left)
		if err != nil || left == 0 {
			return err
		}
		if err := wait(ctx, delay); err != nil {
			return fmt.Errorf("%d sessions do not end: %w", left, err)
		}
	}
}

// rollbackPrepared ends the transactions that a role prepared and left: they
// hold locks and no session ends them. Only their owner may, in their database.
func (i *Issuer) rollbackPrepared(ctx context.Context, conn *pgx.Conn, role string) error {
	rows, err := conn.Query(ctx, `SELECT database, format('ROLLBACK PREPARED %L', gid) FROM pg_prepared_xacts WHERE owner = $1`, role)
	if err != nil {
		return err
	}
	type prepared struct{ Database, Rollback string }
	found, err := pgx.CollectRows(rows, pgx.RowToStructByPos[prepared])
	if err != nil {
		return err
	}
	for _, p := range found {
		rollback := func(conn *pgx.Conn) error {
			for _, statement := range []string{"SET ROLE " + quote(role), p.Rollback, "RESET ROLE"} {
				if _, err := conn.PgConn().Exec(ctx, statement).ReadAll(); err != nil {
					_ = conn.Close(ctx) // never to be used with a role that is not its own
					return fmt.Errorf("prepared transaction in database %s: %w", p.Database, err)
				}
			}
			return nil
		}
		if p.Database == i.config.Database {
			err = rollback(conn)
		} else {
			err = i.admin.with(ctx, p.Database, rollback)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func openHandle(sealed []byte) (handle, error) {
	var h handle
	if json.Unmarshal(sealed, &h) != nil || h.Password == "" || h.Database == "" || h.OID == 0 {
		return handle{}, errors.New("handle unreadable") // its content is a secret
	}
	return h, nil
}

// detailed adds what the server lists besides its message: the objects that
// are in the way.
func detailed(err error) error {
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == dependents {
		return fmt.Errorf("%w: %s; the role is left without login and sessions: drop these, or set drop_dependents", err, pg.Detail)
	}
	return err
}
