package runner

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers/workflow"
	"github.com/mayfly-ci/mayfly/runner/gitcache"
	"github.com/mayfly-ci/mayfly/runner/internal/journal"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
)

// Where a step finds what the agent gives it. All of it is on the box's tmpfs.
const (
	tempDir    = "/tmp"
	secretsDir = sandbox.Run + "/secrets"
)

// basePath is PATH at the start of a job whose image says nothing: Debian's, and
// where Go installs itself, which a login shell would add.
const basePath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/go/bin"

// environment is all of the environment of a step: what the image of the box
// sets, what is there for every step, the job's own and what steps added, the
// step's and that of the actions around it, what GitHub lets nobody change, and
// what the policy grants.
func (s *steps) environment(step *current) []string {
	env := map[string]string{"LANG": "C.UTF-8", "PATH": basePath}
	for _, kv := range s.image.Env {
		if k, v, ok := strings.Cut(kv, "="); ok && k != "" && !strings.Contains(kv, "\x00") {
			env[k] = v
		}
	}
	maps.Copy(env, map[string]string{"CI": "true", "HOME": "/root", "USER": "root", "TMPDIR": tempDir})
	env["PATH"] = strings.Join(append(slices.Clone(s.path), env["PATH"]), ":")
	if len(s.mounts) > 0 {
		env[gitcache.TemplateVar] = gitcache.TemplateDir
	}
	if s.own != nil {
		maps.Copy(env, s.own.Env)
		maps.Copy(env, s.own.Options.Env)
	}
	maps.Copy(env, s.env)
	maps.Copy(env, step.frame.env)
	maps.Copy(env, step.env)
	github, _ := step.scope.Contexts["github"].(map[string]any)
	for _, key := range githubVariables() {
		env["GITHUB_"+strings.ToUpper(key)] = workflow.Text(github[key])
	}
	if step.frame.action != "" {
		env["GITHUB_ACTION_PATH"] = step.frame.action
	}
	env["GITHUB_ACTIONS"] = "true"
	for key, v := range s.runner() {
		env["RUNNER_"+strings.ToUpper(key)] = workflow.Text(v)
	}
	for variable, file := range commandFiles() {
		env[variable] = sandbox.Run + "/" + file
	}
	for _, l := range s.granted(step.outermost().ID) {
		held, _ := s.leases.get(l.Name)
		for variable, field := range l.Env {
			env[variable] = held.field(l, field)
		}
		held.equip(env)
	}
	list := make([]string, 0, len(env))
	for _, k := range slices.Sorted(maps.Keys(env)) {
		list = append(list, k+"="+env[k])
	}
	return list
}

// githubVariables are the keys of the github context that every step finds as a
// variable, as GitHub documents them under "Default environment variables".
func githubVariables() []string {
	return []string{
		"action", "actor", "actor_id", "api_url", "base_ref", "event_name", "event_path", "graphql_url", "head_ref", "job",
		"ref", "ref_name", "ref_protected", "ref_type", "repository", "repository_id", "repository_owner", "repository_owner_id",
		"retention_days", "run_attempt", "run_id", "run_number", "server_url", "sha", "triggering_actor", "workflow",
		"workflow_ref", "workflow_sha", "workspace",
	}
}

// granted are the leases of the plan that a step may use.
func (s *steps) granted(step string) []policy.Lease {
	var ls []policy.Lease
	for _, l := range s.plan.Leases {
		if _, held := s.leases.get(l.Name); held && (l.Step == "" || l.Step == step) {
			ls = append(ls, l)
		}
	}
	return ls
}

// issue acquires the leases that the plan grants to a scope, and puts those
// that are files into the box.
func (s *steps) issue(ctx context.Context, step string) error {
	if step == "" { // those of a step were asked before anything of it was opened
		if why, err := s.require(ctx, step); why != nil || err != nil {
			return errors.Join(why, err)
		}
	}
	files := map[string]string{}
	for _, l := range s.plan.Leases {
		if l.Step != step {
			continue
		}
		if err := s.issueOne(ctx, l); err != nil {
			return err
		}
		held, _ := s.leases.get(l.Name)
		for file, field := range l.Files {
			files["secrets/"+file] = held.field(l, field)
		}
		for file, text := range held.files {
			files["secrets/"+file] = text
		}
	}
	if len(files) == 0 {
		return nil
	}
	return s.put(ctx, files)
}

