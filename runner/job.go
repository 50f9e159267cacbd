package runner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/workflow"
	"github.com/mayfly-ci/mayfly/runner/internal/journal"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// boxGrace is how much longer than its job a box may live. The box ends itself
// then, whatever became of the agent; until then the agent releases it.
const boxGrace = 5 * time.Minute

var errSkipped = errors.New("the job's condition is false")

// A life is one job while this agent has it: what live and run pass around.
type life struct {
	*Agent
	log      *journal.Log
	provider providers.Provider
	job      providers.Job
	out      *stream
	turn     *turn
	clock    *stopwatch
	warm     *warmBox // that it has taken; nil if there was none
	cold     bool     // its box is made for it
	steps    *steps   // nil before there is a box
	look     atomic.Pointer[look]

	own      *workflow.Container // the job's own container; nil if its workflow names none
	services []*service

	mounts []sandbox.Mount // what the box sees of the host
	letGo  func()          // of what mounts name; nil if it is nothing
}

// box is the name of the box that the job runs in.
func (l *life) box() string {
	if l.cold {
		return boxName(l.log.Job)
	}
	return l.warm.name
}

// admit asks the policy, and writes down its answer before anything follows
// from it.
func (l *life) admit(ctx context.Context) (policy.Plan, error) {
	rules := l.rules.Load() // once: the plan and its digest are of one policy
	plan, err := rules.Decide(l.job)
	if _, ok := l.cfg.Runtimes[plan.Runtime]; err == nil && !ok {
		err = fmt.Errorf("%w: %s: runtime %q is not configured on this agent", policy.ErrDenied, plan.Rule, plan.Runtime)
	}
	if _, ok := l.cfg.Runtimes[plan.Runtime].(sandbox.Puller); err == nil && plan.Image != "" && !ok {
		err = fmt.Errorf("%w: %s: image %s: boxes of runtime %q are made of no image", policy.ErrDenied, plan.Rule, plan.Image, plan.Runtime)
	}
	if err == nil {
		err = l.permitted(plan)
	}
	var narrowed []string
	if err == nil {
		plan, narrowed, err = l.narrow(ctx, plan)
	}
	s := l.job.Subject
	err = errors.Join(err, l.audit(ctx, l.log.Job, "job.admit", s.Job, err, append(narrowed,
		"provider", s.Provider, "repository", s.Repository, "ref", s.Ref, "sha", s.SHA, "workflow", s.Workflow,
		"event", s.Event, "actor", s.Actor, "trust", string(l.job.Trust),
		"unmet", unmet(plan), "policy", rules.Digest(), "rule", plan.Rule, "runtime", plan.Runtime, "image", plan.Image, "isolation", string(plan.Isolation))...))
	if err != nil {
		return plan, err
	}
	l.tellUnmet(plan)
	runs, err := workflow.JobCondition(l.job.If, l.job.Contexts)
	if err != nil {
		return plan, fmt.Errorf("%w: if: %w", providers.ErrBadJob, err)
	}
	if !runs {
		return plan, errSkipped
	}
	return l.contain(ctx, plan)
}

// queue waits, claimed and without a slot, while the job's repository has as
// many jobs running as it may.
func (l *life) queue(ctx context.Context) error {
	repository := l.job.Subject.Repository
	if l.turn.begin(repository) {
		return nil
	}
	quota := strconv.Itoa(l.slots.quota(l.turn.party))
	err := l.audit(ctx, l.log.Job, "job.wait", l.job.Subject.Job, nil,
		"provider", l.turn.provider, "repository", repository, "quota", quota)
	if err != nil {
		return err
	}
	l.out.notice(0, "waiting: "+quota+" jobs of "+repository+" run on this agent, and no more may at once")
	ctx, cancel := context.WithTimeoutCause(ctx, l.slots.quotas.Patience, fmt.Errorf(
		"waited %v for other jobs of %s, of which this agent runs %s at once (quotas in its configuration)",
		l.slots.quotas.Patience, repository, quota))
	defer cancel()
	err = l.turn.wait(ctx)
	l.clock.mark("wait")
	return err
}

// spec is the box of the plan, made of what its image turned out to be.
func (l *life) spec(plan policy.Plan, img sandbox.Image, deadline time.Time) sandbox.Spec {
	s := specOf(plan)
	s.Image, s.Mounts = img.Ref, l.mounts
	s.Labels = sandbox.Labels{Owner: l.state.Owner, Job: l.log.Job, Generation: l.state.Generation}
	s.Expires = l.expires(plan, deadline)
	return s
}

// specOf is what the plan says of a box, whoever gets it. A warm box serves the
// plans of which this is the same.
func specOf(plan policy.Plan) sandbox.Spec {
	return sandbox.Spec{Image: plan.Image, Isolation: plan.Isolation, Limits: plan.Limits}
}

// expires is when the box ends itself: the time that it may be kept is in it
// from birth.
func (l *life) expires(plan policy.Plan, deadline time.Time) time.Time {
	return deadline.Add(l.outlives(plan))
}

// outlives is by how much a box may outlive the deadline of its job.
func (a *Agent) outlives(plan policy.Plan) time.Duration {
	if a.cfg.Keep > 0 {
		return plan.Keep + boxGrace
	}
	return boxGrace
}

