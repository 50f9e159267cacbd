package runner

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
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
	box      sandbox.Sandbox
	plan     policy.Plan
	deadline time.Time

	leases    map[string]creds.Lease // held now, by name
	env       map[string]string      // the job's own, and what steps wrote to GITHUB_ENV
	path      []string               // what steps wrote to GITHUB_PATH, last first
	blank     map[string]bool        // command files that the last step left empty
	done      map[string]any         // the context "steps"
	status    providers.Conclusion
	failing   *current  // the first step that failed and was not tolerated
	graceEnds time.Time // of the steps that run after a cancellation
}

// A current is the step that runs now.
type current struct {
	providers.Step
	index   int
	started time.Time
	env     map[string]string // of the step alone
	scope   workflow.Scope
}

// run runs the job's steps in order and returns how the job ended.
func (s *steps) run(ctx, alive context.Context) (providers.Result, error) {
	s.env, s.done, s.status = map[string]string{}, map[string]any{}, providers.Success
	env, err := interpolateAll(s.job.Env, s.scope(nil))
	if err != nil {
		return providers.Result{}, fmt.Errorf("%w: %w", providers.ErrBadJob, err)
	}
	s.env = env
	for i, step := range s.job.Steps {
		stepCtx, cancel := s.stepContext(ctx, alive)
		err := s.runStep(stepCtx, &current{Step: step, index: i, started: time.Now()})
		cancel()
		if err == nil {
			err = s.stopEarly(ctx, alive)
		}
		if err != nil {
			return providers.Result{}, err
		}
	}
	if err := context.Cause(ctx); err != nil {
		return providers.Result{}, err
	}
	return s.result()
}

// stepContext is the job's own context, except that after a cancellation by the
// provider the remaining steps get a bounded time of their own, while the agent
// is alive.
func (s *steps) stepContext(ctx, alive context.Context) (context.Context, context.CancelFunc) {
	if !errors.Is(context.Cause(ctx), providers.ErrCancelled) {
		return context.WithCancel(ctx)
	}
	if s.status != providers.Cancelled {
		s.status = providers.Cancelled
		s.graceEnds = time.Now().Add(cancelGrace)
	}
	return context.WithDeadlineCause(alive, earlier(s.graceEnds, s.deadline), ErrDeadline)
}

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
func (s *steps) runStep(ctx context.Context, step *current) error {
	runs, err := s.prepare(step)
	if err != nil {
		return s.endStep(step, failed(fmt.Errorf("%s: %w", step.Position, err)))
	}
	if !runs {
		return s.endStep(step, ending{conclusion: providers.Skipped})
	}
	state := providers.StepState{Index: step.index, Name: s.title(step), Started: step.started}
	if err := s.out.step(state); err != nil {
		return fmt.Errorf("log: %w", err)
	}
	end, err := s.inScope(ctx, step)
	return errors.Join(err, s.out.flush(), s.endStep(step, end))
}

// prepare evaluates the environment and the condition of a step.
func (s *steps) prepare(step *current) (runs bool, err error) {
	step.scope = s.scope(nil)
	if step.env, err = interpolateAll(step.Env, step.scope); err != nil {
		return false, err
	}
	step.scope = s.scope(step.env)
	runs, err = workflow.Condition(step.If, step.scope)
	if err != nil {
		return false, fmt.Errorf("if: %w", err)
	}
	return runs, nil
}

func interpolateAll(templates map[string]string, scope workflow.Scope) (map[string]string, error) {
	values := map[string]string{}
	for _, k := range slices.Sorted(maps.Keys(templates)) {
		v, err := workflow.Interpolate(templates[k], scope)
		if err != nil {
			return nil, fmt.Errorf("env %s: %w", k, err)
		}
		values[k] = v
	}
	return values, nil
}

