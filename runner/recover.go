package runner

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/runner/internal/journal"
)

// recover releases what an earlier life of the agent left behind, all of it at
// once: an issuer that is down must not keep the claims of other jobs from being
// kept alive. It is the release of life.go over the same log; polling does not
// wait for it.
func (a *Agent) recover(ctx context.Context, logs []*journal.Log) error {
	var wg sync.WaitGroup
	var left errorList
	for _, log := range logs {
		wg.Go(func() {
			if err := a.recoverOne(ctx, log); err != nil {
				left.add(fmt.Errorf("recover %s: %w", log.Job, err))
			}
		})
	}
	wg.Wait()
	return left.err()
}

func (a *Agent) recoverOne(ctx context.Context, log *journal.Log) error {
	defer a.enlist(log.Job)()
	ctx = audit.WithJob(ctx, log.Job)
	a.cfg.Log.Info().Str("job", log.Job).Int("debts", len(log.Debts())).Msg("recover")
	stop := a.watch(ctx, func(error) {}, log)
	defer stop()
	for wait := retryFirst; ; wait = backoff(wait) {
		err := a.audit(ctx, log.Job, recovers(log.Job), log.Job, nil, "debts", strconv.Itoa(len(log.Debts())),
			"of_generation", strconv.FormatInt(log.Generation, 10), "damaged_lines", strconv.Itoa(log.Damaged))
		if err == nil {
			return a.settle(ctx, log, nil)
		}
		// What cannot be written down is not done; the debts stay.
		a.cfg.Log.Error().Err(err).Str("job", log.Job).Dur("retry_in", wait).Msg("recover")
		if !pause(ctx, wait) {
			return errors.Join(fmt.Errorf("left to the next start: %w", err), log.Close())
		}
	}
}

// Recover releases what an earlier life left, and returns: for "mayfly recover".
func (a *Agent) Recover(ctx context.Context) error {
	if a.state.lock == nil {
		return errPeeked
	}
	logs, unreadable := a.state.journal.Unfinished()
	return errors.Join(a.recover(ctx, logs), unreadable)
}
