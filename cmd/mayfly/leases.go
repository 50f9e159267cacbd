package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/policy"
)

// checkLife refuses a lease that would end sooner than its provider can let it
// end: no job would get one. The time of a job runs while its box is made, so
// that a rule with the same time would do no better.
func checkLife(issuer creds.Issuer, g policy.Grant) error {
	m, ok := issuer.(creds.Minimum)
	if !ok || g.Lasts > m.MinLife() {
		return nil
	}
	return fmt.Errorf("%s: lease %s: ends after %v, and issuer %s gives none for %v or less: give the lease (ttl) and its rule (timeout) more",
		g.Rule, g.Lease, g.Lasts, g.Issuer, m.MinLife().Round(time.Minute))
}

// leaseText says of a debt where its lease is.
func leaseText(l runner.Lease) string {
	if l.State == "" {
		return ""
	}
	text := "  " + l.State
	if !l.Since.IsZero() {
		text += " since " + l.Since.UTC().Format(time.RFC3339)
	}
	if l.Why != "" {
		text += ": " + l.Why
	}
	return strings.ReplaceAll(text, "\n", "; ")
}

// examineLeases says which leases could not be seen dead so far.
func examineLeases(jobs []runner.JobInfo) finding {
	f := finding{"leases", "stuck", stateOK, "none"}
	n := 0
	var all []string
	for _, j := range jobs {
		for _, d := range j.Owes {
			if d.State != "" {
				n++
			}
			if d.Stuck() {
				all = append(all, fmt.Sprintf("%s of issuer %s%s", d.Name, d.By, leaseText(d.Lease)))
			}
		}
	}
	if n > 0 {
		f.Detail = fmt.Sprintf("none of %d that are owed", n)
	}
	if len(all) > 0 {
		f.State, f.Detail = stateMissing, strings.Join(all, "; ")+": the agent tries until they are dead; the issuer must answer, or somebody end them there"
	}
	return f
}
