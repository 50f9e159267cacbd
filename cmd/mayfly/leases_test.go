package main

import (
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/policy"
)

// slow is an issuer of leases of an hour.
type slow struct{ creds.Issuer }

func (slow) MinLife() time.Duration { return time.Hour }

// TestCheckLife: a lease that no job could get is refused before there is a job.
func TestCheckLife(t *testing.T) {
	t.Parallel()
	p, err := policy.Parse([]byte(`version: 1
rules:
  - name: all
    match: {trust: local}
    timeout: 2h
    leases:
      - {name: short, issuer: app, ttl: 1h, env: {A: token}}
      - {name: long, issuer: app, ttl: 61m, env: {B: token}}
      - {name: whole, issuer: app, env: {C: token}}
`), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range p.Grants() {
		err := checkLife(slow{}, g)
		if refused := err != nil; refused != (g.Lease == "short") {
			t.Errorf("lease %s: %v", g.Lease, err)
		}
		if err != nil && !strings.Contains(err.Error(), "policy.yaml:3 all: lease short: ends after 1h0m0s, and issuer app gives none for 1h0m0s or less") {
			t.Errorf("%v", err)
		}
		if err := checkLife(nil, g); err != nil {
			t.Errorf("an issuer that gives anything: %v", err)
		}
	}
}

// TestExamineLeases: a lease that is stuck is missing something, and its reason is
// one line.
func TestExamineLeases(t *testing.T) {
	t.Parallel()
	owed := func(state, why string) runner.DebtInfo {
		return runner.DebtInfo{Kind: "lease", Name: "mf-a-l-" + state, By: "db", Lease: runner.Lease{State: state, Since: time.Unix(0, 0), Why: why}}
	}
	if f := examineLeases([]runner.JobInfo{{Owes: []runner.DebtInfo{owed("issued", ""), {Kind: "box"}}}}); f.State != stateOK || f.Detail != "none of 1 that are owed" {
		t.Errorf("got %+v", f)
	}
	f := examineLeases([]runner.JobInfo{{Owes: []runner.DebtInfo{owed("stuck", "one\ntwo"), owed("revoking", "")}}})
	if f.State != stateMissing || !strings.HasPrefix(f.Detail, "mf-a-l-stuck of issuer db  stuck since 1970-01-01T00:00:00Z: one; two: ") {
		t.Errorf("got %+v", f)
	}
}
