package policy

import (
	"fmt"
	"slices"
	"strings"

	"github.com/mayfly-ci/mayfly/configs/strict"
	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
)

// A Case is one test of a policy: a job, and what is to become of it.
type Case struct {
	Name string
	At   string // "policy-test.yaml:12"
	// Narrow names the repository's file that takes from the plan, "" for none, as
	// the file of cases spells it. Try gets what is in it.
	Narrow string

	node caseNode
}

// casesFile is a file of tests.
type casesFile struct {
	Version int        `yaml:"version,required"`
	Cases   []caseNode `yaml:"cases,required"`
}

// caseNode is one of them. What is listed has to be granted just so; what stands
// below "not" may not be granted in any way.
type caseNode struct {
	Self   strict.Node `yaml:",self"`
	Name   purpose     `yaml:"name,required"`
	Job    caseJobNode `yaml:"job,required"`
	Narrow string      `yaml:"narrow"`
	Denied bool        `yaml:"denied"`
	Rule   ruleName    `yaml:"rule"`
	Only   bool        `yaml:"only"`
	Grants grantsNode  `yaml:",inline"`
	Not    grantsNode  `yaml:"not"`
}

type grantsNode struct {
	Leases []wantLease `yaml:"leases"`
	Egress []wantWay   `yaml:"egress"`
}

type wantLease struct {
	Self strict.Node `yaml:",self"`
	Name leaseName   `yaml:"name,required"`
	Step stepID      `yaml:"step"`
	// Of these only what is said is compared.
	Uses     requestNumber      `yaml:"uses"`
	Requires *[]requirementKind `yaml:"requires"`
}

type wantWay struct {
	Self     strict.Node `yaml:",self"`
	Name     host        `yaml:"name,required"`
	Port     port        `yaml:"port,required"`
	Protocol protocol    `yaml:"protocol"`
	Step     stepID      `yaml:"step"`
	Service  serviceID   `yaml:"service"`
}

// caseJobNode has the facts that "policy explain --job" reads.
type caseJobNode struct {
	Self       strict.Node `yaml:",self"`
	Provider   string      `yaml:"provider"`
	Repository string      `yaml:"repository"`
	Ref        string      `yaml:"ref"`
	SHA        string      `yaml:"sha"`
	Workflow   string      `yaml:"workflow"`
	Event      string      `yaml:"event"`
	Job        string      `yaml:"job"`
	Actor      string      `yaml:"actor"`
	Trust      tier        `yaml:"trust,required"`
	Released   string      `yaml:"environment"`
	Steps      *[]stepID   `yaml:"steps"`
}

// ParseCases reads a file of tests. file is its name, for positions. Every
// problem is reported, each as file:line:column, joined into one error.
func ParseCases(src []byte, file string) ([]Case, error) {
	root, err := strict.Parse(src, file)
	if err != nil {
		return nil, err
	}
	var f casesFile
	if err := root.Get("version").Decode(&f.Version); err == nil && f.Version != Version {
		return nil, root.At("version").Errorf("version %d is not supported: this agent reads version: %d", f.Version, Version)
	}
	errs := []error{root.Decode(&f)}
	if len(f.Cases) == 0 && errs[0] == nil {
		errs = append(errs, root.At("cases").Errorf("no cases: nothing would be tested"))
	}
	names := map[purpose]strict.Pos{}
	var all []Case
	for _, n := range f.Cases {
		if first, seen := names[n.Name]; seen && n.Name != "" {
			errs = append(errs, n.Self.At("name").Errorf("a case of this name is already at %s", first))
		}
		names[n.Name] = n.Self.Pos()
		errs = append(errs, n.check())
		all = append(all, Case{Name: string(n.Name), At: at(n.Self), Narrow: n.Narrow, node: n})
	}
	if err := strict.Join(errs...); err != nil {
		return nil, err
	}
	return all, nil
}

