package runner

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/runner/internal/journal"
	"github.com/mayfly-ci/mayfly/sandbox"
)

// An Orphan is something outside that carries this installation's label and
// that no journal owes: the journal was lost, or never reached the disk.
type Orphan struct {
	Kind    string    `json:"kind"` // box or lease
	Name    string    `json:"name"`
	By      string    `json:"by"` // runtime or issuer
	Expires time.Time `json:"expires,omitzero"`
}

// Orphans lists what the second net would take: everything with our label
// that the journal does not owe. It looks at the journal *after* the backends:
// a job writes down what it will make before it makes it.
func (a *Agent) Orphans(ctx context.Context) ([]Orphan, error) {
	var found []Orphan
	var errs []error
	for by, runtime := range a.cfg.Runtimes {
		boxes, err := runtime.List(ctx)
		if err != nil {
			errs = append(errs, fmt.Errorf("list boxes of %s: %w", by, err))
		}
		for _, b := range boxes {
			// The box of a doctor beside us is no job's, and ends by itself.
			doctor := strings.HasPrefix(b.Name, sandbox.CheckPrefix) && time.Now().Before(b.Expires)
			if b.Labels.Owner == a.state.Owner && !doctor {
				found = append(found, Orphan{kindBox, b.Name, by, b.Expires})
			}
		}
	}
	for by, issuer := range a.cfg.Issuers {
		leases, err := issuer.List(ctx)
		if err != nil && !errors.Is(err, errors.ErrUnsupported) {
			errs = append(errs, fmt.Errorf("list leases of %s: %w", by, err))
		}
		for _, l := range leases {
			if l.Owner == a.state.Owner {
				found = append(found, Orphan{kindLease, l.Name, by, l.ExpiresAt})
			}
		}
	}
	logs, err := a.state.journal.Peek()
	if err != nil {
		// An unreadable journal may owe any of them: touch nothing.
		return nil, errors.Join(append(errs, err)...)
	}
	owned := map[string]bool{}
	for _, log := range logs {
		owned[log.Job] = true
		for _, d := range log.Debts() {
			owned[d.Name] = true // a warm box is named after no job
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	orphans := found[:0]
	for _, o := range found {
		if job := jobOf(o.Name); !owned[job] && !owned[o.Name] && a.jobs[job] == "" {
			orphans = append(orphans, o)
		}
	}
	return orphans, errors.Join(errs...)
}

// Reap releases every orphan, and says which.
func (a *Agent) Reap(ctx context.Context) ([]Orphan, error) {
	if a.state.lock == nil {
		return nil, errPeeked
	}
	orphans, err := a.Orphans(ctx)
	errs := []error{err}
	var gone []Orphan
	for _, o := range orphans {
		d := journal.Debt{Kind: o.Kind, Name: o.Name, By: o.By}
		one, cancel := a.detached(ctx)
		err := a.audit(one, jobOf(o.Name), "reap", o.Name, nil, "kind", o.Kind, "by", o.By)
		if err == nil {
			err = a.releaseOne(one, &journal.Log{Job: jobOf(o.Name)}, d, nil)
		}
		cancel()
		if err != nil {
			errs = append(errs, fmt.Errorf("reap %s: %w", o.Name, err))
			continue
		}
		gone = append(gone, o)
	}
	return gone, errors.Join(errs...)
}

func (a *Agent) reapLoop(ctx context.Context) {
	for {
		gone, err := a.Reap(ctx)
		if err != nil && ctx.Err() == nil {
			a.cfg.Log.Error().Err(err).Msg("reap")
		}
		for _, o := range gone {
			a.cfg.Log.Warn().Str("kind", o.Kind).Str("name", o.Name).Msg("reaped what no journal knew")
		}
		if !pause(ctx, reapEvery) {
			return
		}
	}
}