// inScope holds what is bound to the step while it runs, and releases it before
// the next one starts.
func (s *steps) inScope(ctx context.Context, step *current) (ending, error) {
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
	end := s.exec(ctx, step)
	if errors.Is(end.reason, sandbox.ErrDied) {
		return end, end.reason // no step can go on, tolerated or not
	}
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

// exec runs the step's command.
func (s *steps) exec(ctx context.Context, step *current) ending {
	p, script, err := s.process(step)
	if err != nil {
		return failed(fmt.Errorf("%s: %w", step.Position, err))
	}
	ctx, cancel, err := stepTimeout(ctx, step)
	if err != nil {
		return failed(fmt.Errorf("%s: %w", step.Position, err))
	}
	defer cancel()
	if err := s.putCommandFiles(ctx, script); err != nil {
		return failed(err)
	}
	p.Stdout = func(at time.Time, b []byte) error { return s.out.write(at, step.index, b) }
	p.Stderr = p.Stdout
	exit, err := s.box.Run(ctx, p)
	s.clock.mark("-step-" + step.ID)
	end := ending{conclusion: providers.Success, exit: exit.Code}
	switch {
	case errors.Is(err, errStepTimeout):
		return ending{conclusion: providers.Failure, exit: exit.Code, reason: err}
	case err != nil:
		return ending{conclusion: providers.Failure, exit: exit.Code, reason: err}
	case exit.OOM:
		end.conclusion, end.reason = providers.Failure, errors.New("killed: out of memory: the plan's limit was reached; raise limits.memory in the policy")
	case exit.Code != 0:
		end.conclusion, end.reason = providers.Failure, fmt.Errorf("exit status %d", exit.Code)
	}
	outputs, err := s.readCommandFiles(ctx)
	end.outputs = outputs
	if err != nil && end.conclusion == providers.Success {
		end.conclusion, end.reason = providers.Failure, err
	}
	return end
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
func (s *steps) endStep(step *current, end ending) error {
	outcome := end.conclusion
	if outcome == providers.Failure {
		tolerated, err := workflow.Bool(step.ContinueOnError, step.scope)
		if err != nil {
			end.reason = errors.Join(end.reason, fmt.Errorf("continue-on-error: %w", err))
		}
		if tolerated {
			end.conclusion = providers.Success
		} else if s.status == providers.Success {
			s.status = providers.Failure
		}
		if !tolerated && s.failing == nil {
			s.failing = step
		}
	}
	outputs := map[string]any{}
	for k, v := range end.outputs {
		outputs[k] = v
	}
	s.done[step.ID] = map[string]any{
		"outcome": string(outcome), "conclusion": string(end.conclusion), "outputs": outputs,
	}
	if end.reason != nil {
		s.out.notice(step.index, fmt.Sprintf("step %s: %v", s.title(step), end.reason))
	}
	err := s.out.step(providers.StepState{
		Index: step.index, Name: s.title(step), Started: step.started, Ended: time.Now(),
		Conclusion: end.conclusion, ExitCode: end.exit,
	})
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	return nil
}

// result is how the job ended once all its steps did.
func (s *steps) result() (providers.Result, error) {
	r := providers.Result{Conclusion: providers.Success, Outputs: map[string]string{}}
	if s.status == providers.Failure {
		r.Conclusion = providers.Failure
	}
	for _, name := range slices.Sorted(maps.Keys(s.job.Outputs)) {
		v, err := workflow.Interpolate(s.job.Outputs[name], s.scope(nil))
		if err != nil {
			return r, fmt.Errorf("output %s: %w", name, err)
		}
		r.Outputs[name] = s.out.hide(v)
	}
	return r, nil
}

// scope is what expressions can see: in a step, its own environment too.
func (s *steps) scope(stepEnv map[string]string) workflow.Scope {
	c := maps.Clone(s.job.Contexts)
	if c == nil {
		c = map[string]any{}
	}
	secrets, env := map[string]any{}, map[string]any{}
	for k, v := range s.job.Secrets {
		secrets[k] = v
	}
	for _, layer := range []map[string]string{s.env, stepEnv} {
		for k, v := range layer {
			env[k] = v
		}
	}
	if github, ok := c["github"].(map[string]any); ok {
		github = maps.Clone(github)
		github["workspace"] = sandbox.Workspace
		c["github"] = github
	}
	c["secrets"], c["env"], c["steps"] = secrets, env, s.done
	c["job"] = map[string]any{"status": string(s.status)}
	c["runner"] = map[string]any{"os": "Linux", "temp": tempDir, "environment": "self-hosted"}
	return workflow.Scope{Contexts: c, Status: s.status}
}

func (s *steps) title(step *current) string {
	if step.Name == "" {
		line, _, _ := strings.Cut(step.Run, "\n")
		return "Run " + s.out.hide(line)
	}
	name, err := workflow.Interpolate(step.Name, step.scope)
	if err != nil {
		return step.Name
	}
	return s.out.hide(name)
}

// shells maps the shell of a step to its command line, as GitHub documents it.
// {0} is the script.
func shell(name string) ([]string, error) {
	switch name {
	case "":
		return []string{"bash", "-e", "{0}"}, nil
	case "bash":
		return []string{"bash", "--noprofile", "--norc", "-eo", "pipefail", "{0}"}, nil
	case "sh":
		return []string{"sh", "-e", "{0}"}, nil
	case "python":
		return []string{"python3", "{0}"}, nil
	}
	args := strings.Fields(name)
	if !slices.Contains(args, "{0}") {
		return nil, fmt.Errorf("shell %q: a custom shell needs {0} where the script goes", name)
	}
	return args, nil
}

// process is the command of a step and the script that it runs.
func (s *steps) process(step *current) (sandbox.Process, string, error) {
	script, err := workflow.Interpolate(step.Run, step.scope)
	if err != nil {
		return sandbox.Process{}, "", fmt.Errorf("run: %w", err)
	}
	dir, err := workflow.Interpolate(step.Dir, step.scope)
	if err != nil {
		return sandbox.Process{}, "", fmt.Errorf("working-directory: %w", err)
	}
	if !path.IsAbs(dir) {
		dir = path.Join(sandbox.Workspace, dir)
	}
	args, err := shell(step.Shell)
	if err != nil {
		return sandbox.Process{}, "", err
	}
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "{0}", scriptFile)
	}
	return sandbox.Process{Args: args, Env: s.environment(step), Dir: dir}, script, nil
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
