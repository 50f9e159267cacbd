// Package providers defines how the agent talks to a CI service.
//
// A [Provider] offers jobs, binds one to this agent, keeps the claim alive and
// hears how the job ended. Each service is a subpackage; none of them knows
// about sandboxes, issuers or the agent. All pass the suite in
// providers/providertest.
//
// The package imports the standard library, and creds for the type Secret: a
// service puts secrets of its own into a job (docs/adr/0002).
package providers

import (
	"context"
	"errors"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

var (
	// ErrGone reports that an offer or a claim is not there: somebody else
	// took it, or asking is taking and there was nothing. Nothing is owed.
	ErrGone = errors.New("gone")

	// ErrCancelled is returned by Watch when the service wants the job stopped.
	ErrCancelled = errors.New("cancelled by the provider")

	// ErrBadJob reports a job that cannot be run as it is written. The claim
	// stands: the agent shows the error in the job's log and reports failure.
	ErrBadJob = errors.New("job refused")
)

// An Offer is a job that the service may have for us. Holding one holds nothing.
type Offer struct {
	ID string // the service's own identifier; "" if only Claim can tell
}

// A Trust says how far the service vouches for what a job will execute. Rules
// of the policy name it; nothing is granted to a tier that no rule names.
type Trust string

// Trust tiers, least first.
const (
	TrustFork        Trust = "fork"        // code of somebody who cannot push here
	TrustBranch      Trust = "branch"      // an unprotected branch
	TrustTag         Trust = "tag"         // an unprotected tag: whoever can push can make one, or move it
	TrustProtected   Trust = "protected"   // a protected branch or tag
	TrustEnvironment Trust = "environment" // released by a protected environment
	TrustLocal       Trust = "local"       // started by whoever runs the agent
)

// A Job is an offer that this agent has claimed: a value, never changed.
type Job struct {
	// Ref is what Watch, Log and Complete need beside the name. The journal
	// stores it sealed.
	Ref []byte
	// ByName says that Ref is empty or can be found from the name again, so
	// that the journal need not wait for the disk.
	ByName bool

	Subject creds.Subject // Provider, Repository, Ref, SHA, Workflow, Event, Job, and what it knows of Origin
	Trust   Trust
	Labels  []string // what runs-on asked for

	If      string // condition of the job, an expression; "" is success()
	Env     Env
	Timeout time.Duration // asked by the workflow; 0 is the agent's default
	// ContinueOnError is a template: if true, a job that fails is reported as
	// a success, and its log says what it was.
	ContinueOnError string

	// Containers are what the workflow wants beside or around the steps: services,
	// and one without a name that the steps run in.
	Containers []Container

	Steps    []Step
	Outputs  map[string]string // name → template
	Contexts map[string]any    // github, vars, needs, matrix, strategy, inputs
	Secrets  map[string]creds.Secret
}

// An Env is variables, as templates.
type Env struct {
	Vars map[string]string
	Expr string // a template whose value is an object: further variables, which replace those of Vars
}

// A Container is what a job runs in, or a service of it. Its strings are
// templates, evaluated once, before anything is made for the job; a service
// without an image is none then.
type Container struct {
	Name     string // of the service, unique in the job in any case; "" is what the steps run in. No template
	Image    string
	Env      Env
	Ports    []string // "8080:80", "80", "80/tcp": of the job's localhost, and of the service
	Options  string   // words of a command line: workflow.ParseOptions
	Username string   // for the image's registry
	Password string
	Position string // file:line, for errors
}

// A Step is one step of a job: a script, or an action that lies in the
// workspace. Its strings are templates of the Actions expression language,
// evaluated when the step starts (providers/workflow).
type Step struct {
	ID              string // unique in the job, never empty
	Name            string
	If              string
	Run             string
	Uses            string            // ./directory of an action; then Run is empty. No template
	With            map[string]string // inputs of the action
	Shell           string
	Dir             string
	Env             Env
	TimeoutMinutes  string
	ContinueOnError string
	Position        string // file:line, for errors
}

// A Conclusion is how a job or step ended.
type Conclusion string

// Conclusions. A service that knows fewer words maps them.
const (
	Success   Conclusion = "success"
	Failure   Conclusion = "failure"
	Cancelled Conclusion = "cancelled"
	TimedOut  Conclusion = "timed-out"
	Refused   Conclusion = "refused" // by policy: nothing was run
	Skipped   Conclusion = "skipped"
	Lost      Conclusion = "lost" // the agent died; the job's own outcome is unknown
)

// A Result is how a job ended, with what the service may be told of why.
type Result struct {
	Conclusion Conclusion        `json:"conclusion"`
	Reason     string            `json:"reason,omitempty"`
	Outputs    map[string]string `json:"outputs,omitempty"`
}

// A Provider is one CI service.
//
// Names are chosen by the agent, unique for ever, at most 40 bytes of
// [a-z0-9-], and written down before Claim is called. Calls are safe for
// concurrent use. Transient errors of the service (429, 5xx, a cut
// connection) are retried inside, with the server's delay, until ctx ends.
type Provider interface {
	// Poll blocks until there may be a job for a free slot, or ctx is done.
	Poll(ctx context.Context) (Offer, error)

	// Claim binds the offer to this agent under name. Claiming a name twice
	// returns the same Job, or after a restart ErrGone where asking is taking. It
	// returns ErrGone if there is nothing to bind or, where asking is taking, if
	// nobody can say (Poll tells why), and ErrBadJob, with the claim made and Job.Ref set, if what it got
	// cannot be run.
	Claim(ctx context.Context, name string, o Offer) (Job, error)

	// Watch keeps the claim alive until ctx is done (then it returns nil), and
	// returns ErrCancelled when the service wants the job stopped. After that
	// the agent calls it again while it cleans up. Any other error is
	// reported, and Watch is called again.
	Watch(ctx context.Context, name string, ref []byte) error

	// Complete reports the result and gives the claim up. It works from name
	// and ref alone (ref may be nil). A second call, and a name that was never
	// claimed, are no-ops.
	Complete(ctx context.Context, name string, ref []byte, r Result) error
}

// A Sourcer is a Provider that says where the agent, and not the job, can fetch
// the job's repository from with git.
type Sourcer interface {
	// Source is for a job that Claim returned. It asks nobody.
	Source(j Job) (Source, error)
}

// A Source is the address of a repository. It is made of what the agent was told
// about the service, and never of what a job says.
type Source struct {
	URL    string // https, http or file; without user, query and fragment
	User   string // beside Token, which is the job's own
	Token  creds.Secret
	RootCA string // PEM file of authorities; "" is the system's
}

// A Reader is a Provider that reads files of a job's repository as its default
// branch has them.
type Reader interface {
	// DefaultFile reads the file at path, now. A file that is not there is no
	// error; whatever else keeps it from being read is one.
	DefaultFile(ctx context.Context, j Job, path string) (File, error)
}

// A File is what the default branch of a repository has.
type File struct {
	Branch, Commit string // where it was read
	Protected      bool   // the service lets not everybody who can push change that branch
	Present        bool
	Content        []byte
}

// A Logger is a Provider that shows the job's log.
type Logger interface {
	// Log opens the log of a claimed job. After a crash it is opened again and
	// goes on behind what was written. It returns ErrGone if no claim stands
	// under name: never made, cut short, or given up.
	Log(ctx context.Context, name string, ref []byte) (Log, error)
}

// A Log takes what the job says, already masked. Calls are not concurrent.
type Log interface {
	// Write adds bytes that the step printed at a time; chunks are cut
	// anywhere. It may block, which is how back-pressure reaches the job.
	Write(at time.Time, step int, b []byte) error
	// Step tells that a step changed its state.
	Step(s StepState) error
	// Close returns when the service has everything. It may be called after
	// the job's context is done.
	Close(ctx context.Context) error
}

// A StepState is what a service shows of a step.
type StepState struct {
	Index      int
	Name       string
	Started    time.Time
	Ended      time.Time  // zero while it runs
	Conclusion Conclusion // "" while it runs
	ExitCode   int
}