// check refuses a case that could not fail, or not pass.
func (n caseNode) check() error {
	has := func(key string) bool { return !n.Self.Get(key).IsZero() }
	var errs []error
	for _, key := range []string{"denied", "only"} {
		if has(key) && n.Self.Get(key).Text() == "false" {
			errs = append(errs, n.Self.At(key).Errorf("%s: false says nothing: remove it", key))
		}
	}
	if !has("denied") && !has("rule") {
		errs = append(errs, n.Self.Errorf("nothing is expected: say rule: NAME, or denied: true"))
	}
	for _, key := range []string{"rule", "only", "leases", "egress", "not"} {
		if has("denied") && has(key) {
			errs = append(errs, n.Self.At(key).Errorf("who is denied gets no rule and no grants: remove %s, or denied", key))
		}
	}
	if has("not") && len(n.Not.Leases)+len(n.Not.Egress) == 0 {
		errs = append(errs, n.Self.At("not").Errorf("nothing is named: add leases or egress"))
	}
	for _, key := range []string{"leases", "egress"} {
		if has(key) && len(n.Self.Get(key).Items()) == 0 {
			errs = append(errs, n.Self.At(key).Errorf("an empty list expects nothing: say only: true where nothing but what is listed may be granted"))
		}
	}
	return strict.Join(errs...)
}

func (n caseJobNode) job() providers.Job {
	j := providers.Job{
		Subject: creds.Subject{
			Provider: n.Provider, Repository: n.Repository, Ref: n.Ref, SHA: n.SHA,
			Workflow: n.Workflow, Event: n.Event, Job: n.Job, Origin: creds.Origin{Environment: n.Released, Actor: n.Actor},
		},
		Trust: providers.Trust(n.Trust),
	}
	if n.Steps != nil {
		for _, id := range *n.Steps {
			j.Steps = append(j.Steps, providers.Step{ID: string(id)})
		}
	}
	return j
}

// A Verdict is how a case ended.
type Verdict struct {
	Name string `json:"name"`
	At   string `json:"at"`             // "policy-test.yaml:12"
	Rule string `json:"rule,omitempty"` // that decided, "policy.yaml:12 main-builds"; "" if none granted
	OK   bool   `json:"ok"`
	// Differences say what is not as the case wants: "- " is expected and not so,
	// "+ " is so and not expected.
	Differences []string `json:"differences,omitempty"`
}

// Try decides about the job of c and compares. narrow is what is in the file that
// c.Narrow names.
func (p *Policy) Try(c Case, narrow []byte) Verdict {
	v := Verdict{Name: c.Name, At: c.At}
	j := c.node.Job.job()
	plan, err := p.Decide(j)
	if err == nil && c.Narrow != "" {
		if !plan.Narrows {
			v.differ("- rule %s does not say narrow: true, so that no file of a repository counts", plan.Rule)
		} else {
			plan, err = plan.Narrow(narrow, c.Narrow)
		}
	}
	if err == nil {
		v.Rule = plan.Rule
	}
	switch want := string(c.node.Rule); {
	case c.node.Denied && err == nil:
		v.differ("- denied")
		v.differ("+ rule %s", plan.Rule)
	case c.node.Denied:
	case err != nil:
		v.differ("- rule %s%s", want, p.whyNot(want, j))
		v.differ("+ %s", strings.ReplaceAll(err.Error(), "\n", "; "))
	default:
		if nameOf(plan.Rule) != want {
			v.differ("- rule %s%s", want, p.whyNot(want, j))
			v.differ("+ rule %s", plan.Rule)
		}
		c.node.compare(&v, plan)
	}
	v.OK = len(v.Differences) == 0
	return v
}

func (v *Verdict) differ(format string, args ...any) {
	v.Differences = append(v.Differences, fmt.Sprintf(format, args...))
}

// nameOf is the name in "policy.yaml:12 main-builds".
func nameOf(rule string) string { return rule[strings.LastIndexByte(rule, ' ')+1:] }

// whyNot says why a rule did not decide.
func (p *Policy) whyNot(name string, j providers.Job) string {
	i := slices.IndexFunc(p.rules, func(r rule) bool { return nameOf(r.plan.Rule) == name })
	if i < 0 {
		return ", which the policy does not have"
	}
	var why []string
	mismatches, _ := p.rules[i].judge(j) // what could not be answered is among them
	for _, m := range mismatches {
		why = append(why, fmt.Sprintf("%s is %q, it wants %s", m.Field, m.Got, strings.Join(m.Want, " or ")))
	}
	if len(why) == 0 {
		return ""
	}
	return ": " + strings.Join(why, "; ")
}

// Rules are the names of all rules with their places, in the order of the file:
// "policy.yaml:12 main-builds".
func (p *Policy) Rules() []string {
	var all []string
	for _, r := range p.rules {
		all = append(all, r.plan.Rule)
	}
	return all
}
