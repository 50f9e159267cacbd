package postgres

import (
	"context"
	"errors"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// empty drops what role owns in the database of conn and takes its privileges
// there and on what all databases share.
func (i *Issuer) empty(ctx context.Context, conn *pgx.Conn, role string) error {
	for {
		err := script(ctx, conn, "DROP OWNED BY "+quote(role)+i.behaviour())
		if code(err) != outOfMemory {
			return err
		}
		// One transaction locks all that it drops, and the server has room for
		// some thousand locks. A job that made more is emptied piece by piece.
		dropped, singly := i.dropSingly(ctx, conn, role)
		if singly != nil || dropped == 0 {
			return errors.Join(err, singly)
		}
	}
}

func (i *Issuer) behaviour() string {
	if i.config.DropDependents {
		return " CASCADE"
	}
	return " RESTRICT"
}

// dropSingly drops what it can of what role owns, newest first, since what is
// built on a thing is younger than it. The words are the server's own and the
// names quoted by it.
func (i *Issuer) dropSingly(ctx context.Context, conn *pgx.Conn, role string) (int, error) {
	rows, err := conn.Query(ctx, `SELECT CASE type WHEN 'large object' THEN format('SELECT lo_unlink(%s)', objid)
			WHEN 'statistics object' THEN 'DROP STATISTICS ' || identity ELSE format('DROP %s %s', type, identity) END
		FROM pg_shdepend, pg_identify_object(classid, objid, objsubid)
		WHERE refclassid = 'pg_authid'::regclass AND refobjid = (SELECT oid FROM pg_roles WHERE rolname = $1)
			AND dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND deptype = 'o'
			AND type IN ('table', 'view', 'materialized view', 'foreign table', 'sequence', 'function', 'procedure', 'aggregate',
				'type', 'schema', 'collation', 'operator', 'large object', 'statistics object')
		ORDER BY objid DESC`, role)
	if err != nil {
		return 0, err
	}
	statements, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return 0, err
	}
	dropped := 0
	for _, s := range statements {
		if strings.HasPrefix(s, "DROP ") {
			s += i.behaviour()
		}
		err := script(ctx, conn, s)
		var pg *pgconn.PgError
		if err != nil && !errors.As(err, &pg) {
			return dropped, err
		}
		if err == nil {
			dropped++ // one that is in the way of another goes in the next round
		}
	}
	return dropped, nil
}