// ledger writes one attempt to reach something into the audit, and shows a
// refused one in the job's log with the rule that would allow it.
func (l *life) ledger(line egress.Line) error {
	if look := l.look.Load(); look != nil && line.Gateway == look.gateway && look.Line(line) {
		return nil // our own attempt: box.attest says it
	}
	var err error
	if line.Verdict == egress.Refused || line.Verdict == egress.Failed {
		err = errors.New(l.out.hide(string(line.Verdict) + ": " + line.Reason))
	}
	object := line.Name
	if object == "" {
		object = line.Address
	}
	object = l.out.hide(object) // a job may look up a secret as a name
	werr := l.audit(context.Background(), l.log.Job, "egress."+line.Network, object, err,
		"verdict", string(line.Verdict), "gateway", line.Gateway, "address", line.Address, "port", number(int64(line.Port)),
		"protocol", string(line.Protocol), "rule", line.Rule, "dialled", line.Dialled,
		"sent", number(line.Sent), "received", number(line.Received), "duration", line.Duration.String(),
		"method", l.out.hide(line.Request.Method), "path", l.out.hide(line.Request.Path), "status", number(int64(line.Request.Status)),
		"lease", line.Request.Lease, "step", l.stepOf(line.Gateway), "service", l.serviceOf(line.Gateway),
		"pid", number(int64(line.Process.PID)), "executable", l.out.hide(line.Process.Executable), "process", line.Process.Unknown)
	if err != nil || line.Verdict == egress.Learned && line.Network != "dns" {
		l.out.refusal(line, l.serviceOf(line.Gateway))
	}
	return werr
}

// stepOf is the id of the step that runs while a gateway writes a line. A service
// runs beside all steps.
func (l *life) stepOf(gateway string) string {
	i, ok := l.out.now()
	if !ok || i >= len(l.job.Steps) || l.serviceOf(gateway) != "" {
		return ""
	}
	return l.job.Steps[i].ID
}

func number(n int64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatInt(n, 10)
}

// setOutcome records how the job ended, before anything is released. If the
// journal cannot take it, this life still reports it, and the next one says
// "lost", which is the truth as far as that one can know.
func (l *life) setOutcome(r providers.Result) {
	r.Reason = l.out.hide(r.Reason) // errors quote
	if r.Reason != "" {
		l.out.notice(-1, r.Reason)
	}
	err := l.audit(context.Background(), l.log.Job, "job.end", l.log.Job, nil,
		append([]string{"conclusion", string(r.Conclusion)}, l.clock.pairs()...)...)
	raw, jerr := json.Marshal(r)
	if jerr == nil {
		jerr = l.log.SetOutcome(raw)
	}
	if err := errors.Join(err, jerr); err != nil {
		l.cfg.Log.Error().Err(err).Str("job", l.log.Job).Msg("outcome")
	}
	l.pool.stir() // what follows is the release
}

// outcome is how the job ended, as the journal has it.
func outcome(log *journal.Log) (providers.Result, error) {
	raw := log.Outcome()
	if raw == nil {
		return providers.Result{Conclusion: providers.Lost, Reason: "the agent died while the job ran"}, nil
	}
	var r providers.Result
	if err := json.Unmarshal(raw, &r); err != nil {
		return r, fmt.Errorf("outcome: %w", err)
	}
	return r, nil
}

// conclude turns the error that ended a job into its result. The cause of the
// context decides first; then the type of the error does.
func conclude(ctx context.Context, err error) providers.Result {
	cause := context.Cause(ctx)
	switch {
	case errors.Is(cause, providers.ErrCancelled), errors.Is(err, providers.ErrCancelled):
		return providers.Result{Conclusion: providers.Cancelled, Reason: providers.ErrCancelled.Error()}
	case errors.Is(cause, ErrStopping), errors.Is(err, ErrStopping):
		return providers.Result{Conclusion: providers.Cancelled, Reason: ErrStopping.Error()}
	case errors.Is(err, ErrDeadline):
		return providers.Result{Conclusion: providers.TimedOut, Reason: ErrDeadline.Error()}
	case errors.Is(err, errSkipped):
		return providers.Result{Conclusion: providers.Skipped, Reason: errSkipped.Error()}
	case errors.Is(err, policy.ErrDenied):
		return providers.Result{Conclusion: providers.Refused, Reason: err.Error()}
	}
	return providers.Result{Conclusion: providers.Failure, Reason: err.Error()}
}

// A stopwatch notes how long each stage of a life took.
type stopwatch struct {
	mu   sync.Mutex
	last time.Time
	laps []string // stage, duration, …
}

func newStopwatch() *stopwatch { return &stopwatch{last: time.Now()} }

// mark ends a stage: what is held by the name of what holds it, without the
// name of the job, which for the claim leaves nothing.
func (s *stopwatch) mark(stage string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if stage == "" {
		stage = kindClaim
	}
	now := time.Now()
	s.laps = append(s.laps, "took_"+strings.TrimPrefix(stage, "-"), now.Sub(s.last).String())
	s.last = now
}

func (s *stopwatch) pairs() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.laps
}
