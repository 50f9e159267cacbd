package runner

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/runner/internal/failpoint"
	"github.com/mayfly-ci/mayfly/runner/internal/journal"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// The life of a job. Windows nest, and each is closed in reverse:
//
//	claim ─┬─ admit (policy; holds nothing), and its repository's turn
//	       ├─ plan intent: the names of all that follows, in one write
//	       ├─ pull of the image, with a lease of its own
//	       ├─ for each service: gateway, box, its process
//	       └─ gateway ─┬
//	                   └─ box ── attach, attest ─┬      (a warm one: pool.go)
//	                                             └─ leases ─┬
//	                                                        └─ step: rules, leases, run
//	released:  step's leases and rules, before the next step
//	           leases (refused at their issuer) → box → gateway → services → claim (= report)
//	kept:      the box of a failed job, if its plan says so, until its time is over
//
// Everything is named and written down before it is made, and destroyable from
// that name alone. So one function, release, is the only cleanup there is: it
// serves the end of a step, the end of a job, failure, cancellation and the
// restart after a crash.

// What a job holds, in the order it acquires them.
const (
	kindClaim   = "claim"
	kindGateway = "gateway"
	kindBox     = "box"
	kindLease   = "lease"
	kindRules   = "rules" // egress rules of one step, or of a lease
)

// live takes one offer through its life, from the claim to the report. It
// returns when nothing of the job is left, or when ctx, which outlives the
// job's own context, ends. If all that is left is a box that is kept, parted is
// called first.
func (a *Agent) live(ctx context.Context, t *turn, offer providers.Offer, claimed, parted func()) error {
	defer claimed()
	name := newJobName()
	log, err := a.state.journal.Begin(name, journal.Debt{Kind: kindClaim, Name: name, By: t.provider})
	if err != nil {
		return err
	}
	defer a.enlist(name)()
	ctx = audit.WithJob(ctx, name)

	l := &life{Agent: a, log: log, provider: a.cfg.Providers[t.provider], turn: t, clock: newStopwatch()}
	defer l.unmounted()
	job, err := hold(ctx, l, name, func(ctx context.Context) (providers.Job, grip, error) {
		job, err := l.provider.Claim(ctx, name, offer)
		return job, grip{job.Ref, job.ByName}, err
	})
	claimed()
	if errors.Is(err, providers.ErrGone) {
		return errors.Join(log.Release(name), log.Close())
	}
	l.job = job
	l.out = l.openLog(ctx)

	jobCtx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := a.watch(jobCtx, cancel, log)
	defer stop()

	var result providers.Result
	if err == nil {
		result, err = l.run(jobCtx, ctx)
	}
	if err != nil {
		result = conclude(jobCtx, err)
	}
	l.setOutcome(result)
	if k := l.keep(ctx, result, func() { stop(); parted() }); k != nil {
		defer close(k.gone)
	}
	return a.settle(ctx, log, l.out)
}

// run admits the job and gives it the time that its plan allows. The agent's own
// context, alive, is for what still runs after the provider cancelled the job.
func (l *life) run(ctx, alive context.Context) (providers.Result, error) {
	plan, err := l.admit(ctx)
	if err != nil {
		return providers.Result{}, err
	}
	l.clock.mark("admit")
	if err := l.queue(ctx); err != nil {
		return providers.Result{}, err
	}
	deadline := time.Now().Add(plan.Timeout)
	ctx, cancel := context.WithDeadlineCause(ctx, deadline, ErrDeadline)
	defer cancel()
	l.out.limit(plan.LogBytes)
	result, err := l.inBox(ctx, alive, plan, deadline)
	if err != nil {
		return providers.Result{}, errors.Join(err, context.Cause(ctx))
	}
	return result, nil
}

