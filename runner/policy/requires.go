package policy

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/configs/strict"
	"github.com/mayfly-ci/mayfly/providers"
)

// A Requires is what must be so before a lease is asked for, beyond the facts of the
// job. What is not met fails the step that the lease is for, and nothing is issued.
type Requires struct {
	// Steps are ids or names of steps before this one, all of which must have passed.
	Steps []string `json:"steps,omitempty"`
	// All says that no step before this one failed, tolerated or not.
	All bool `json:"all_steps,omitempty"`
	// Approval is the path of a file on the agent's machine (ParseApproval) that
	// approves the job's commit. Only root and the agent may be able to write it.
	Approval string `json:"approval,omitempty"`
	// Artifact is a file of the workspace whose digest the approval names.
	Artifact string `json:"artifact,omitempty"`
	// Environment is what the service must say that it released the job for.
	Environment string `json:"environment,omitempty"`
}

// Kinds are what is required, by the keys of the policy.
func (r *Requires) Kinds() []string {
	var all []string
	if r == nil {
		return nil
	}
	for _, k := range []struct {
		key string
		set bool
	}{
		{"steps", r.All || len(r.Steps) > 0}, {"approval", r.Approval != ""}, {"artifact", r.Artifact != ""}, {"environment", r.Environment != ""},
	} {
		if k.set {
			all = append(all, k.key)
		}
	}
	return all
}

// String says what is required, for people.
func (r *Requires) String() string {
	var all []string
	if r.All {
		all = append(all, "no step before it failed")
	}
	if len(r.Steps) > 0 {
		all = append(all, "passed: "+strings.Join(r.Steps, ", "))
	}
	if r.Approval != "" {
		all = append(all, "an approval of the commit in "+r.Approval)
	}
	if r.Artifact != "" {
		all = append(all, "which names the digest of "+r.Artifact)
	}
	if r.Environment != "" {
		all = append(all, "released by the service for environment "+r.Environment)
	}
	return strings.Join(all, "; ")
}

// Released says why the service's word for the job is not enough.
func (r *Requires) Released(j providers.Job) error {
	switch has := j.Subject.Environment; {
	case r == nil || r.Environment == "" || has == r.Environment:
		return nil
	case has == "":
		return fmt.Errorf("environment %s is required, and %s does not say that it released the job for any", r.Environment, orDefault(j.Subject.Provider, "the provider"))
	default:
		return fmt.Errorf("environment %s is required, and the job was released for %s", r.Environment, has)
	}
}

// requiresNode is that part of a lease.
type requiresNode struct {
	Self        strict.Node     `yaml:",self"`
	Steps       stepsWanted     `yaml:"steps"`
	Approval    approvalPath    `yaml:"approval"`
	Artifact    artifactPath    `yaml:"artifact"`
	Environment environmentName `yaml:"environment"`
}

// stepsWanted is a list of ids or names, or the word all.
type stepsWanted struct {
	all   bool
	names []purpose
}

// DecodeNode implements strict.NodeDecoder.
func (s *stepsWanted) DecodeNode(n strict.Node) error {
	if n.Text() == "all" {
		s.all = true
		return nil
	}
	list, err := listOf[purpose](n)
	s.names = list
	return err
}

// environmentName is one of the service.
type environmentName string

func (e *environmentName) UnmarshalText(b []byte) error {
	*e = environmentName(b)
	return word(b, "the name of an environment", `[\pL\pN\pP ]{1,255}`)
}

// approvalPath is a path on the agent's machine, with facts of the job in it.
type approvalPath string

func (a *approvalPath) UnmarshalText(b []byte) error {
	*a = approvalPath(b)
	if !path.IsAbs(string(b)) || path.Clean(string(b)) != string(b) {
		return fmt.Errorf("%q is not an absolute path without . and ..: write one such as /etc/mayfly/approvals/{repository}/{sha}.yaml", b)
	}
	_, err := pathPattern(b).fill(func(string) (string, error) { return "x", nil })
	return err
}

// artifactPath is a file of the workspace, with facts of the job in it.
type artifactPath string

func (a *artifactPath) UnmarshalText(b []byte) error {
	*a = artifactPath(b)
	if !fs.ValidPath(string(b)) || string(b) == "." {
		return fmt.Errorf("%q is not the path of a file in the workspace: write one such as dist/app.tar.gz", b)
	}
	_, err := pathPattern(b).fill(func(string) (string, error) { return "x", nil })
	return err
}

