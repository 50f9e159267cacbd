// Package postgres issues database roles that live no longer than a job.
//
// A lease is a role of its own: named after the lease, with a random password,
// a date of expiry, and a comment that says whose it is. Revoking it takes the
// right to log in, ends its sessions, drops what it owns in every database and
// then the role. The name is all it takes.
//
// The server must be PostgreSQL 14 or later, reached directly: a pooler between
// would answer logins itself. The administrator is a superuser, or a role with
// CREATEROLE and pg_signal_backend that may grant what the policy asks for.
//
// What it cannot do: sessions that are open when the role expires go on until
// it is revoked (PostgreSQL looks at VALID UNTIL at login only). What a job
// makes while it acts as another role ("roles" of the scope) is that role's
// and stays.
package postgres

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// rolePrefix begins the name of every role that this package makes.
const rolePrefix = "mayfly_"

const maxNameBytes = 40 // the contract's; with the prefix well below PostgreSQL's 63

// An Issuer makes and unmakes roles on one server. It may be used by several
// goroutines at once.
type Issuer struct {
	// Way is changed before the first use alone.
	Way Way

	config Config
	admin  *pool
}

// New checks c and returns an issuer. It does not connect: a database that is
// down stops the jobs that want it and not the agent.
func New(c Config) (*Issuer, error) {
	if c.Trace == nil {
		c.Trace = func(string) {}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	if _, err := c.connection(); err != nil {
		return nil, err
	}
	i := &Issuer{config: c}
	i.admin = newPool(i.connect)
	return i, nil
}

// Close ends the administrator's connections. Leases stay as they are.
func (i *Issuer) Close() { i.admin.close() }

// CheckScope implements creds.ScopeChecker. It asks no server, so that a table
// that does not exist is found only by Issue.
func (i *Issuer) CheckScope(scope json.RawMessage) error {
	_, err := i.parseScope(scope)
	return err
}

// roleName maps different names of leases to different roles.
func roleName(name string) (string, error) {
	if name == "" || len(name) > maxNameBytes || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return "", fmt.Errorf("lease name %q: want 1 to %d bytes of a-z, 0-9 and -", name, maxNameBytes)
	}
	return rolePrefix + name, nil
}

// wait sleeps for d or until ctx ends, which is an error.
func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

var (
	_ creds.Issuer       = (*Issuer)(nil)
	_ creds.ScopeChecker = (*Issuer)(nil)
)