// inBox acquires what the plan grants and runs the job's steps.
func (l *life) inBox(ctx, alive context.Context, plan policy.Plan, deadline time.Time) (providers.Result, error) {
	plan, err := l.payload(ctx, plan)
	if err != nil {
		return providers.Result{}, err
	}
	l.take(ctx, plan, deadline)
	if err := l.intend(l.debts(plan, deadline)); err != nil {
		return providers.Result{}, err
	}
	l.clock.mark("intend")
	img, err := l.pullOwn(ctx, plan, deadline)
	if err != nil {
		return providers.Result{}, err
	}
	beside, stop := context.WithCancel(alive)
	defer l.stopServices(stop)
	if err := l.startServices(ctx, beside, plan, deadline); err != nil {
		return providers.Result{}, err
	}

	gateway := gatewayName(l.log.Job)
	_, err = hold(ctx, l, gateway, func(ctx context.Context) (none, grip, error) {
		rules, ports := l.reach(plan)
		rules = append(rules, stepRules(plan, "")...)
		return none{}, grip{}, l.cfg.Gateway.Open(ctx, gateway, egress.Opening{
			Rules: egress.Rules{Allow: rules}, Ledger: l.ledger, Publish: ports,
			Terminate: l.terminates(plan), Expires: l.expires(plan, deadline),
			Learn: l.opened(plan),
		})
	})
	if err != nil {
		return providers.Result{}, err
	}

	spec := l.spec(plan, img, deadline)
	l.cold = !l.warm.fits(plan.Runtime, spec)
	box, err := hold(ctx, l, l.box(), func(ctx context.Context) (sandbox.Sandbox, grip, error) {
		box, err := l.makeBox(ctx, plan.Runtime, spec)
		return box, grip{}, err
	})
	if err != nil {
		return providers.Result{}, err
	}
	sockets, err := box.Attach(ctx)
	if err == nil {
		err = l.cfg.Gateway.Attach(ctx, gateway, egress.Sockets(sockets))
	}
	if err != nil {
		return providers.Result{}, fmt.Errorf("attach: %w", err)
	}
	l.clock.mark("attach")
	if err := l.attest(ctx, l.box(), gateway, box, sockets, attestBefore); err != nil {
		return providers.Result{}, err
	}
	l.clock.mark("attest")
	if err := l.trust(ctx, box, &img, gateway, l.terminates(plan)); err != nil {
		return providers.Result{}, err
	}
	if err := l.introduce(ctx, box, &img, gateway, l.allRules(plan)); err != nil {
		return providers.Result{}, err
	}
	if err := l.awaitServices(ctx); err != nil {
		return providers.Result{}, err
	}

	l.steps = newSteps(l, box, img, plan, deadline)
	defer l.steps.leases.rest("")
	if err := l.steps.issue(ctx, ""); err != nil {
		return providers.Result{}, err
	}
	result, err := l.steps.run(ctx, alive)
	return result, errors.Join(err, l.attestEnd(alive, box, sockets))
}

// debts names all that the plan will acquire, in the order of acquisition.
func (l *life) debts(plan policy.Plan, deadline time.Time) []journal.Debt {
	job := l.log.Job
	ds := append(l.pullDebts(plan, deadline), l.serviceDebts(plan)...)
	ds = append(ds, journal.Debt{Kind: kindGateway, Name: gatewayName(job)},
		journal.Debt{Kind: kindBox, Name: boxName(job), By: plan.Runtime})
	if l.warm != nil {
		ds = append(ds, journal.Debt{Kind: kindBox, Name: l.warm.name, By: plan.Runtime})
	}
	for _, lease := range plan.Leases {
		if lease.Step == "" {
			ds = append(ds, leaseDebts(job, lease, 0, deadline)...)
		}
	}
	for i, step := range l.job.Steps {
		if len(stepRules(plan, step.ID)) > 0 {
			ds = append(ds, journal.Debt{Kind: kindRules, Name: rulesName(job, i), Scope: step.ID})
		}
		for _, lease := range plan.Leases {
			if lease.Step == step.ID {
				ds = append(ds, leaseDebts(job, lease, 0, deadline)...)
			}
		}
	}
	return ds
}

// A grip is what releases a thing beside its name.
type grip struct {
	handle []byte
	byName bool // the name is enough: the handle need not be durable
}

