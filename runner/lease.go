package runner

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner/internal/failpoint"
	"github.com/mayfly-ci/mayfly/runner/internal/journal"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// leaseDebts are a lease and, newer, the rules that have its credential. turn is
// how often it was renewed.
func leaseDebts(job string, l policy.Lease, turn int, deadline time.Time) []journal.Debt {
	ds := []journal.Debt{{Kind: kindLease, Name: leaseName(job, l, turn), By: l.Issuer, Scope: l.Step, Expires: deadline.UTC()}}
	if len(l.Broker) > 0 || l.Serves() {
		ds = append(ds, journal.Debt{Kind: kindRules, Name: brokerName(job, l, turn), Scope: l.Step})
	}
	return ds
}

// revoke ends a lease at its issuer and writes down the proof that it is dead. In
// which state the lease is stands in the journal (journal.State).
func (a *Agent) revoke(ctx context.Context, log *journal.Log, d journal.Debt) error {
	turn := func(next journal.State, why string) error {
		if d.State == "" || d.State == next || d.State.Ended() || d.State == journal.Stuck && !next.Ended() {
			return nil // no journal has it, or it is so already, or nothing follows
		}
		err := log.Turn(d.Name, next, time.Time{}, why)
		d.State = next
		return err
	}
	if err := turn(journal.Revoking, ""); err != nil {
		a.cfg.Log.Error().Err(err).Str("lease", d.Name).Msg("journal") // it is taken back all the same
	}
	err := a.end(ctx, log, d, turn)
	if err != nil && d.State == journal.Revoking {
		a.cfg.Log.Error().Err(err).Str("lease", d.Name).Str("issuer", d.By).Msg("lease is stuck: it is tried until it is dead")
		err = errors.Join(err, turn(journal.Stuck, err.Error()))
	}
	return err
}

func (a *Agent) end(ctx context.Context, log *journal.Log, d journal.Debt, turn func(journal.State, string) error) error {
	issuer, ok := a.cfg.Issuers[d.By]
	if !ok {
		return fmt.Errorf("issuer %q is not configured any more: configure it until this lease is revoked", d.By)
	}
	err := issuer.Revoke(ctx, d.Name, d.Handle)
	if errors.Is(err, creds.ErrNotRevocable) {
		err = a.audit(ctx, log.Job, "lease.unprovable", d.Name, nil, "issuer", d.By, "why", err.Error(), "until", stamp(d.Expires))
		if err == nil {
			err = turn(journal.Unprovable, "")
		}
		return err
	}
	if err != nil {
		return errors.Join(err, a.audit(ctx, log.Job, "lease.revoke", d.Name, err, "issuer", d.By))
	}
	failpoint.Here("revoked")
	proof, err := a.probe(ctx, issuer, d)
	return errors.Join(err, a.audit(ctx, log.Job, "lease.revoke", d.Name, err,
		"issuer", d.By, "probe", proof.How, "refusal", proof.Refusal, "refused_at", stamp(proof.At)))
}

// reachMax bounds what the record says of the reach of one lease, in bytes.
const reachMax = 2000

// reach is what could be reached with a lease: where the gateway adds it or, if
// the job has a value of it, wherever its rules let it go.
func reach(plan policy.Plan, l policy.Lease) string {
	var all []string
	for _, b := range l.Broker {
		all = append(all, fmt.Sprintf("%s:%d", b.Rule.Name, b.Rule.Port))
	}
	if len(l.Broker) == 0 || len(l.InClear()) > 0 {
		for _, e := range plan.Egress {
			if e.Service == "" && (e.Step == "" || l.Step == "" || e.Step == l.Step) {
				all = append(all, fmt.Sprintf("%s:%d", e.Rule.Name, e.Rule.Port))
			}
		}
		if plan.Mode == egress.ModeAudit {
			all = append(all, "anything (mode: audit)")
		}
	}
	slices.Sort(all)
	text := strings.Join(slices.Compact(all), ", ")
	if text == "" {
		return "nothing: no rule lets the job out"
	}
	if len(text) > reachMax {
		text = text[:reachMax] + "…"
	}
	return text
}

// turned is the part of a name that says how often the lease was renewed.
func turned(turn int) string {
	if turn == 0 {
		return ""
	}
	return strconv.FormatInt(int64(turn), 36)
}
