// Package policy decides what a job may have: a pure function of the policy
// file and the job. No clock, no network, no file is asked.
//
// A policy is a list of rules. The first rule that matches the job gives its
// [Plan]; if none matches, the job is refused and nothing is granted. A file
// that is not understood to the last key is an error and never a weaker policy.
//
// The package imports the contracts and configs/strict, the strict YAML
// decoding that it shares with the agent's configuration.
package policy

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// ErrDenied reports that no rule matches a job. Nothing is granted: the job is
// refused and the provider hears it.
var ErrDenied = errors.New("denied by policy")

// A Plan is what one job may have. Its maps and slices belong to the policy
// and must not be changed.
type Plan struct {
	Rule    string `json:"rule"`            // "policy.yaml:12 main-builds"
	Digest  string `json:"digest"`          // of the policy file
	Runtime string `json:"runtime"`         // name in the agent's configuration, "native" if the rule has none
	Image   string `json:"image,omitempty"` // of the box; "" is the runtime's own
	Pull    string `json:"pull,omitempty"`  // lease that the image is pulled with; "" is anonymously
	// Images are patterns of the images that the workflow may name for itself
	// and its services; empty is none. AllowImage asks them.
	Images  []string       `json:"images,omitempty"`
	Timeout time.Duration  `json:"timeout"` // nanoseconds, never 0
	Limits  sandbox.Limits `json:"limits"`  // zero fields are the runtime's defaults
	// Keep is how long the box of a failed job is kept; 0 is not at all.
	Keep     time.Duration `json:"keep_on_failure,omitempty"` // nanoseconds
	LogBytes int64         `json:"log_bytes"`                 // cap of the job's log, never 0
	Egress   []Egress      `json:"egress"`                    // empty: no way out
	Leases   []Lease       `json:"leases"`

	// Isolation is the wall of the box; "" is the machine's own kernel.
	Isolation sandbox.Isolation `json:"isolation,omitempty"`

	Options
}

// Options are the parts of a plan that few rules ask for.
type Options struct {
	// Narrows says that the job's repository may take from the plan (Narrow), and
	// Narrowed is the digest of the file that did.
	Narrows  bool   `json:"narrows,omitempty"`
	Narrowed string `json:"narrowed,omitempty"`
	// Mode is egress.ModeAudit for a job that may reach what no rule allows, where
	// the agent's configuration lets it; "" is enforcement.
	Mode string `json:"mode,omitempty"`
	// Token is what the job has of the token that the provider gave it.
	Token Delivery `json:"provider_token,omitempty"`
	// Unmet is what the rule would grant if its condition held for this job.
	Unmet []Unmet `json:"unmet,omitempty"`
}

// A Delivery is how a job gets a credential that the provider put into it.
type Delivery string

// Deliveries. "" is Brokered, but Clear for a job that reaches the provider in a
// way that the gateway does not see into.
const (
	Brokered Delivery = "brokered" // it has a placeholder, and the gateway the token
	Clear    Delivery = "clear"
	Withheld Delivery = "withheld" // it has nothing
)

// An Egress is a way out, for the whole job, for one step of it, or for one of
// its services.
type Egress struct {
	// Service is the name of the service that alone may use it, "" for the job.
	Service string `json:"service,omitempty"`
	// Step is the id of the step that may use it, "" for the whole job. A job
	// without that step never gets it.
	Step string      `json:"step,omitempty"`
	Rule egress.Rule `json:"rule"` // Rule.ID is "policy.yaml:19"

	when *condition
}