type none struct{}

// hold acquires a thing that the journal already names, and writes down that it
// did. It acquires nothing once ctx has ended or the journal has failed.
func hold[T any](ctx context.Context, l *life, name string, acquire func(context.Context) (T, grip, error)) (T, error) {
	v, err := acquired(ctx, l, name, acquire)
	l.clock.mark(l.stage(name))
	return v, err
}

// acquired is hold beside the stages of the job.
func acquired[T any](ctx context.Context, l *life, name string, acquire func(context.Context) (T, grip, error)) (T, error) {
	var zero T
	if err := context.Cause(ctx); err != nil {
		return zero, err
	}
	if err := l.log.Try(name); err != nil {
		return zero, err
	}
	v, g, err := acquire(ctx)
	failpoint.Here("acquired")
	if g.handle != nil {
		// Also of a thing that was acquired badly: it is released all the same.
		err = errors.Join(err, l.log.Held(name, g.handle, !g.byName))
	}
	if err != nil {
		return v, fmt.Errorf("%s: %w", name, err)
	}
	return v, nil
}

// release takes back what the log says may exist in scope, newest first; the
// scope "" is the whole job, steps included. One failure does not stop the
// rest; what cannot be released stays in the log. The claim is not touched
// while anything else is owed.
func (a *Agent) release(ctx context.Context, log *journal.Log, scope string, out *stream) error {
	return a.pay(ctx, log, func(d journal.Debt) bool { return scope == "" || d.Scope == scope }, out)
}

// pay is release of some of the debts.
func (a *Agent) pay(ctx context.Context, log *journal.Log, these func(journal.Debt) bool, out *stream) error {
	ctx, cancel := a.detached(ctx)
	defer cancel()
	var errs []error
	for _, d := range log.Debts() {
		if d.Kind == kindBox && a.kept.holdsBox(log.Job, d.Name) {
			continue
		}
		if !these(d) {
			continue
		}
		if d.Kind == kindClaim && len(errs) > 0 {
			break // the service must not hear the job is over while part of it is left
		}
		var err error
		if d.Tried {
			err = a.releaseOne(ctx, log, d, out)
			failpoint.Here("released." + d.Kind)
		}
		if err == nil {
			err = log.Release(d.Name)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("release %s: %w", d.Name, err))
		}
	}
	return errors.Join(errs...)
}

func (a *Agent) releaseOne(ctx context.Context, log *journal.Log, d journal.Debt, out *stream) error {
	switch d.Kind {
	case kindLease:
		return a.revoke(ctx, log, d)
	case kindBox:
		runtime, ok := a.cfg.Runtimes[d.By]
		if !ok {
			return fmt.Errorf("runtime %q is not configured any more: configure it until this box is gone", d.By)
		}
		return runtime.Destroy(ctx, d.Name)
	case kindGateway, kindRules:
		return a.cfg.Gateway.Close(ctx, d.Name)
	case kindClaim:
		return a.report(ctx, log, d, out, false)
	}
	return fmt.Errorf("unknown kind %q: written by another version", d.Kind)
}

// report tells the provider how the job ended, and so gives up the claim. It
// does so behind the last line of the log, unless it is late already.
func (a *Agent) report(ctx context.Context, log *journal.Log, d journal.Debt, out *stream, late bool) error {
	provider, ok := a.cfg.Providers[d.By]
	if !ok {
		return fmt.Errorf("provider %q is not configured any more: configure it until this job is reported", d.By)
	}
	result, err := outcome(log)
	if err != nil {
		return err
	}
	if err := a.tellKept(ctx, log, out); err != nil {
		return err
	}
	if err := a.closeLog(ctx, provider, d, out, result); err != nil && !late {
		return fmt.Errorf("log: %w", err)
	}
	err = a.audit(ctx, log.Job, "job.complete", d.Name, nil,
		"provider", d.By, "conclusion", string(result.Conclusion), "reason", result.Reason)
	if err != nil {
		return err
	}
	return provider.Complete(ctx, d.Name, d.Handle, result)
}
