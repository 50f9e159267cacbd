package runner

import (
	"fmt"
	"strings"

	"github.com/mayfly-ci/mayfly/runner/policy"
)

// unmet is what a rule does not grant this job, for the record.
func unmet(plan policy.Plan) string {
	var all []string
	for _, u := range plan.Unmet {
		all = append(all, u.What+" ("+u.At+")")
	}
	return strings.Join(all, "; ")
}

// tellUnmet says the same to whoever reads the job's log.
func (l *life) tellUnmet(plan policy.Plan) {
	for _, u := range plan.Unmet {
		l.out.notice(0, fmt.Sprintf("not granted: %s: the condition at %s is false: %s", u.What, u.At, u.When))
	}
}