// A Lease is a credential to be minted for the job, or for one step of it.
type Lease struct {
	Name   string `json:"name"`   // [a-z][a-z0-9-]{0,15}, unique in the plan
	Issuer string `json:"issuer"` // name in the agent's configuration
	// Step is the id of the step that holds it, "" for the whole job, or
	// PullStep. For a job without that step nothing is minted.
	Step  string          `json:"step,omitempty"`
	TTL   time.Duration   `json:"ttl"`             // nanoseconds, at most the plan's Timeout
	Scope json.RawMessage `json:"scope,omitempty"` // the YAML section as JSON, nil if there is none
	// Env says which environment variable gets which value or fact of the
	// lease: PGPASSWORD → "password".
	Env map[string]string `json:"env,omitempty"`
	// Files says which file below /run/mayfly/secrets gets which value or fact.
	Files map[string]string `json:"files,omitempty"`
	// Broker are the ways out on which the gateway adds values of the lease. Env
	// and Files get placeholders of these values, but for those that Clear names.
	Broker []Broker `json:"broker,omitempty"`
	Clear  []string `json:"clear,omitempty"`
	// Uses is how many requests or logins may have a brokered value, counted over
	// all of Broker; 0 is any number.
	Uses int `json:"uses,omitempty"`
	// Requires is what must be so before it is asked for; nil is nothing.
	Requires *Requires `json:"requires,omitempty"`
	// Tools are programs that find what the lease gives by asking as they always do.
	Tools []Tool `json:"tools,omitempty"`

	when *condition
}

// InClear are the values and facts that the job itself gets, without those that
// the gateway adds for it.
func (l Lease) InClear() []string {
	var open []string
	for _, field := range slices.Concat(slices.Collect(maps.Values(l.Env)), slices.Collect(maps.Values(l.Files)), l.toolFields()) {
		brokered := slices.ContainsFunc(l.Broker, func(b Broker) bool { return slices.Contains(b.Fields(), field) })
		if !brokered || slices.Contains(l.Clear, field) {
			open = append(open, field)
		}
	}
	slices.Sort(open)
	return slices.Compact(open)
}

// PullStep stands in the place of a step for a lease that an image is pulled
// with: it is held before there is a box, released when the pull is over, and no
// step has that id.
const PullStep = "(pull)"

// What a rule gets that does not say otherwise.
const (
	// DefaultTimeout is GitHub's habit cut down to what a build needs: a job
	// that hangs holds its leases for an hour and not for six.
	DefaultTimeout = time.Hour
	// DefaultLogBytes is more than any person reads and less than a flood.
	DefaultLogBytes = 256 << 20

	defaultRuntime = "native"
)

// A Policy is a parsed policy file. It never changes and is safe for
// concurrent use. The zero Policy has no rules and refuses every job.
type Policy struct {
	file   string
	digest string
	rules  []rule
}

// A rule is what jobs it matches and the plan that they get.
type rule struct {
	match match
	when  *condition
	plan  Plan // as the rule says, before the job's own wishes
}

// Parse reads a policy file. file is its name, for positions. Every problem of
// the file is reported, each as file:line:column, joined into one error.
func Parse(src []byte, file string) (*Policy, error) {
	rules, err := decode(src, file)
	if err != nil {
		return nil, err
	}
	p := &Policy{file: file, digest: fmt.Sprintf("sha256:%x", sha256.Sum256(src)), rules: rules}
	for i := range p.rules {
		p.rules[i].plan.Digest = p.digest
	}
	return p, nil
}

// nothing is a policy file, so that the built-in policy means what it would
// mean if somebody wrote it, and has a digest that can be checked.
const nothing = `version: 1
rules:
  - name: nothing
    match: {provider: local, trust: local}
`

// Nothing is the policy of "mayfly exec" without a policy file: a job that was
// started here by hand may run, with default limits, and gets nothing else.
func Nothing() *Policy {
	p, err := Parse([]byte(nothing), "built-in")
	if err != nil {
		return &Policy{file: "built-in"} // refuses every job; a test parses the text
	}
	return p
}

// Digest names the exact text of the policy: "sha256:" and the hexadecimal
// SHA-256 of the file. It is written to the audit with every decision.
func (p *Policy) Digest() string { return p.digest }

