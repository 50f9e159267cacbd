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
	"encoding/json"
	"errors"
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
	Rule     string         `json:"rule"`      // "policy.yaml:12 main-builds"
	Digest   string         `json:"digest"`    // of the policy file
	Runtime  string         `json:"runtime"`   // "native"
	Timeout  time.Duration  `json:"timeout"`   // nanoseconds, never 0
	Limits   sandbox.Limits `json:"limits"`    // zero fields are the runtime's defaults
	LogBytes int64          `json:"log_bytes"` // cap of the job's log, never 0
	Egress   []Egress       `json:"egress"`    // empty: no way out
	Leases   []Lease        `json:"leases"`
}

// An Egress is a way out, for the whole job or for one step of it.
type Egress struct {
	// Step is the id of the step that may use it, "" for the whole job. A job
	// without that step never gets it.
	Step string      `json:"step,omitempty"`
	Rule egress.Rule `json:"rule"` // Rule.ID is "policy.yaml:19"
}

// A Lease is a credential to be minted for the job, or for one step of it.
type Lease struct {
	Name   string `json:"name"`   // [a-z][a-z0-9-]{0,15}, unique in the plan
	Issuer string `json:"issuer"` // name in the agent's configuration
	// Step is the id of the step that holds it, "" for the whole job. For a
	// job without that step nothing is minted.
	Step  string          `json:"step,omitempty"`
	TTL   time.Duration   `json:"ttl"`             // nanoseconds, at most the plan's Timeout
	Scope json.RawMessage `json:"scope,omitempty"` // the YAML section as JSON, nil if there is none
	// Env says which environment variable gets which value or fact of the
	// lease: PGPASSWORD → "password".
	Env map[string]string `json:"env,omitempty"`
	// Files says which file below /run/mayfly/secrets gets which value or fact.
	Files map[string]string `json:"files,omitempty"`
}

// A Policy is a parsed policy file. It never changes and is safe for
// concurrent use. The zero Policy has no rules and refuses every job.
type Policy struct {
	file   string
	digest string
}

// Parse reads a policy file. file is its name, for positions. Every problem of
// the file is reported, each as file:line:column, joined into one error.
func Parse(src []byte, file string) (*Policy, error) {
	return nil, errors.ErrUnsupported
}

// Nothing is the policy of "mayfly exec" without a policy file: a job started
// here by hand may run, with default limits, and gets nothing else.
func Nothing() *Policy { return &Policy{} }

// Digest names the exact text of the policy: "sha256:" and the hexadecimal
// SHA-256 of the file. It is written to the audit with every decision.
func (p *Policy) Digest() string { return p.digest }

// Decide returns what j may have. The error wraps ErrDenied if no rule matches.
func (p *Policy) Decide(j providers.Job) (Plan, error) {
	return Plan{}, ErrDenied
}

// Explain says how each rule judges j, and the plan that follows.
func (p *Policy) Explain(j providers.Job) Explanation { return Explanation{} }

// An Explanation is the way to a decision, for people.
type Explanation struct {
	Digest string  `json:"digest"`
	Trials []Trial `json:"trials"`         // every rule, in the order of the file
	Plan   *Plan   `json:"plan,omitempty"` // nil if the job is refused
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
