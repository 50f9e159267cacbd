package runner

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner/policy"
)

const (
	// maxApproval bounds an approval, in bytes, and maxArtifact what is hashed for
	// one, which is held in memory meanwhile.
	maxApproval = 64 << 10
	maxArtifact = 64 << 20
)

// unmet is what a rule does not grant this job, for the record.
func unmet(plan policy.Plan) string {
	var all []string
	for _, u := range plan.Unmet {
		all = append(all, u.What+" ("+u.At+")")
	}
	return strings.Join(all, "; ")
}

// tellUnmet says the same to whoever reads the job's log.
func (l *life) tellUnmet(plan policy.Plan) {
	for _, u := range plan.Unmet {
		l.out.notice(0, fmt.Sprintf("not granted: %s: the condition at %s is false: %s", u.What, u.At, u.When))
	}
}

// require holds the leases of a scope to what they require, before any of them is
// asked for. why is what is not met; err is that it could not be written down.
func (s *steps) require(ctx context.Context, step string) (why, err error) {
	for _, l := range s.plan.Leases {
		if l.Step != step || l.Requires == nil {
			continue
		}
		facts, unmet := s.met(ctx, l)
		err = errors.Join(err, s.audit(ctx, s.log.Job, "lease.require", leaseName(s.log.Job, l, 0), unmet, append(facts,
			"issuer", l.Issuer, "step", l.Step, "rule", s.plan.Rule, "requires", l.Requires.String())...))
		if unmet != nil {
			why = errors.Join(why, fmt.Errorf("lease %s is refused: %w", l.Name, unmet))
		}
	}
	return why, err
}

// met looks at all that a lease requires. facts are what the record should have.
func (s *steps) met(ctx context.Context, l policy.Lease) (facts []string, err error) {
	r := l.Requires
	err = errors.Join(r.Released(s.job), s.passed(l))
	if r.Approval == "" {
		return nil, err
	}
	a, facts, aerr := s.approved(r)
	if err = errors.Join(err, aerr); aerr != nil || r.Artifact == "" {
		return facts, err
	}
	content, gerr := s.box.Get(ctx, below(r.Artifact), maxArtifact)
	if gerr != nil {
		return facts, errors.Join(err, fmt.Errorf("artifact %s: %w; it must be a file of the workspace, no link, of at most %d MiB: of more, let a list of digests be approved",
			r.Artifact, gerr, maxArtifact>>20))
	}
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256(content))
	if !slices.Contains(a.Artifacts, digest) {
		err = errors.Join(err, fmt.Errorf("artifact %s is %s, which approval %s does not name", r.Artifact, digest, r.Approval))
	}
	return append(facts, "artifact", r.Artifact, "artifact_digest", digest), err
}

// approved is the approval that is required, as it is now, and what the record should
// have of it.
func (s *steps) approved(r *policy.Requires) (a policy.Approval, facts []string, err error) {
	src, err := readApproval(r.Approval)
	if err == nil {
		a, err = policy.ParseApproval(src, r.Approval)
		facts = []string{"approval", r.Approval, "approval_digest", fmt.Sprintf("sha256:%x", sha256.Sum256(src)), "approved_by", a.By}
	}
	if err == nil {
		err = a.Covers(s.job, time.Now())
	}
	if err != nil {
		err = fmt.Errorf("approval %s: %w", r.Approval, err)
	}
	return a, facts, err
}

// passed says which steps before that of the lease did not pass.
func (s *steps) passed(l policy.Lease) error {
	at := slices.IndexFunc(s.job.Steps, func(step providers.Step) bool { return step.ID == l.Step })
	before := s.job.Steps[:max(at, 0)]
	outcome := func(step providers.Step) string {
		done, _ := s.root.done[step.ID].(map[string]any)
		is, _ := done["outcome"].(string)
		return is
	}
	var errs []error
	for _, step := range before {
		is := outcome(step)
		if l.Requires.All && is != string(providers.Success) && is != string(providers.Skipped) {
			errs = append(errs, fmt.Errorf("no step before %s may have failed, and %s ended as %s", l.Step, s.called(step), is))
		}
	}
	for _, want := range l.Requires.Steps {
		found := false
		for _, step := range before {
			if step.ID != want && step.Name != want {
				continue
			}
			found = true
			if is := outcome(step); is != string(providers.Success) {
				errs = append(errs, fmt.Errorf("step %s must have passed before %s, and ended as %s", want, l.Step, is))
			}
		}
		if !found {
			errs = append(errs, fmt.Errorf("step %s must have passed, and none before %s has that id or name", want, l.Step))
		}
	}
	return errors.Join(errs...)
}

// called is what a step is named in a refusal.
func (s *steps) called(step providers.Step) string {
	if step.Name != "" {
		return s.out.hide(step.Name)
	}
	return step.ID
}

// readApproval reads a file that nobody but root and the agent can have written: not
// the file, and none of the directories that lead to it.
func readApproval(path string) ([]byte, error) {
	for dir := filepath.Dir(path); ; dir = filepath.Dir(dir) {
		info, err := os.Lstat(dir)
		if err != nil {
			return nil, err
		}
		if err := ours(info, true); err != nil {
			return nil, fmt.Errorf("%s: %w", dir, err)
		}
		if dir == filepath.Dir(dir) {
			break
		}
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := ours(info, false); err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxApproval+1))
	if err == nil && len(b) > maxApproval {
		err = fmt.Errorf("it has more than %d bytes", maxApproval)
	}
	return b, err
}

// ours refuses what somebody else could have written, or put in its place. In a
// directory with the sticky bit (/tmp) nobody replaces what is another's.
func ours(info os.FileInfo, dir bool) error {
	st, ok := info.Sys().(*syscall.Stat_t)
	switch {
	case dir && !info.IsDir():
		return errors.New("it is no directory, or a link: name the place itself")
	case !dir && !info.Mode().IsRegular():
		return errors.New("it is no regular file")
	case !ok || st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return errors.New("it belongs neither to root nor to the agent's user")
	case info.Mode().Perm()&0o022 != 0 && (!dir || info.Mode()&os.ModeSticky == 0):
		return fmt.Errorf("others can write it (mode %v): chmod go-w", info.Mode().Perm())
	case !dir && st.Nlink != 1:
		return fmt.Errorf("it has %d names, of which one may be in a place where others write", st.Nlink)
	}
	return nil
}
