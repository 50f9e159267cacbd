package local

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"unicode"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/workflow"
)

// maxJob is the size of the largest job file, in bytes: it names a workflow
// and does not contain one.
const maxJob = 64 << 10

// A Job is what stands in new/ID.json. A key that is not known is refused.
type Job struct {
	// Repository is the absolute path of a git repository, bare or not, or a
	// name under Config.Repositories. It is github.repository as it stands.
	Repository string `json:"repository"`
	// URL is where the job itself can clone from; github.repositoryUrl.
	URL string `json:"url,omitempty"`
	// Ref is a full name such as refs/heads/main. It says which commit is
	// meant if SHA is empty, and what github.ref is.
	Ref string `json:"ref,omitempty"`
	// SHA is a full commit id. With it Ref is believed and not looked up.
	SHA string `json:"sha,omitempty"`
	// Workflow is the path of the file in the repository.
	Workflow string `json:"workflow"`
	// Job is the id of the job in the file; empty if the file has only one.
	Job     string         `json:"job,omitempty"`
	Event   string         `json:"event,omitempty"` // default "push"
	Actor   string         `json:"actor,omitempty"`
	Inputs  map[string]any `json:"inputs,omitempty"`
	Payload map[string]any `json:"payload,omitempty"` // github.event
	// Worktree reads the workflow from the disk instead of the commit, which
	// then needs neither Ref nor SHA: for "mayfly exec".
	Worktree bool `json:"worktree,omitempty"`
}

func bad(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{providers.ErrBadJob}, args...)...)
}

// submission reads and checks a job file. It was put there by somebody else,
// who may still have it open or have put something there that is no file.
func (p *Provider) submission(file string) (Job, error) {
	before, err := p.root.Lstat(file)
	if err != nil {
		return Job{}, err
	}
	// Opening a fifo would block and a link could lead anywhere in the spool.
	if !before.Mode().IsRegular() {
		return Job{}, bad("the job file is not a regular file (%s)", before.Mode().Type())
	}
	f, err := p.root.OpenFile(file, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return Job{}, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxJob+1))
	after, serr := f.Stat()
	if err = errors.Join(err, serr, f.Close()); err != nil {
		return Job{}, err
	}
	if !os.SameFile(before, after) {
		return Job{}, bad("the job file was replaced while it was read")
	}
	if err := p.checkOwner(after); err != nil {
		return Job{}, err
	}
	if len(b) > maxJob {
		return Job{}, bad("the job file has more than %d bytes", maxJob)
	}
	var j Job
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&j); err != nil {
		return Job{}, bad("the job file, byte %d of %d: %v", d.InputOffset(), len(b), err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Job{}, bad("the job file, byte %d of %d: more than one value", d.InputOffset(), len(b))
	}
	return j, p.check(&j)
}

// checkOwner keeps the promise of TrustLocal: the job was started by whoever
// runs the agent, owns the spool, or is root. A second name for the file (a
// hard link) would let somebody else lend such a file to the spool.
func (p *Provider) checkOwner(info fs.FileInfo) error {
	st, ok := info.Sys().(*syscall.Stat_t)
	dir, err := p.root.Stat(".")
	if err != nil || !ok {
		return errors.Join(errors.New("owner of the job file: not known"), err)
	}
	owner, ok := dir.Sys().(*syscall.Stat_t)
	if !ok || st.Uid != owner.Uid && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return bad("the job file belongs to user %d, who does not own the spool", st.Uid)
	}
	if st.Nlink != 1 {
		return bad("the job file has %d names: write it to a new file and rename that", st.Nlink)
	}
	return nil
}

