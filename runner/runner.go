// Package runner is the agent: it polls for a job, gives it a box, a way out
// and credentials, runs it, and takes everything back before it says so.
//
// Start reading at life.go: it is the whole program. The rest of the package
// is what the life needs: steps.go runs the job's steps (script.go a script,
// action.go an action), listen.go hears and stream.go masks what they print,
// settle.go insists on the release, recover.go and reap.go are the same release
// after a crash, keep.go and shell.go are the boxes that stay for somebody to
// look at, pool.go and fill.go those that are made before there is a job,
// objects.go is the git cache, state.go is the directory.
package runner

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/zerolog"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/runner/internal/journal"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/wall"
)

// Why a job's context ended. The cause picks the result, nothing else does.
// A provider's cancellation is providers.ErrCancelled.
var (
	// ErrDeadline is the end of the time that the plan gave the job.
	ErrDeadline = errors.New("the job's time is over")
	// ErrStopping is the second signal to the agent.
	ErrStopping = errors.New("the agent was told to stop")
)

// Defaults, each with its reason.
const (
	// releaseTimeout bounds one pass over the debts of a job. Destroying a box
	// takes 10 ms and revoking a role as much; a minute covers an issuer that
	// restarts.
	releaseTimeout = time.Minute
	// stuckAfter is how long a result is held back by what cannot be
	// released (docs/adr/0005).
	stuckAfter = 2 * time.Minute
	// reapEvery is the period of the second net.
	reapEvery = time.Minute
)

// errPeeked guards what changes the world against a state that was opened for
// reading only.
var errPeeked = errors.New("state was opened for reading: an agent owns it")

// Config is what an agent needs. The maps are keyed by the names that the
// policy and the journal use.
type Config struct {
	Providers map[string]providers.Provider
	Runtimes  map[string]sandbox.Runtime
	Issuers   map[string]creds.Issuer
	Gateway   egress.Gateway
	Git       GitCache // nil is none
	Policy    *policy.Policy
	Audit     audit.Sink
	Log       zerolog.Logger

	Slots  int           // jobs at once; at least 1
	Keep   int           // boxes of failed jobs that are kept at once, if the policy says so; 0 is none
	Drain  time.Duration // how long the first signal waits for running jobs; 0 is until they end
	Quotas Quotas
	Warm   Warm
	Once   bool // return after one job, for "mayfly exec"
	Beyond
}

// Beyond is about what lies beyond the rules of a job.
type Beyond struct {
	Canary *wall.Canary // what boxes must not reach on this host; nil is none
	Learn  Learning
}

// An Agent runs jobs. Make one with New, call Run once.
type Agent struct {
	cfg   Config
	state *State
	slots *slots
	polls *polls
	rules atomic.Pointer[policy.Policy] // in force for jobs that are admitted from now on

	mu   sync.Mutex
	jobs map[string]string // logs that may own something, and whose they are: the reaper keeps off them

	learning map[string]bool // jobs that may reach what no rule allows

	kept keptBoxes
	pool *pool
}

// New checks the configuration. A policy is needed: without one, no agent.
func New(cfg Config, state *State) (*Agent, error) {
	var errs []error
	if len(cfg.Providers) == 0 {
		errs = append(errs, errors.New("no provider"))
	}
	if len(cfg.Runtimes) == 0 {
		errs = append(errs, errors.New("no runtime"))
	}
	if cfg.Gateway == nil || cfg.Audit == nil || cfg.Policy == nil || state == nil {
		errs = append(errs, errors.New("gateway, audit, policy and state are required"))
	}
	if cfg.Keep < 0 {
		errs = append(errs, fmt.Errorf("%d kept boxes, want at least 0", cfg.Keep))
	}
	if cfg.Warm.Boxes < 0 {
		errs = append(errs, fmt.Errorf("%d warm boxes, want at least 0", cfg.Warm.Boxes))
	}
	if cfg.Slots < 1 {
		errs = append(errs, fmt.Errorf("%d slots, want at least 1", cfg.Slots))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("agent: %w", err)
	}
	a := &Agent{cfg: cfg, state: state, slots: newSlots(cfg.Slots, cfg.Quotas), polls: newPolls(cfg.Providers), jobs: map[string]string{}, learning: map[string]bool{}}
	a.rules.Store(cfg.Policy)
	a.pool = newPool(a)
	return a, nil
}

