package runner

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
)

// Where a step finds what the agent gives it. All of it is on the box's tmpfs.
const (
	scriptFile = sandbox.Run + "/step"
	tempDir    = "/tmp"
	secretsDir = sandbox.Run + "/secrets"
)

// commandFiles are what a step writes to tell the runner something, as GitHub
// documents them: variable → file below sandbox.Run.
func commandFiles() map[string]string {
	return map[string]string{
		"GITHUB_ENV": "env", "GITHUB_OUTPUT": "output", "GITHUB_PATH": "path",
		"GITHUB_STATE": "state", "GITHUB_STEP_SUMMARY": "summary",
	}
}

// commandFileMax bounds what a step may hand back in one file, in bytes;
// GitHub's limit for a step summary is the same.
const commandFileMax = 1 << 20

// basePath is PATH at the start of a job: Debian's, and where Go installs
// itself, which a login shell would add.
const basePath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/go/bin"

// environment is all of the environment of a step.
func (s *steps) environment(step *current) []string {
	job := s.job.Subject
	env := map[string]string{
		"CI": "true", "HOME": "/root", "USER": "root", "LANG": "C.UTF-8", "TMPDIR": tempDir,
		"GITHUB_ACTIONS": "true", "GITHUB_WORKSPACE": sandbox.Workspace,
		"GITHUB_REPOSITORY": job.Repository, "GITHUB_REF": job.Ref, "GITHUB_REF_NAME": refName(job.Ref),
		"GITHUB_SHA": job.SHA, "GITHUB_EVENT_NAME": job.Event, "GITHUB_WORKFLOW": job.Workflow,
		"GITHUB_JOB": job.Job, "GITHUB_ACTOR": s.job.Actor,
		"RUNNER_OS": "Linux", "RUNNER_TEMP": tempDir,
	}
	for variable, file := range commandFiles() {
		env[variable] = sandbox.Run + "/" + file
	}
	env["PATH"] = strings.Join(append(slices.Clone(s.path), basePath), ":")
	maps.Copy(env, s.env)
	maps.Copy(env, step.env)
	for _, l := range s.granted(step.ID) {
		for variable, field := range l.Env {
			env[variable] = s.field(l, field)
		}
	}
	list := make([]string, 0, len(env))
	for _, k := range slices.Sorted(maps.Keys(env)) {
		list = append(list, k+"="+env[k])
	}
	return list
}

// granted are the leases of the plan that a step may use.
func (s *steps) granted(step string) []policy.Lease {
	var ls []policy.Lease
	for _, l := range s.plan.Leases {
		if _, held := s.leases[l.Name]; held && (l.Step == "" || l.Step == step) {
			ls = append(ls, l)
		}
	}
	return ls
}

// field is a value or fact of a held lease. This is where a secret leaves for
// its user.
func (s *steps) field(l policy.Lease, name string) string {
	lease := s.leases[l.Name]
	if v, ok := lease.Values[name]; ok {
		return v.Reveal()
	}
	return lease.Facts[name]
}

// issue acquires the leases that the plan grants to a scope, and puts those
// that are files into the box.
func (s *steps) issue(ctx context.Context, step string) error {
	if s.leases == nil {
		s.leases = map[string]creds.Lease{}
	}
	files := map[string]string{}
	for _, l := range s.plan.Leases {
		if l.Step != step {
			continue
		}
		if err := s.issueOne(ctx, l); err != nil {
			return err
		}
		for file, field := range l.Files {
			files["secrets/"+file] = s.field(l, field)
		}
	}
	if len(files) == 0 {
		return nil
	}
	return s.put(ctx, files)
}

func (s *steps) issueOne(ctx context.Context, l policy.Lease) error {
	issuer, ok := s.cfg.Issuers[l.Issuer]
	if !ok {
		return fmt.Errorf("lease %s: issuer %q is not configured", l.Name, l.Issuer)
	}
	subject := s.job.Subject
	subject.Step = l.Step
	grant := creds.Grant{Subject: subject, Scope: l.Scope, Expires: earlier(time.Now().Add(l.TTL), s.deadline)}
	name := leaseName(s.log.Job, l)
	if err := s.audit(ctx, s.log.Job, "lease.request", name, nil, "issuer", l.Issuer, "step", l.Step,
		"rule", s.plan.Rule, "scope", string(l.Scope), "expires", stamp(grant.Expires)); err != nil {
		return err
	}
	lease, err := hold(ctx, s.life, name, func(ctx context.Context) (creds.Lease, grip, error) {
		lease, err := issuer.Issue(ctx, name, grant)
		return lease, grip{lease.Handle, lease.ByName}, err
	})
	if err == nil && lease.ExpiresAt.After(grant.Expires) {
		err = fmt.Errorf("%s: issued until %s, granted until %s: the issuer gives more than it may", name, stamp(lease.ExpiresAt), stamp(grant.Expires))
	}
	err = errors.Join(err, s.out.conceal(lease.Values), checkFields(l, lease, err))
	err = errors.Join(err, s.audit(ctx, s.log.Job, "lease.issue", name, err, "issuer", l.Issuer, "expires", stamp(lease.ExpiresAt)))
	if err != nil {
		return err
	}
	s.leases[l.Name] = lease
	return nil
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
		delete(s.leases, l.Name)
		for file := range l.Files {
			files["secrets/"+file] = ""
		}
	}
	if len(files) == 0 {
		return nil
	}
	ctx, cancel := s.detached(ctx)
	defer cancel()
	return s.put(ctx, files)
}

