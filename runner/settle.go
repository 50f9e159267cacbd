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
// takes longer than stuckAfter, the service is told the true result although
// something of the job is left, the audit says so, and the agent takes no more
// jobs while a box is among it (docs/adr/0005). It gives up only when ctx ends;
// the next life goes on.
func (a *Agent) settle(ctx context.Context, log *journal.Log, out *stream) error {
	begun := time.Now()
	var free func() // not nil while a box of this job jams the agent
	defer func() {
		if free != nil {
			free()
		}
	}()
	for wait := retryFirst; ; wait = backoff(wait) {
		err := a.release(ctx, log, "", out)
		if k := a.kept.of(log.Job); err == nil && k != nil {
			a.stay(ctx, k)
			begun, wait = time.Now(), retryFirst/2
			continue
		}
		if err == nil {
			return log.Close()
		}
		a.cfg.Log.Error().Err(err).Str("job", log.Job).Dur("retry_in", wait).Msg("release")
		switch late := time.Since(begun) > stuckAfter; {
		case late && (owed(log, kindLease) || owed(log, kindGateway) || a.boxOwed(log)) && a.kept.leave(log.Job, "something else of the job cannot be released"):
			out.notice(-1, "the box is not kept: something else of the job cannot be released")
		case late:
			if free == nil && a.boxOwed(log) {
				free = a.slots.jam() // before the service hears that we have a slot
			}
			a.reportLate(ctx, log, out, err)
		}
		if ctx.Err() != nil || !pause(ctx, wait) {
			return errors.Join(fmt.Errorf("left to the next start: %w", err), log.Close())
		}
	}
}

// boxOwed reports whether the log owes a box whose time has come.
func (a *Agent) boxOwed(log *journal.Log) bool {
	for _, d := range log.Debts() {
		if d.Kind == kindBox && !a.kept.holdsBox(log.Job, d.Name) {
			return true
		}
	}
	return false
}

// reportLate reports the job, if that is still owed, although something else of
// it is left.
func (a *Agent) reportLate(ctx context.Context, log *journal.Log, out *stream, why error) {
	ctx, cancel := a.detached(ctx)
	defer cancel()
	for _, d := range log.Debts() {
		if d.Kind != kindClaim {
			continue
		}
		err := a.audit(ctx, log.Job, "release.stuck", log.Job, why)
		if err == nil {
			err = a.report(ctx, log, d, out, true)
		}
		if err == nil {
			err = log.Release(d.Name)
		}
		if err != nil {
			a.cfg.Log.Error().Err(err).Str("job", log.Job).Msg("report of a stuck job")
		}
	}
}

// detached is a context for what must be done although the job has ended, and
// must not take for ever.
func (a *Agent) detached(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
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
		for wait := retryFirst; watching.Err() == nil; pause(watching, wait) {
			err := provider.Watch(watching, claim.Name, claim.Handle)
			switch {
			case errors.Is(err, providers.ErrCancelled):
				cancel(providers.ErrCancelled)
			case err == nil:
				wait = retryFirst
			case watching.Err() == nil:
				wait = backoff(wait)
				a.cfg.Log.Warn().Err(err).Str("job", log.Job).Dur("retry_in", wait).Msg("watch")
			}
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