// check refuses what could lead out of the repository or be read as an option
// or as more than one line by git.
func (p *Provider) check(j *Job) error {
	for key, v := range map[string]string{
		"repository": j.Repository, "url": j.URL, "ref": j.Ref, "sha": j.SHA, "workflow": j.Workflow, "job": j.Job, "event": j.Event, "actor": j.Actor,
	} {
		if strings.ContainsFunc(v, unicode.IsControl) || len(v) > 4096 {
			return bad("%s: it has control characters or more than 4096 bytes", key)
		}
	}
	if j.Event == "" {
		j.Event = "push"
	}
	switch {
	case path.IsAbs(j.Repository) && filepath.Clean(j.Repository) == j.Repository:
	case p.config.Repositories != "" && fs.ValidPath(j.Repository) && j.Repository != ".":
	default:
		return bad("repository %q: it must be an absolute path without . and .., or a name if the agent was told where repositories are", j.Repository)
	}
	if !fs.ValidPath(j.Workflow) || j.Workflow == "." {
		return bad("workflow %q: it must be a path in the repository such as .github/workflows/ci.yml", j.Workflow)
	}
	if j.SHA != "" && !fullSHA(j.SHA) {
		return bad("sha %q: it must be the 40 or 64 lower-case hexadecimal digits of a commit", j.SHA)
	}
	if j.Ref != "" && !fullRef(j.Ref) {
		return bad("ref %q: it must be a full name such as refs/heads/main or refs/tags/v1", j.Ref)
	}
	if j.Ref == "" && j.SHA == "" && !j.Worktree {
		return bad("the job names neither a ref nor a sha")
	}
	return nil
}

func fullSHA(s string) bool {
	return (len(s) == 40 || len(s) == 64) && strings.Trim(s, "0123456789abcdef") == ""
}

// fullRef accepts the names that git-check-ref-format(1) does, of those that
// begin with refs/. It keeps out what git reads as an operator: ^ ~ : @{ ..
func fullRef(s string) bool {
	if !strings.HasPrefix(s, "refs/") || strings.ContainsAny(s, " ~^:?*[\\") {
		return false
	}
	if strings.Contains(s, "..") || strings.Contains(s, "@{") || strings.HasSuffix(s, ".") {
		return false
	}
	for _, part := range strings.Split(s, "/") {
		if part == "" || part[0] == '.' || strings.HasSuffix(part, ".lock") {
			return false
		}
	}
	return true
}

// bare is the job as far as it is known without its file.
func (p *Provider) bare(id string) providers.Job {
	return providers.Job{Ref: []byte(id), ByName: true, Trust: providers.TrustLocal, Subject: creds.Subject{Provider: p.config.Provider}}
}

// job builds the job from its record alone, so that it is the same each time.
//
// Beside what workflow.Workflow.Job sets, the github context has run_id (the
// id of the offer), run_number and run_attempt ("1"), repositoryUrl (if the
// job file has a url) and event (the payload and the inputs).
func (p *Provider) job(rec record) (providers.Job, error) {
	j := rec.Job
	job := p.bare(rec.ID)
	job.Subject = creds.Subject{Provider: p.config.Provider, Repository: j.Repository, Ref: j.Ref, SHA: rec.SHA, Workflow: j.Workflow, Event: j.Event, Job: j.Job}
	job.Subject.Origin = creds.Origin{RunID: rec.ID, RunNumber: "1", RunAttempt: "1", Actor: j.Actor}
	if rec.Bad != "" {
		return job, bad("%s", rec.Bad)
	}
	w, err := workflow.Load([]byte(rec.Source), j.Workflow)
	if err != nil {
		return job, err
	}
	event := map[string]any{}
	for k, v := range j.Payload {
		event[k] = v
	}
	if j.Inputs != nil {
		event["inputs"] = j.Inputs
	}
	github := map[string]any{"run_id": rec.ID, "run_number": "1", "run_attempt": "1", "event": event}
	if j.URL != "" {
		github["repositoryUrl"] = j.URL
	}
	built, err := w.Job(j.Job, workflow.Facts{Subject: job.Subject, Trust: job.Trust, GitHub: github, Inputs: j.Inputs})
	built.Ref, built.ByName = job.Ref, job.ByName
	if err != nil {
		return built, err
	}
	built.Env.Vars = withCI(built.Env.Vars)
	for _, l := range built.Labels {
		if len(p.config.Labels) > 0 && !slices.Contains(p.config.Labels, l) {
			return built, bad("runs-on asks for %q, this agent has %s", l, strings.Join(p.config.Labels, ", "))
		}
	}
	return built, nil
}

// withCI sets CI, which test frameworks and package managers look for.
func withCI(env map[string]string) map[string]string {
	if _, ok := env["CI"]; !ok {
		env["CI"] = "true"
	}
	return env
}
