package runner

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/workflow"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

var errStepTimeout = errors.New("the step's time is over")

// cancelGrace is how long steps that run always() or on cancelled() may take
// together after the provider cancelled the job; GitHub's runner gives as much.
const cancelGrace = 5 * time.Minute

// steps runs the steps of one job in its box.
type steps struct {
	*life
	box      sandbox.Sandbox // nil while its image is pulled
	image    sandbox.Image   // of the box
	plan     policy.Plan
	deadline time.Time

	leases    holdings
	env       map[string]string // the job's own, and what steps wrote to GITHUB_ENV
	path      []string          // what steps wrote to GITHUB_PATH, last first
	blank     map[string]bool   // command files that the last step left empty
	event     bool              // the event is in the box
	heard     heard
	debug     bool      // the job asked for debug messages
	root      *frame    // of the job itself
	failing   *current  // the first step that failed and was not tolerated
	graceEnds time.Time // of the steps that run after the provider cancelled the job; zero before
}

func newSteps(l *life, box sandbox.Sandbox, img sandbox.Image, plan policy.Plan, deadline time.Time) *steps {
	root := &frame{steps: l.job.Steps, done: map[string]any{}, status: providers.Success}
	return &steps{life: l, box: box, image: img, plan: plan, deadline: deadline, env: map[string]string{}, root: root}
}

// run runs the job's steps in order and returns how the job ended.
func (s *steps) run(ctx, alive context.Context) (providers.Result, error) {
	scope := s.scope(s.root, nil)
	env, err := variables(s.job.Env, scope)
	if err != nil {
		return providers.Result{}, fmt.Errorf("%w: %w", providers.ErrBadJob, err)
	}
	s.env = env
	// A service has a switch for it; by hand it is a secret or a variable.
	s.debug, err = workflow.Condition("secrets.ACTIONS_STEP_DEBUG == 'true' || vars.ACTIONS_STEP_DEBUG == 'true'", scope)
	if err == nil {
		err = s.sequence(ctx, alive, s.root)
	}
	if err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return providers.Result{}, err
	}
	return s.result()
}

