package runner

import (
	"context"
	"errors"

	"github.com/mayfly-ci/mayfly/runner/policy"
)

// Reload puts a policy in force for every job that is admitted from now on;
// those that are admitted keep the plan that they have. bad is why there is no
// new policy: then the old one stays, which the audit says too. The error is
// bad, or why the change could not be written down and was not made.
func (a *Agent) Reload(ctx context.Context, next *policy.Policy, bad error) error {
	if bad == nil && next == nil {
		bad = errors.New("no policy")
	}
	old := a.rules.Load().Digest()
	kv := []string{"old", old}
	if bad == nil {
		kv = append(kv, "new", next.Digest())
	}
	if err := errors.Join(bad, a.audit(ctx, "", "policy.reload", "policy", bad, kv...)); err != nil {
		return err
	}
	a.rules.Store(next)
	for name := range a.cfg.Runtimes {
		a.pool.nudge(name) // its boxes may be of no use any more
	}
	return nil
}