// Decide returns what j may have. The error wraps ErrDenied if no rule matches,
// if a condition on the way cannot be answered, or if a fact of the job that the
// rule puts into a path is not safe there.
//
// A grant for a step that j does not have stays in the plan and is never
// held, since that step never starts; Explain names such steps.
func (p *Policy) Decide(j providers.Job) (Plan, error) {
	for _, r := range p.rules {
		switch mismatches, err := r.judge(j); {
		case err != nil:
			return Plan{}, err
		case len(mismatches) == 0:
			return r.grant(j)
		}
	}
	s := j.Subject
	return Plan{}, fmt.Errorf("%w: no rule of %s matches provider %q, repository %q, ref %q, event %q, workflow %q, trust %q",
		ErrDenied, orDefault(p.file, "an empty policy"), s.Provider, s.Repository, s.Ref, s.Event, s.Workflow, j.Trust)
}

// grant is the plan of the rule for one job, with the job's facts in it.
func (r rule) grant(j providers.Job) (Plan, error) {
	plan := r.offer(j)
	if err := plan.ask(j); err != nil {
		return Plan{}, err
	}
	var errs []error
	for i, e := range plan.Egress {
		filled, err := fill(e.Rule, j)
		plan.Egress[i].Rule = filled
		errs = append(errs, err)
	}
	for i, l := range plan.Leases {
		filled, err := fillBrokers(l, j)
		requires, rerr := l.Requires.fill(j)
		filled.Requires = requires
		plan.Leases[i] = filled
		errs = append(errs, err, rerr)
	}
	if err := errors.Join(errs...); err != nil {
		return Plan{}, err
	}
	return plan, nil
}

// offer is the plan of the rule for one job, which may ask for less time.
func (r rule) offer(j providers.Job) Plan {
	plan := r.plan
	if j.Timeout > 0 {
		plan.Timeout = min(plan.Timeout, j.Timeout)
	}
	plan.Egress = slices.Clone(plan.Egress)
	plan.Leases = slices.Clone(plan.Leases)
	for i := range plan.Leases {
		l := &plan.Leases[i]
		l.TTL = min(orDefault(l.TTL, plan.Timeout), plan.Timeout)
	}
	return plan
}

// A Grant is what some rule lets jobs ask of an issuer. The command that checks
// a configuration asks the issuers about all of them.
type Grant struct {
	Rule   string // "policy.yaml:12 main-builds"
	Lease  string
	Issuer string
	Scope  json.RawMessage
	Clear  []string      // Lease.InClear
	Lasts  time.Duration // at most, for a job that asks for no less time
	Asks   bool          // the issuer must be one that is asked (creds.Asker)
}

// Grants returns every lease of every rule, in the order of the file.
func (p *Policy) Grants() []Grant {
	var gs []Grant
	for _, r := range p.rules {
		for _, l := range r.offer(providers.Job{}).Leases {
			gs = append(gs, Grant{r.plan.Rule, l.Name, l.Issuer, l.Scope, l.InClear(), l.TTL, l.Has(GitHubOIDC)})
		}
	}
	return gs
}

// A Place is where some rule lets jobs run. The command that checks a
// configuration looks whether it has all of them.
type Place struct {
	Rule    string // "policy.yaml:12 main-builds"
	Runtime string
	Image   string
	Keeps   bool // the box of a failed job
	Learns  bool // mode: audit

	Isolation sandbox.Isolation
}

// Places returns the runtime and the image of every rule, in the order of the
// file.
func (p *Policy) Places() []Place {
	var ps []Place
	for _, r := range p.rules {
		ps = append(ps, Place{r.plan.Rule, r.plan.Runtime, r.plan.Image, r.plan.Keep > 0, r.plan.Mode != "", r.plan.Isolation})
	}
	return ps
}

// Plans returns the plan of every rule, in the order of the file, as it is for a
// job that asks for nothing less: boxes can be made of it before there is one.
func (p *Policy) Plans() []Plan {
	var plans []Plan
	for _, r := range p.rules {
		plans = append(plans, r.offer(providers.Job{}))
	}
	return plans
}
