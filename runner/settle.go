package runner

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner/internal/journal"
)

// Retries go from a quarter of a second, in which a restarting daemon may be
// back, to half a minute, which no backend notices.
const (
	retryFirst = 250 * time.Millisecond
	retryLast  = 30 * time.Second
)

// probeFirst is the pause before a credential that was still accepted is tried
// again: most providers refuse at once, replicas follow within milliseconds.
const probeFirst = 5 * time.Millisecond

// settle releases everything that the log owes, however long it takes. If it
// takes longer than StuckAfter, the service is told the true result although
// something of the job is left, the audit says so, and the agent takes no more
// jobs while a box is among it (docs/adr/0005). It gives up only when ctx ends;
// the next life goes on.
func (a *Agent) settle(ctx context.Context, log *journal.Log, out *stream) error {
	begun := time.Now()
	stuck := func() {}
	defer func() { stuck() }()
	for wait, late := retryFirst, false; ; wait = backoff(wait) {
		err := a.release(ctx, log, "", out)
		if err == nil {
			return log.Close()
		}
		a.cfg.Log.Error().Err(err).Str("job", log.Job).Dur("retry_in", wait).Msg("release")
		if !late && time.Since(begun) > a.cfg.StuckAfter {
			late = true
			stuck = a.giveUpWaiting(ctx, log, out, err)
		}
		if ctx.Err() != nil || !pause(ctx, wait) {
			return errors.Join(fmt.Errorf("left to the next start: %w", err), log.Close())
		}
	}
}

// giveUpWaiting reports the job although something of it is left. The function
// that it returns is called when nothing is left any more.
func (a *Agent) giveUpWaiting(ctx context.Context, log *journal.Log, out *stream, why error) func() {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.cfg.ReleaseTimeout)
	defer cancel()
	free := func() {}
	if owed(log, kindBox) {
		free = a.jam() // before the service hears that we have a slot
	}
	err := a.audit(ctx, log.Job, "release.stuck", log.Job, why)
	for _, d := range log.Debts() {
		if d.Kind == kindClaim && err == nil {
			if err = a.report(ctx, log, d, out, true); err == nil {
				err = log.Release(d.Name)
			}
		}
	}
	if err != nil {
		a.cfg.Log.Error().Err(err).Str("job", log.Job).Msg("report of a stuck job")
	}
	return free
}

// probe uses a revoked lease until its provider refuses it, or ctx ends.
func (a *Agent) probe(ctx context.Context, issuer creds.Issuer, d journal.Debt) (creds.Proof, error) {
	for wait := probeFirst; ; wait = backoff(wait) {
		proof, err := issuer.Probe(ctx, d.Name, d.Handle)
		if err == nil || !errors.Is(err, creds.ErrStillValid) {
			return proof, err
		}
		if !pause(ctx, wait) {
			return creds.Proof{}, err
		}
	}
}

// watch keeps the claim alive until the function that it returns is called,
// which is after the claim is released, and cancels the job when its provider
// says so.
func (a *Agent) watch(ctx context.Context, cancel context.CancelCauseFunc, log *journal.Log) func() {
	watching, stop := context.WithCancel(context.WithoutCancel(ctx))
	var claim journal.Debt
	for _, d := range log.Debts() {
		if d.Kind == kindClaim {
			claim = d
		}
	}
	provider, ok := a.cfg.Providers[claim.By]
	if !ok {
		return stop
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for watching.Err() == nil {
			err := provider.Watch(watching, claim.Name, claim.Handle)
			switch {
			case errors.Is(err, providers.ErrCancelled):
				cancel(providers.ErrCancelled)
			case err != nil && watching.Err() == nil:
				a.cfg.Log.Warn().Err(err).Str("job", log.Job).Msg("watch")
			}
			pause(watching, retryFirst)
		}
	}()
	return func() {
		stop()
		<-ended
	}
}

// pause waits for d and returns false if ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func backoff(d time.Duration) time.Duration { return min(2*d, retryLast) }
