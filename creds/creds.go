// Package creds defines credentials that live no longer than a job, or one
// step of it.
//
// It is the contract between the agent and the systems that mint credentials:
// an [Issuer] turns a [Grant] into a [Lease], takes the lease back, and proves
// that it is dead by using it and seeing it refused. Each kind of credential
// is a subpackage; all of them pass the suite in creds/credstest.
//
// The package imports the standard library only.
package creds

import (
	"context"
	"encoding/json"
	"errors"
	"time"
)

var (
	// ErrNotRevocable reports that the issuer cannot take a lease back without
	// a handle that nobody has, so that it ends only at its expiry. The agent
	// writes that down as "unprovable until" the expiry.
	ErrNotRevocable = errors.New("lease cannot be revoked before it expires")

	// ErrStillValid reports that a revoked lease was used and not refused.
	// The agent revokes and probes again until its bound.
	ErrStillValid = errors.New("lease still accepted by its provider")

	// ErrBadScope reports a scope that the issuer does not understand or that
	// asks for more than it may give. Nothing was issued.
	ErrBadScope = errors.New("scope refused by the issuer")
)

// A Subject says whom a lease is for. Issuers that can bind a credential to
// these facts do; all of them can put them where an auditor will find them. What
// is not known is "", and no issuer says so in the place of a fact.
type Subject struct {
	Provider   string `json:"provider"`
	Repository string `json:"repository"`
	Ref        string `json:"ref,omitempty"`
	SHA        string `json:"sha,omitempty"`
	Workflow   string `json:"workflow,omitempty"`
	Event      string `json:"event,omitempty"`
	Trust      string `json:"trust,omitempty"` // tier, as the policy saw it
	Job        string `json:"job"`             // its key in the workflow, the same in each run
	Step       string `json:"step,omitempty"`  // set if the lease is bound to one step
	Origin
}

// An Origin is what else is known of where a job comes from. A provider fills in
// what its service vouches for; ids outlive names, which can be given to others.
type Origin struct {
	RepositoryID string `json:"repository_id,omitempty"`
	OwnerID      string `json:"repository_owner_id,omitempty"`
	RunID        string `json:"run_id,omitempty"` // of all jobs that one event started
	RunNumber    string `json:"run_number,omitempty"`
	RunAttempt   string `json:"run_attempt,omitempty"`
	Actor        string `json:"actor,omitempty"` // who caused it, as the service says
	ActorID      string `json:"actor_id,omitempty"`
	HeadRef      string `json:"head_ref,omitempty"` // of a pull request, as BaseRef is
	BaseRef      string `json:"base_ref,omitempty"`
	Environment  string `json:"environment,omitempty"`  // that the service released the job for
	WorkflowRef  string `json:"workflow_ref,omitempty"` // owner/name/path@ref of the workflow's file
	WorkflowSHA  string `json:"workflow_sha,omitempty"` // of the commit that file is of

	// JobID is the agent's name of the job, unique for ever, and Policy the digest of
	// the policy that admitted it. The agent fills them in.
	JobID  string `json:"job_id,omitempty"`
	Policy string `json:"policy_digest,omitempty"`
}

// A Grant is what the policy lets a job have.
type Grant struct {
	Subject Subject
	// Scope is the issuer's own section of the policy, as JSON: for PostgreSQL
	// the privileges, for a cloud the role. Empty asks for nothing and gets it.
	Scope json.RawMessage
	// Expires is when the lease must be dead even if nobody revokes it. It is
	// never later than the deadline of the job. Issuers round down, never up.
	Expires time.Time
}

// A Lease is a credential minted for one job.
type Lease struct {
	// Values are the secret parts by name ("password"). Every one is masked in
	// the job's log.
	Values map[string]Secret
	// Facts are the parts that are no secret ("username", "host"). They are
	// not masked and may be written to the audit.
	Facts map[string]string
	// Handle is what Revoke and Probe need and cannot derive from the name.
	// The journal stores it sealed.
	Handle Handle
	// ByName says that Revoke needs nothing but the name, so that a handle
	// lost with the power costs a weaker proof and never a live credential.
	// The journal then saves the handle without waiting for the disk.
	ByName bool
	// Withheld says that no job may hold the values: the agent refuses a lease
	// that a policy would give to one otherwise than by its gateway.
	Withheld bool
	// ExpiresAt is when the provider ends the lease by itself.
	ExpiresAt time.Time
}

// A Proof says how a lease was seen to be dead.
type Proof struct {
	At      time.Time `json:"at"`
	How     string    `json:"how"`     // what was tried: "login as mf_x to db at host:port"
	Refusal string    `json:"refusal"` // what the provider answered
}

// Info describes a lease that exists at the issuer.
type Info struct {
	Name      string
	Owner     string    // installation that made it; empty if the issuer cannot say
	ExpiresAt time.Time // zero if the provider does not know
}

// An Issuer mints, takes back and probes leases.
//
// Names are chosen by the agent, unique for ever, at most 40 bytes of
// [a-z0-9-], and written down before Issue is called. Every method must come
// back when ctx ends. No error contains a secret.
type Issuer interface {
	// Issue mints a lease called name. If it fails, it may or may not exist at
	// the provider: the agent will call Revoke. Issuing a name twice fails.
	Issue(ctx context.Context, name string, g Grant) (Lease, error)

	// Revoke ends the lease at its provider. It is idempotent; a name that was
	// never issued, or is already gone, is success. handle is nil if the agent
	// died before it learnt it; then Revoke works from the name, or returns
	// ErrNotRevocable.
	Revoke(ctx context.Context, name string, handle []byte) error

	// Probe uses the lease and returns the proof that it is refused. It
	// returns ErrStillValid if the provider still accepts it, and any other
	// error if nobody can say (the provider is down, the answer is not a
	// refusal of this credential). Without a handle it proves what can be
	// proved from the name and says so in Proof.How.
	Probe(ctx context.Context, name string, handle []byte) (Proof, error)

	// List names every lease that exists and was made by this installation in
	// any of its lives. Issuers that cannot know return errors.ErrUnsupported.
	List(ctx context.Context) ([]Info, error)
}

// A ScopeChecker is an Issuer that can judge a scope without minting anything.
// "mayfly config check" calls it for every grant of the policy.
type ScopeChecker interface {
	CheckScope(scope json.RawMessage) error // wraps ErrBadScope
}

// A Minimum is an Issuer whose provider gives no lease for less than some time.
// A grant that ends sooner is refused; "mayfly config check" says so of rules
// whose jobs end sooner, and renewals are made while there is that much left.
type Minimum interface {
	MinLife() time.Duration
}
