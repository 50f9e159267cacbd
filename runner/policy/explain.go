package policy

import (
	"slices"

	"github.com/mayfly-ci/mayfly/providers"
)

// An Explanation is the way to a decision, for people.
type Explanation struct {
	Digest string  `json:"digest"`
	Trials []Trial `json:"trials"`         // every rule, in the order of the file
	Plan   *Plan   `json:"plan,omitempty"` // nil if the job is refused
	// Refused says why the rule that matches, or whose condition cannot be answered,
	// refuses the job; empty if there is none.
	Refused string `json:"refused,omitempty"`
	// AbsentSteps are steps that the plan names and the job does not have, so
	// that their grants are never held. A slip in either file ends up here.
	AbsentSteps []string `json:"absent_steps,omitempty"`
}

// A Trial is how one rule judged the job.
type Trial struct {
	Rule string `json:"rule"` // "policy.yaml:12 main-builds"
	// Matched says that every field matches. Only the first such rule counts.
	Matched bool `json:"matched"`
	// Mismatches are the fields that do not match.
	Mismatches []Mismatch `json:"mismatches,omitempty"`
}

// A Mismatch is a field of the job that a rule does not match.
type Mismatch struct {
	Field string   `json:"field"` // "ref"
	Got   string   `json:"got"`   // what the job has
	Want  []string `json:"want"`  // what the rule allows
}

// Explain says how each rule judges j, and the plan that follows.
func (p *Policy) Explain(j providers.Job) Explanation {
	e := Explanation{Digest: p.digest}
	decided := false
	for _, r := range p.rules {
		mismatches, err := r.judge(j)
		t := Trial{Rule: r.plan.Rule, Mismatches: mismatches, Matched: len(mismatches) == 0}
		e.Trials = append(e.Trials, t)
		decided = decided || t.Matched || err != nil
	}
	plan, err := p.Decide(j)
	switch {
	case err == nil:
		e.Plan = &plan
		e.AbsentSteps = absent(plan, j)
	case decided:
		e.Refused = err.Error()
	}
	return e
}

// judge says what of the rule the job does not match. The condition is asked only if
// all else does.
func (r rule) judge(j providers.Job) ([]Mismatch, error) {
	mismatches := r.match.mismatches(j)
	if len(mismatches) > 0 {
		return mismatches, nil
	}
	is, err := r.when.holds(j)
	if err != nil {
		return []Mismatch{{"when", err.Error(), []string{r.when.text}}}, err
	}
	if !is {
		return []Mismatch{{"when", "false", []string{r.when.text}}}, nil
	}
	return nil, nil
}

// mismatches is the only place that compares a rule with a job.
func (m match) mismatches(j providers.Job) []Mismatch {
	var out []Mismatch
	for _, f := range []struct {
		name string
		got  string
		want oneOf
	}{
		{"provider", j.Subject.Provider, m.Provider},
		{"repository", j.Subject.Repository, m.Repository},
		{"ref", j.Subject.Ref, m.Ref},
		{"event", j.Subject.Event, m.Event},
		{"workflow", j.Subject.Workflow, m.Workflow},
	} {
		if !f.want.match(f.got) {
			out = append(out, Mismatch{f.name, f.got, texts(f.want)})
		}
	}
	if !m.Trust.match(string(j.Trust)) {
		out = append(out, Mismatch{"trust", string(j.Trust), texts(m.Trust)})
	}
	return out
}

func absent(plan Plan, j providers.Job) []string {
	var steps []string
	add := func(step string) {
		has := slices.ContainsFunc(j.Steps, func(s providers.Step) bool { return s.ID == step })
		if step != "" && step != PullStep && !has && !slices.Contains(steps, step) {
			steps = append(steps, step)
		}
	}
	for _, e := range plan.Egress {
		add(e.Step)
	}
	for _, l := range plan.Leases {
		add(l.Step)
	}
	return steps
}
