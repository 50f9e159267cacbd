package runner

import (
	"strconv"
	"strings"

	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// Every name of what a job holds begins with the job's own, so that the reaper
// can tell whose it is, and no handle is needed to find it again. A warm box
// keeps the name that it was made with; which job has it, the journal says.
const (
	jobPrefix  = "mf-"
	poolPrefix = "pool-"
)

func newJobName() string  { return jobPrefix + newID() }
func newPoolName() string { return poolPrefix + newID() }

// isWarm reports whether a log is that of a warm box, and of no job.
func isWarm(log string) bool { return strings.HasPrefix(log, poolPrefix) }

// recovers is what the audit calls the recovery of a log.
func recovers(log string) string {
	if isWarm(log) {
		return "box.recover"
	}
	return "job.recover"
}

// jobOf is the log, of a job or of a warm box, that a name was derived from: it
// is a prefix, and an id, which has no hyphen.
func jobOf(name string) string {
	prefix, rest, _ := strings.Cut(name, "-")
	id, _, _ := strings.Cut(rest, "-")
	if id == "" {
		return name
	}
	return prefix + "-" + id
}

func gatewayName(job string) string           { return job + "-gw" }
func boxName(job string) string               { return job + "-box" }
func serviceBox(job string, i int) string     { return job + "-s" + strconv.Itoa(i) }
func serviceGateway(job string, i int) string { return serviceBox(job, i) + "-gw" }
func rulesName(job string, step int) string   { return job + "-r" + strconv.Itoa(step) }

func leaseName(job string, l policy.Lease, turn int) string {
	return job + "-l" + turned(turn) + "-" + l.Name
}

func brokerName(job string, l policy.Lease, turn int) string {
	return job + "-i" + turned(turn) + "-" + l.Name
}

// stepRules are the egress rules of one step, or of the whole job for "".
func stepRules(plan policy.Plan, step string) []egress.Rule {
	var rules []egress.Rule
	for _, e := range plan.Egress {
		if e.Step == step && e.Service == "" {
			rules = append(rules, e.Rule)
		}
	}
	return rules
}

// serviceRules are the egress rules of one service. Keys of services differ in
// more than case.
func serviceRules(plan policy.Plan, service string) []egress.Rule {
	var rules []egress.Rule
	for _, e := range plan.Egress {
		if e.Service != "" && strings.EqualFold(e.Service, service) {
			rules = append(rules, e.Rule)
		}
	}
	return rules
}

// useName is what the ledger calls the lease of which a credential was used.
func useName(l policy.Lease, turn int) string {
	if turn == 0 {
		return l.Name
	}
	return l.Name + "#" + strconv.Itoa(turn)
}