// sequence runs the steps of a frame in order. An error means that no other step
// may run; one that failed is no error.
func (s *steps) sequence(ctx, alive context.Context, f *frame) error {
	names := actionNames(f.steps)
	for i, step := range f.steps {
		c := &current{Step: step, frame: f, index: i, name: names[i]}
		if f.outer != nil {
			c.index = f.outer.index
		}
		stepCtx, cancel := s.stepContext(ctx, alive)
		err := s.runStep(stepCtx, alive, c)
		cancel()
		if err == nil {
			err = s.stopEarly(ctx, alive)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// stepContext is the job's own context, except that after a cancellation by the
// provider the remaining steps get a bounded time of their own, while the agent
// is alive.
func (s *steps) stepContext(ctx, alive context.Context) (context.Context, context.CancelFunc) {
	if !errors.Is(context.Cause(ctx), providers.ErrCancelled) {
		return context.WithCancel(ctx)
	}
	if !s.cancelled() {
		s.graceEnds = time.Now().Add(cancelGrace)
	}
	return context.WithDeadlineCause(alive, earlier(s.graceEnds, s.deadline), ErrDeadline)
}

func (s *steps) cancelled() bool { return !s.graceEnds.IsZero() }

// stopEarly says whether the job ended so that no further step may run.
func (s *steps) stopEarly(ctx, alive context.Context) error {
	if err := context.Cause(alive); err != nil {
		return err
	}
	if err := context.Cause(ctx); err != nil && !errors.Is(err, providers.ErrCancelled) {
		return err
	}
	return nil
}

// runStep decides whether a step runs, gives it what is bound to it, runs it and
// takes that back. An error means that the job cannot go on; a step that fails
// is no error.
//
// A step of an action is none for the service, and has no scope of its own.
func (s *steps) runStep(ctx, alive context.Context, step *current) error {
	state := providers.StepState{Index: step.index, Started: time.Now()}
	runs, err := s.prepare(ctx, step)
	if err != nil {
		return s.endStep(step, state, failed(fmt.Errorf("%s: %w", step.Position, err)))
	}
	if !runs {
		return s.endStep(step, state, ending{conclusion: providers.Skipped})
	}
	if step.frame.outer != nil {
		end := s.exec(ctx, alive, step)
		return errors.Join(s.out.flush(), s.endStep(step, state, end))
	}
	state.Name = s.title(step)
	if err := s.out.step(state); err != nil {
		return fmt.Errorf("log: %w", err)
	}
	end, err := s.inScope(ctx, alive, step)
	return errors.Join(err, s.out.flush(), s.endStep(step, state, end))
}

// prepare evaluates the environment and the condition of a step.
func (s *steps) prepare(ctx context.Context, step *current) (runs bool, err error) {
	step.scope = s.filesScope(ctx, step.frame, step)
	if step.env, err = variables(step.Env, step.scope); err != nil {
		return false, err
	}
	step.scope = s.filesScope(ctx, step.frame, step)
	runs, err = workflow.Condition(step.If, step.scope)
	if err != nil {
		return false, fmt.Errorf("if: %w", err)
	}
	return runs, nil
}

// variables evaluates env: variables that are written out, and one expression
// that gives more.
func variables(env providers.Env, scope workflow.Scope) (map[string]string, error) {
	values := map[string]string{}
	for _, k := range slices.Sorted(maps.Keys(env.Vars)) {
		v, err := workflow.Interpolate(env.Vars[k], scope)
		if err != nil {
			return nil, fmt.Errorf("env %s: %w", k, err)
		}
		values[k] = v
	}
	if env.Expr == "" {
		return values, nil
	}
	more, err := workflow.Variables(env.Expr, scope)
	if err != nil {
		return nil, fmt.Errorf("env: %w", err)
	}
	maps.Copy(values, more)
	return values, nil
}

// inScope holds what is bound to the step while it runs, and releases it before
// the next one starts.
func (s *steps) inScope(ctx, alive context.Context, step *current) (ending, error) {
	// What is refused here is not there yet: the step fails, and others may run.
	if why, err := s.require(ctx, step.ID); why != nil || err != nil {
		return failed(errors.Join(why, err)), err
	}
	rules := stepRules(s.plan, step.ID)
	if len(rules) > 0 {
		_, err := hold(ctx, s.life, rulesName(s.log.Job, step.index), func(ctx context.Context) (none, grip, error) {
			o := egress.Opening{Rules: egress.Rules{Allow: rules}, Ledger: s.ledger, Parent: gatewayName(s.log.Job)}
			return none{}, grip{}, s.cfg.Gateway.Open(ctx, rulesName(s.log.Job, step.index), o)
		})
		if err != nil {
			return failed(err), err
		}
	}
	if err := s.issue(ctx, step.ID); err != nil {
		return failed(err), err
	}
	end := s.exec(ctx, alive, step)
	s.clock.mark("-step-" + step.ID)
	if errors.Is(end.reason, sandbox.ErrDied) {
		return end, end.reason // no step can go on, tolerated or not
	}
	s.leases.rest(step.ID)
	if err := s.dropSecrets(ctx, step.ID); err != nil {
		return end, err
	}
	// What the scope owes and cannot be released now stays in the log and is
	// released with the job: a credential may outlive its step, never its job.
	if err := s.release(ctx, s.log, step.ID, s.out); err != nil {
		return end, fmt.Errorf("step %s: %w", step.ID, err)
	}
	return end, nil
}

// An ending is how a step ended.
type ending struct {
	conclusion providers.Conclusion
	exit       int
	reason     error // shown in the job's log
	outputs    map[string]string
}

func failed(err error) ending { return ending{conclusion: providers.Failure, reason: err} }

// exec runs the step's script or action in the time that the step has.
func (s *steps) exec(ctx, alive context.Context, step *current) ending {
	ctx, cancel, err := stepTimeout(ctx, step)
	if err != nil {
		return failed(fmt.Errorf("%s: %w", step.Position, err))
	}
	defer cancel()
	if step.Uses != "" {
		return s.use(ctx, alive, step)
	}
	return s.script(ctx, step)
}

func stepTimeout(ctx context.Context, step *current) (context.Context, context.CancelFunc, error) {
	d, err := workflow.Minutes(step.TimeoutMinutes, step.scope)
	if err != nil {
		return nil, nil, fmt.Errorf("timeout-minutes: %w", err)
	}
	if d == 0 {
		ctx, cancel := context.WithCancel(ctx)
		return ctx, cancel, nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, d, errStepTimeout)
	return ctx, cancel, nil
}

// endStep records how a step ended, for later conditions and for the provider.
func (s *steps) endStep(step *current, state providers.StepState, end ending) error {
	f := step.frame
	outcome := end.conclusion
	if outcome == providers.Failure {
		tolerated, err := workflow.Bool(step.ContinueOnError, step.scope)
		if err != nil {
			end.reason = errors.Join(end.reason, fmt.Errorf("continue-on-error: %w", err))
		}
		if tolerated {
			end.conclusion = providers.Success
			if s.failing != nil && s.failing.within(step) {
				s.failing = nil
			}
		} else if f.status == providers.Success {
			f.status, f.exit = providers.Failure, end.exit
		}
		if !tolerated && s.failing == nil {
			s.failing = step
		}
	}
	outputs := map[string]any{}
	for k, v := range end.outputs {
		outputs[k] = v
	}
	f.done[step.ID] = map[string]any{
		"outcome": string(outcome), "conclusion": string(end.conclusion), "outputs": outputs,
	}
	if end.reason != nil {
		s.out.notice(step.index, fmt.Sprintf("step %s: %v", s.title(step), end.reason))
	}
	if f.outer != nil {
		return nil
	}
	state.Name, state.Ended = s.title(step), time.Now()
	state.Conclusion, state.ExitCode = end.conclusion, end.exit
	if err := s.out.step(state); err != nil {
		return fmt.Errorf("log: %w", err)
	}
	return nil
}

// result is how the job ended once all its steps did.
func (s *steps) result() (providers.Result, error) {
	r := providers.Result{Conclusion: providers.Success, Outputs: map[string]string{}}
	scope := s.scope(s.root, nil)
	if s.root.status == providers.Failure {
		tolerated, err := workflow.Bool(s.job.ContinueOnError, scope)
		if err != nil {
			return r, fmt.Errorf("continue-on-error: %w", err)
		}
		if tolerated {
			s.out.notice(-1, "the job failed; continue-on-error has it reported as a success")
		} else {
			r.Conclusion = providers.Failure
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.job.Outputs)) {
		v, err := workflow.Interpolate(s.job.Outputs[name], scope)
		if err != nil {
			return r, fmt.Errorf("output %s: %w", name, err)
		}
		r.Outputs[name] = s.out.hide(v)
	}
	return r, nil
}

// title is what a step is called: by itself, or by what it does.
func (s *steps) title(step *current) string {
	name, _, _ := strings.Cut("Run "+cmp.Or(step.Uses, step.Run), "\n")
	if step.Name != "" {
		name = step.Name
	}
	if evaluated, err := workflow.Interpolate(name, step.scope); err == nil {
		name = evaluated
	}
	return s.out.hide(name)
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
