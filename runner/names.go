package runner

import (
	"strconv"

	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// Every name of what a job holds begins with the job's own, so that the reaper
// can tell whose it is, and no handle is needed to find it again.
const (
	jobPrefix    = "mf-"
	jobNameBytes = len(jobPrefix) + 16
)

func newJobName() string { return jobPrefix + newID() }

func gatewayName(job string) string               { return job + "-gw" }
func boxName(job string) string                   { return job + "-box" }
func leaseName(job string, l policy.Lease) string { return job + "-l-" + l.Name }
func rulesName(job string, step int) string       { return job + "-r" + strconv.Itoa(step) }

// stepRules are the egress rules of one step, or of the whole job for "".
func stepRules(plan policy.Plan, step string) []egress.Rule {
	var rules []egress.Rule
	for _, e := range plan.Egress {
		if e.Step == step {
			rules = append(rules, e.Rule)
		}
	}
	return rules
}