func (s *steps) issueOne(ctx context.Context, l policy.Lease) error {
	asked := time.Now()
	lease, err := s.mint(ctx, l, 0, "")
	if err != nil {
		return err
	}
	held := holding{Lease: lease, env: map[string]string{}}
	held.stand, err = placeholders(l, lease)
	if err == nil {
		err = s.broker(ctx, l, &held, 0)
	}
	if err == nil {
		err = held.configure(l)
	}
	if err != nil {
		return err
	}
	s.leases.set(l.Name, held)
	s.keepAlive(ctx, l, lease, asked)
	return nil
}

// mint asks for a lease that the journal names. turn is how often it was renewed,
// and renews the name of the one before.
func (s *steps) mint(ctx context.Context, l policy.Lease, turn int, renews string) (creds.Lease, error) {
	issuer, ok := s.cfg.Issuers[l.Issuer]
	if !ok {
		return creds.Lease{}, fmt.Errorf("lease %s: issuer %q is not configured", l.Name, l.Issuer)
	}
	grant := creds.Grant{Subject: s.subject(l), Scope: l.Scope, Expires: earlier(time.Now().Add(l.TTL), s.deadline)}
	name := leaseName(s.log.Job, l, turn)
	if err := s.audit(ctx, s.log.Job, "lease.request", name, nil, "issuer", l.Issuer, "step", l.Step,
		"rule", s.plan.Rule, "scope", string(l.Scope), "delivery", l.Delivery(), "reach", reach(s.plan, l),
		"renews", renews, "expires", stamp(grant.Expires)); err != nil {
		return creds.Lease{}, err
	}
	lease, err := acquired(ctx, s.life, name, func(ctx context.Context) (creds.Lease, grip, error) {
		lease, err := issuer.Issue(ctx, name, grant)
		return lease, grip{lease.Handle, lease.ByName}, err
	})
	clear(lease.Handle) // the journal has it, sealed
	lease.Handle = nil
	if turn == 0 {
		s.clock.mark(s.stage(name))
	}
	if err == nil && lease.ExpiresAt.After(grant.Expires) {
		err = fmt.Errorf("%s: issued until %s, granted until %s: the issuer gives more than it may", name, stamp(lease.ExpiresAt), stamp(grant.Expires))
	}
	err = errors.Join(err, s.out.conceal(lease.Values), checkFields(l, lease, err))
	if err == nil {
		err = s.log.Turn(name, journal.Issued, lease.ExpiresAt.UTC(), "")
	}
	err = errors.Join(err, s.audit(ctx, s.log.Job, "lease.issue", name, err, "issuer", l.Issuer, "expires", stamp(lease.ExpiresAt)))
	if err == nil {
		err = withhold(l, lease)
	}
	return lease, err
}

// subject is whom a lease is for: what the provider knows of the job, and what the
// agent does.
func (s *steps) subject(l policy.Lease) creds.Subject {
	who := s.job.Subject
	who.Step, who.Trust, who.JobID, who.Policy = l.Step, string(s.job.Trust), s.log.Job, s.plan.Digest
	return who
}

// checkFields refuses a plan that wants a field that the lease does not have:
// a step that reads an empty password would try it.
func checkFields(l policy.Lease, lease creds.Lease, issued error) error {
	if issued != nil {
		return nil
	}
	for _, wants := range []map[string]string{l.Env, l.Files} {
		for to, field := range wants {
			_, secret := lease.Values[field]
			_, fact := lease.Facts[field]
			if !secret && !fact {
				return fmt.Errorf("lease %s: %s wants %q, which issuer %s does not give", l.Name, to, field, l.Issuer)
			}
		}
	}
	return nil
}

// dropSecrets takes the files of a step's own leases out of the box's reach, so
// that the next step does not find them; they are revoked next.
func (s *steps) dropSecrets(ctx context.Context, step string) error {
	files := map[string]string{}
	for _, l := range s.plan.Leases {
		if l.Step != step || step == "" {
			continue
		}
		s.leases.drop(l.Name)
		maps.Copy(files, emptied(l))
	}
	if len(files) == 0 {
		return nil
	}
	ctx, cancel := s.detached(ctx)
	defer cancel()
	return s.put(ctx, files)
}

// emptied are the files that a lease and its tools have in the box, with nothing in
// them.
func emptied(l policy.Lease) map[string]string {
	files := map[string]string{}
	for file := range l.Files {
		files["secrets/"+file] = ""
	}
	if l.Has(policy.DockerHelper) {
		files["secrets/"+dockerFile(l)] = ""
	}
	return files
}

func refName(ref string) string {
	for _, prefix := range []string{"refs/heads/", "refs/tags/", "refs/pull/"} {
		if name, ok := strings.CutPrefix(ref, prefix); ok {
			return name
		}
	}
	return ref
}