// requires is what the lease has of it, nil for nothing.
func (l leaseNode) requires() (*Requires, error) {
	n := l.Requires
	if n.Self.IsZero() {
		return nil, nil
	}
	r := &Requires{
		Steps: texts(n.Steps.names), All: n.Steps.all,
		Approval: string(n.Approval), Artifact: string(n.Artifact), Environment: string(n.Environment),
	}
	var errs []error
	if !slices.ContainsFunc([]string{"steps", "approval", "artifact", "environment"}, func(key string) bool { return !n.Self.Get(key).IsZero() }) {
		errs = append(errs, n.Self.Errorf("nothing is required: add steps, approval, artifact or environment"))
	}
	for _, key := range []string{"steps", "artifact"} {
		if l.Step == "" && !n.Self.Get(key).IsZero() {
			errs = append(errs, n.Self.At(key).Errorf("a lease of the whole job is there before its first step: name the step that lease %s is for", l.Name))
		}
	}
	if r.Artifact != "" && r.Approval == "" {
		errs = append(errs, n.Self.At("artifact").Errorf("a digest is known from an approval: add approval"))
	}
	if slices.Contains(r.Steps, string(l.Step)) && l.Step != "" {
		errs = append(errs, n.Self.At("steps").Errorf("step %s cannot have passed before it gets the lease", l.Step))
	}
	return r, strict.Join(errs...)
}

// fill gives the paths the job's own facts.
func (r *Requires) fill(j providers.Job) (*Requires, error) {
	if r == nil {
		return nil, nil
	}
	filled := *r
	var errs []error
	for _, p := range []*string{&filled.Approval, &filled.Artifact} {
		text, err := pathPattern(*p).fill(func(name string) (string, error) { return safeFact(name, j) })
		*p = text
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("%w: requires: %w", ErrDenied, err)
	}
	return &filled, nil
}

// An Approval is a file in which somebody lets a commit be published or deployed.
type Approval struct {
	Repository string
	SHA        string
	By         string // whoever wrote it, as the file says
	Until      time.Time
	Artifacts  []string // "sha256:" and 64 hexadecimal digits
}

type approvalNode struct {
	Version    int           `yaml:"version,required"`
	Repository string        `yaml:"repository,required"`
	SHA        commitID      `yaml:"sha,required"`
	By         purpose       `yaml:"by,required"`
	Until      moment        `yaml:"until"`
	Artifacts  []digestValue `yaml:"artifacts"`
}

type commitID string

func (c *commitID) UnmarshalText(b []byte) error {
	*c = commitID(b)
	return word(b, "a whole commit id", `[0-9a-f]{40}|[0-9a-f]{64}`)
}

type digestValue string

func (d *digestValue) UnmarshalText(b []byte) error {
	*d = digestValue(b)
	return word(b, "a digest", `sha256:[0-9a-f]{64}`)
}

type moment time.Time

func (m *moment) UnmarshalText(b []byte) error {
	t, err := time.Parse(time.RFC3339, string(b))
	if err != nil {
		return fmt.Errorf("%q is not a time: write it as 2027-01-31T18:00:00Z", b)
	}
	*m = moment(t)
	return nil
}

// ParseApproval reads an approval. file is its name, for positions.
func ParseApproval(src []byte, file string) (Approval, error) {
	root, err := strict.Parse(src, file)
	var n approvalNode
	if err == nil {
		err = root.Decode(&n)
	}
	if err == nil && n.Version != Version {
		err = root.At("version").Errorf("version %d is not supported: this agent reads version: %d", n.Version, Version)
	}
	if err != nil {
		return Approval{}, err
	}
	return Approval{n.Repository, string(n.SHA), string(n.By), time.Time(n.Until), texts(n.Artifacts)}, nil
}

// Covers says why the approval is not for the job, at a time.
func (a Approval) Covers(j providers.Job, now time.Time) error {
	switch s := j.Subject; {
	case a.Repository == "" || a.Repository != s.Repository:
		return fmt.Errorf("it approves repository %q, and the job is of %q", a.Repository, s.Repository)
	case a.SHA == "" || a.SHA != s.SHA:
		return fmt.Errorf("it approves commit %s, and the job is of %s", a.SHA, orDefault(s.SHA, "none that its provider names"))
	case !a.Until.IsZero() && !now.Before(a.Until):
		return fmt.Errorf("it was good until %s", a.Until.UTC().Format(time.RFC3339))
	}
	return nil
}

// requirementKind is one of Kinds.
type requirementKind string

func (k *requirementKind) UnmarshalText(b []byte) error {
	*k = requirementKind(b)
	return oneWord(b, "requirement", "steps", "approval", "artifact", "environment")
}
