package egresstest

import (
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// spent tells the lines that say that a lease was used up.
func spent(lease string) func(egress.Line) bool {
	return func(l egress.Line) bool {
		return l.Verdict == egress.Refused && strings.Contains(l.Reason, "lease "+lease+" is for ")
	}
}

// usesHTTPS: two rules of a lease share its uses, and what gets no credential takes
// none of them.
func usesHTTPS(b *bench) error {
	r, _, err := b.secured()
	if err != nil {
		return err
	}
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	r.Inject = &egress.Injection{Lease: "lease", As: egress.Bearer, Value: creds.NewSecret(credential), Placeholder: standing, Uses: 2}
	other := r
	r.ID, r.Requests = "policy:a", []egress.Request{{Methods: []string{"GET"}, Path: "/a"}}
	other.ID, other.Requests = "policy:b", []egress.Request{{Methods: []string{"GET"}, Path: "/b"}}
	if err := j.open("job-1-lease", "job-1", r, other); err != nil {
		return err
	}
	c, err := j.client("web.example", "web.example", true)
	if err != nil {
		return err
	}
	for i, want := range []struct {
		path, as string
		status   int
	}{{"/a", another, 403}, {"/c", "", 200}, {"/a", standing, 200}, {"/b", standing, 200}, {"/a", standing, 403}, {"/b", "", 403}, {"/c", "", 200}} {
		header, value := "X-Nothing", "x"
		if want.as != "" {
			header, value = "Authorization", "Bearer "+want.as
		}
		if status, text, err := c.do("GET", "https://web.example"+want.path, "", nil, header, value); err != nil || status != want.status {
			return fmt.Errorf("request %d, %s: got %d %q %v, want %d", i, want.path, status, text, err, want.status)
		}
	}
	if n := j.ledger.count(spent("lease")); n != 2 {
		return fmt.Errorf("got %d lines of what was refused so, want 2", n)
	}
	return nil
}

// usesLogin: each session of SSH, and each of PostgreSQL, is one.
func usesLogin(b *bench) error {
	git, err := b.git("*")
	if err != nil {
		return err
	}
	db, err := oneUse(b.pgRule())
	if err != nil {
		return err
	}
	git, _ = oneUse(git, nil)
	j, err := b.start("job-1", git, db)
	if err != nil {
		return err
	}
	for i, want := range []string{"ran x with ", ""} {
		c, err := j.ssh("git.example", "git")
		if err != nil {
			return err
		}
		got, err := run(c, "x", "")
		if err != nil || got.out != want {
			return fmt.Errorf("ssh %d: got %+v %v, want %q", i, got, err, want)
		}
	}
	c, err := j.postgres("db.example", pgUser, pgDatabase, pgPlaceholder, true)
	if err != nil {
		return err
	}
	defer c.Conn().Close()
	_, err = j.postgres("db.example", pgUser, pgDatabase, pgPlaceholder, true)
	if refusal := (*pgconn.PgError)(nil); !errors.As(err, &refusal) || refusal.Code != "28000" {
		return fmt.Errorf("postgres: got %v, want the second login refused", err)
	}
	for _, lease := range []string{git.Inject.Lease, db.Inject.Lease} {
		if _, err := j.ledger.await("spent: "+lease, spent(lease)); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) pgRule() (egress.Rule, error) {
	r, _, _, err := b.database()
	return r, err
}

// oneUse is the rule for one use.
func oneUse(r egress.Rule, err error) (egress.Rule, error) {
	if err != nil {
		return r, err
	}
	in := *r.Inject
	in.Uses, r.Inject = 1, &in
	return r, nil
}