// Run recovers what an earlier life left, and takes jobs until drain ends; then
// it waits for the running ones. When kill ends too, running jobs are cancelled,
// and what cannot be released at once is left to the next life. The error says
// what stopped it or what is still owed; nil means that nothing is.
func (a *Agent) Run(drain, kill context.Context) error {
	if a.state.lock == nil {
		return errPeeked
	}
	logs, unreadable := a.state.journal.Unfinished()
	for _, log := range logs {
		a.enlist(log.Job) // before the reaper looks
	}
	var wg sync.WaitGroup
	var recovered error
	wg.Go(func() { recovered = a.recover(kill, logs) })
	if unreadable != nil {
		wg.Wait()
		return errors.Join(fmt.Errorf("no new jobs while debts are unreadable: %w", unreadable), recovered)
	}

	work, done := context.WithCancel(drain)
	defer done()
	context.AfterFunc(work, a.kept.close)
	jobs, cancel := context.WithCancelCause(kill)
	defer cancel(nil)
	if a.cfg.Drain > 0 {
		context.AfterFunc(drain, func() {
			if pause(jobs, a.cfg.Drain) {
				cancel(ErrStopping)
			}
		})
	}
	wg.Go(func() { a.reapLoop(work) })
	var left errorList
	wg.Go(func() { a.pool.run(work, kill, &left) })
	for name := range a.cfg.Providers {
		wg.Go(func() { a.poll(work, jobs, name, done, &left) })
	}
	wg.Wait()
	if jobs, err := a.state.Jobs(); err == nil && len(jobs) == 0 && !a.cfg.Once {
		return nil // what went wrong on the way has been said, and is paid
	}
	return errors.Join(recovered, left.err())
}

// poll asks while there is room for a job, claims what is offered, and waits for
// the jobs. It asks without a slot: an offer holds nothing, and a service that
// has no jobs must not keep others from being asked.
func (a *Agent) poll(ctx, kill context.Context, provider string, done func(), left *errorList) {
	var jobs sync.WaitGroup
	defer jobs.Wait()
	defer a.polls.doing(provider, pollEnded)
	for wait := retryFirst; a.slots.room(ctx, provider); a.polls.doing(provider, pollSlot) {
		a.polls.doing(provider, pollAsk)
		offer, err := a.cfg.Providers[provider].Poll(ctx)
		if ctx.Err() == nil {
			a.polls.answered(provider, err)
		}
		if err != nil {
			if ctx.Err() == nil {
				a.cfg.Log.Error().Err(err).Str("provider", provider).Dur("retry_in", wait).Msg("poll")
				pause(ctx, wait)
				wait = backoff(wait)
			}
			continue
		}
		wait = retryFirst
		a.polls.doing(provider, pollSlot)
		turn, ok := a.slots.take(ctx, provider)
		if !ok {
			return
		}
		a.polls.doing(provider, pollClaim)
		claimed := make(chan struct{})
		part := sync.OnceFunc(func() {
			turn.leave()
			if a.cfg.Once {
				done()
			}
		})
		jobs.Go(func() {
			defer part()
			var err error
			erased(func() { err = a.live(kill, turn, offer, sync.OnceFunc(func() { close(claimed) }), part) })
			if err != nil {
				left.add(err)
				a.cfg.Log.Error().Err(err).Str("provider", provider).Str("offer", offer.ID).Msg("job")
				pause(ctx, retryFirst) // a full disk must not turn into a loop
			}
		})
		<-claimed // an offer that is not claimed yet would be offered again
	}
}

// enlist tells the reaper that the job may own things; the function that it
// returns tells it that the job's journal is closed.
func (a *Agent) enlist(job string) func() {
	a.enlistFor(job, job)
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		maps.DeleteFunc(a.jobs, func(_, owner string) bool { return owner == job })
		delete(a.learning, job)
	}
}

// enlistFor tells it that what is named after a log is now the job's.
func (a *Agent) enlistFor(job, log string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.jobs[log] = job
}

// audit writes one event; kv are pairs of detail. Its error stops what was to
// be done.
func (a *Agent) audit(ctx context.Context, job, action, object string, err error, kv ...string) error {
	e := audit.Event{Time: time.Now(), Job: job, Action: action, Object: object, Result: "ok"}
	if err != nil {
		e.Result = err.Error()
	}
	if a.learns(job) {
		kv = append(slices.Clip(kv), "mode", egress.ModeAudit)
	}
	for i := 0; i+1 < len(kv); i += 2 {
		if kv[i+1] == "" {
			continue
		}
		if e.Detail == nil {
			e.Detail = map[string]string{}
		}
		e.Detail[kv[i]] = kv[i+1]
	}
	if err := a.cfg.Audit.Append(context.WithoutCancel(ctx), e); err != nil {
		return fmt.Errorf("audit %s: %w", action, err)
	}
	return nil
}

func stamp(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339Nano)
}

// errorList collects errors of goroutines.
type errorList struct {
	mu   sync.Mutex
	errs []error
}

func (l *errorList) add(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.errs) < 100 { // an agent lives for months
		l.errs = append(l.errs, err)
	}
}

func (l *errorList) err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return errors.Join(l.errs...)
}

// owed reports whether the log still has debts of a kind.
func owed(log *journal.Log, kind string) bool {
	for _, d := range log.Debts() {
		if d.Kind == kind {
			return true
		}
	}
	return false
}
