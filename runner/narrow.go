package runner

import (
	"context"
	"fmt"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner/policy"
)

// narrowTimeout bounds how long a job waits for the file of its repository. A
// service answers in milliseconds; one that restarts is back in this time.
const narrowTimeout = time.Minute

// narrow takes from the plan what the job's repository says, where the rule asks
// for it. The file is that of the default branch, as the service has it, and never
// that of the job's own commit. Facts of it are for the audit.
func (l *life) narrow(ctx context.Context, plan policy.Plan) (_ policy.Plan, facts []string, err error) {
	if !plan.Narrows {
		return plan, nil, nil
	}
	denied := func(err error) (policy.Plan, []string, error) {
		return plan, facts, fmt.Errorf("%w: %s: narrow: %w", policy.ErrDenied, plan.Rule, err)
	}
	reader, ok := l.provider.(providers.Reader)
	if !ok {
		return denied(fmt.Errorf("provider %s cannot read %s of a default branch", l.turn.provider, policy.NarrowFile))
	}
	ctx, cancel := context.WithTimeoutCause(ctx, narrowTimeout, fmt.Errorf("no answer within %v", narrowTimeout))
	defer cancel()
	f, err := reader.DefaultFile(ctx, l.job, policy.NarrowFile)
	facts = []string{"narrow_branch", f.Branch, "narrow_commit", f.Commit}
	switch {
	case err != nil:
		return denied(err)
	case !f.Present:
		return plan, facts, nil
	case !f.Protected:
		return denied(fmt.Errorf("%s is on branch %s, which is not protected, so that whoever pushes there decides: protect it", policy.NarrowFile, f.Branch))
	}
	narrowed, err := plan.Narrow(f.Content, policy.NarrowFile)
	if err != nil {
		return plan, facts, err
	}
	return narrowed, append(facts, "narrow", narrowed.Narrowed), nil
}