// putCommandFiles gives the step its script and empty files to write to. What
// the step before did not write to is empty still.
func (s *steps) putCommandFiles(ctx context.Context, script string) error {
	files := map[string]string{"step": script}
	for _, file := range commandFiles() {
		if !s.blank[file] {
			files[file] = ""
		}
	}
	s.blank = map[string]bool{}
	return s.put(ctx, files)
}

// put writes files below sandbox.Run, readable by root in the box only.
func (s *steps) put(ctx context.Context, files map[string]string) error {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		h := &tar.Header{Name: name, Mode: 0o600, Size: int64(len(files[name])), Typeflag: tar.TypeReg}
		if err := w.WriteHeader(h); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if _, err := w.Write([]byte(files[name])); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("step files: %w", err)
	}
	if err := s.box.Put(ctx, sandbox.Run, &b); err != nil {
		return fmt.Errorf("step files: %w", err)
	}
	return nil
}

// readCommandFiles takes what the step wrote for later steps, and returns its
// outputs: also those of a step whose time is over.
func (s *steps) readCommandFiles(ctx context.Context) (map[string]string, error) {
	ctx, cancel := s.detached(ctx)
	defer cancel()
	env, err := s.pairs(ctx, "env")
	if err != nil {
		return nil, err
	}
	for k := range env {
		if strings.HasPrefix(k, "GITHUB_") || strings.HasPrefix(k, "RUNNER_") {
			return nil, fmt.Errorf("GITHUB_ENV: %s cannot be set by a step", k)
		}
	}
	maps.Copy(s.env, env)
	b, err := s.commandFile(ctx, "path")
	if err != nil {
		return nil, err
	}
	s.path = append(parsePath(string(b)), s.path...)
	return s.pairs(ctx, "output")
}

func (s *steps) pairs(ctx context.Context, file string) (map[string]string, error) {
	b, err := s.commandFile(ctx, file)
	if err != nil {
		return nil, err
	}
	m, err := parsePairs(string(b))
	if err != nil {
		return nil, fmt.Errorf("GITHUB_%s: %w", strings.ToUpper(file), err)
	}
	return m, nil
}

func (s *steps) commandFile(ctx context.Context, file string) ([]byte, error) {
	b, err := s.box.Get(ctx, sandbox.Run+"/"+file, commandFileMax)
	s.blank[file] = err == nil && len(b) == 0
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // the step removed it: it says nothing
	}
	if err != nil {
		return nil, fmt.Errorf("GITHUB_%s: %w", strings.ToUpper(file), err)
	}
	return b, nil
}

// parsePath reads the format of GITHUB_PATH: a directory a line, the last of
// which is searched first.
func parsePath(text string) []string {
	var dirs []string
	for line := range strings.Lines(text) {
		if dir := strings.TrimRight(line, "\r\n"); dir != "" {
			dirs = append(dirs, dir)
		}
	}
	slices.Reverse(dirs)
	return dirs
}

// parsePairs reads the format of GITHUB_ENV and GITHUB_OUTPUT: NAME=VALUE
// lines, and NAME<<DELIMITER blocks (docs.github.com, "Workflow commands").
func parsePairs(text string) (map[string]string, error) {
	m := map[string]string{}
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	for i := 0; i < len(lines); i++ {
		line := strings.TrimSuffix(lines[i], "\r")
		if line == "" {
			continue
		}
		eq, heredoc := strings.Index(line, "="), strings.Index(line, "<<")
		switch {
		case heredoc > 0 && (eq < 0 || heredoc < eq):
			name, end := line[:heredoc], line[heredoc+2:]
			from := i + 1
			for i++; i < len(lines) && strings.TrimSuffix(lines[i], "\r") != end; i++ {
			}
			if i == len(lines) || end == "" {
				return nil, fmt.Errorf("line %d: no end %q of %q", from, end, name)
			}
			m[name] = strings.Join(lines[from:i], "\n")
		case eq > 0:
			m[line[:eq]] = line[eq+1:]
		default:
			return nil, fmt.Errorf("line %d: want NAME=VALUE or NAME<<DELIMITER", i+1)
		}
	}
	return m, nil
}

func refName(ref string) string {
	for _, prefix := range []string{"refs/heads/", "refs/tags/", "refs/pull/"} {
		if name, ok := strings.CutPrefix(ref, prefix); ok {
			return name
		}
	}
	return ref
}
