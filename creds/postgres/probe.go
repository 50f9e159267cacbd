package postgres

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/mayfly-ci/mayfly/creds"
)

// Probe implements creds.Issuer. A refused login alone proves little, since a
// job may change its own password: the proof is that the server refuses this
// role, that no such role may log in, and that it has no session. Without a
// handle there is no login, and the proof says so.
func (i *Issuer) Probe(ctx context.Context, name string, sealed []byte) (creds.Proof, error) {
	role, err := roleName(name)
	if err != nil {
		return creds.Proof{}, err
	}
	var h handle
	var how, refusal string
	if sealed != nil {
		if h, err = openHandle(sealed); err != nil {
			return creds.Proof{}, fmt.Errorf("probe role %s: %w", role, err)
		}
		how = fmt.Sprintf("login as %s to %s at %s with its password; ", role, h.Database, i.config.address())
		if refusal, err = i.login(ctx, role, h); err != nil {
			return creds.Proof{}, fmt.Errorf("probe role %s: %w", role, err)
		}
	} else {
		how = "no login tried, the password is not known; "
	}
	state, err := i.state(ctx, role, h.OID)
	if err != nil {
		return creds.Proof{}, fmt.Errorf("probe role %s: %w", role, err)
	}
	how += "administrator looked at pg_roles and pg_stat_activity of " + i.config.address()
	return creds.Proof{At: i.config.Now(), How: how, Refusal: strings.TrimPrefix(refusal+"; "+state, "; ")}, nil
}

// login tries the password and returns the words of the refusal. Whatever else
// happens is an error, creds.ErrStillValid if the password was right.
func (i *Issuer) login(ctx context.Context, role string, h handle) (string, error) {
	conf, err := i.connection()
	if err != nil {
		return "", err
	}
	conf.User, conf.Database, conf.Password = role, h.Database, h.Password
	conn, err := pgconn.ConnectConfig(ctx, &conf.Config)
	if err == nil {
		_ = conn.Close(ctx)
		return "", fmt.Errorf("login accepted: %w", creds.ErrStillValid)
	}
	var pg *pgconn.PgError
	if !errors.As(err, &pg) || !strings.Contains(pg.Message, role) {
		return "", err
	}
	// These codes have other uses too (a pg_hba.conf that rejects the address,
	// a server without a free slot); the routine tells which one it is.
	switch checked := pg.Routine == "InitializeSessionUserId"; {
	case pg.Code == invalidPassword, pg.Code == invalidLogin && checked:
		return pg.Error(), nil
	case pg.Code == tooManyConnections && checked:
		return "", fmt.Errorf("%w: %w", creds.ErrStillValid, err) // its own limit: the password was right
	}
	return "", err
}

// state says in which way the role is dead, as the administrator sees it.
func (i *Issuer) state(ctx context.Context, role string, oid uint32) (string, error) {
	var exists, login bool
	var expired *time.Time
	var sessions int
	err := i.admin.with(ctx, i.config.Database, func(conn *pgx.Conn) error {
		return conn.QueryRow(ctx, `SELECT r.oid IS NOT NULL, coalesce(rolcanlogin, false),
			CASE WHEN rolvaliduntil < clock_timestamp() THEN rolvaliduntil END,
			(SELECT count(*) FROM pg_stat_activity WHERE usesysid IN (r.oid, $2))
			FROM (VALUES (1)) one LEFT JOIN pg_roles r ON rolname = $1`, role, oid).Scan(&exists, &login, &expired, &sessions)
	})
	switch {
	case err != nil:
		return "", err
	case sessions > 0:
		return "", fmt.Errorf("%w: it has %d open sessions", creds.ErrStillValid, sessions)
	case !exists:
		return "no such role, no session of it", nil
	case !login:
		return "the role may not log in and has no session", nil
	case expired != nil:
		return "the role expired at " + expired.UTC().Format(time.RFC3339) + " and has no session", nil
	}
	return "", fmt.Errorf("%w: the role exists and may log in", creds.ErrStillValid)
}

// List implements creds.Issuer. A role without a comment that Issue wrote is
// not ours, whatever its name.
func (i *Issuer) List(ctx context.Context) ([]creds.Info, error) {
	type row struct {
		Role    string
		Comment *string
	}
	var found []row
	err := i.admin.with(ctx, i.config.Database, func(conn *pgx.Conn) error {
		rows, err := conn.Query(ctx, `SELECT rolname, shobj_description(oid, 'pg_authid') FROM pg_roles
			WHERE starts_with(rolname, $1) ORDER BY rolname`, rolePrefix)
		if err != nil {
			return err
		}
		found, err = pgx.CollectRows(rows, pgx.RowToStructByPos[row])
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list roles: %w", err)
	}
	var infos []creds.Info
	for _, r := range found {
		if l, ok := readLabel(r.Role, r.Comment); ok && l.Owner == i.config.Owner {
			infos = append(infos, creds.Info{Name: l.Name, Owner: l.Owner, ExpiresAt: l.Expires})
		}
	}
	return infos, nil
}
