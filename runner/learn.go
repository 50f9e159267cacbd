package runner

import (
	"fmt"
	"net/netip"

	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// Learning is for which jobs the operator lets a rule of the policy say mode:
// audit. The zero value is for none. Whoever writes the policy cannot open the
// wall alone, and neither can whoever writes the configuration.
type Learning struct {
	Allows  func(repository string) bool // nil: no job
	Private []netip.Prefix               // what such jobs may reach beside public addresses
}

// permitted refuses a job whose rule has it learn where the operator does not: it
// neither learns nor runs under rules that are known to be unfinished.
func (l *life) permitted(plan policy.Plan) error {
	if plan.Mode == "" {
		return nil
	}
	l.mu.Lock()
	l.learning[l.log.Job] = true
	l.mu.Unlock()
	repository := l.job.Subject.Repository
	if allows := l.cfg.Learn.Allows; allows == nil || !allows(repository) {
		return fmt.Errorf("%w: %s: mode %s: the configuration of this agent does not let jobs of %s learn (gateway: learn: repositories)",
			policy.ErrDenied, plan.Rule, plan.Mode, repository)
	}
	return nil
}

// learns says whether what is done for a job has to be marked.
func (a *Agent) learns(job string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.learning[job]
}

// opened is how far the gateway of the job lets it go beyond its rules, which
// its log says.
func (l *life) opened(plan policy.Plan) *egress.Learning {
	if plan.Mode == "" {
		return nil
	}
	l.out.notice(0, "mode "+plan.Mode+": this job may reach names that no rule allows, and each is written down; mayfly policy suggest "+
		l.log.Job+" makes rules of them")
	return &egress.Learning{Private: l.cfg.Learn.Private}
}
