package runner_test

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
)

const requirePolicy = `version: 1
rules:
  - name: all
    match: {trust: [local]}
    leases:
      - name: key
        issuer: pg
        step: deploy
        env: {DEPLOY_KEY: password}
        requires:
          steps: [test, Lint the code]
          approval: DIR/{repository}/{sha}.yaml
          artifact: dist/app.tar
          environment: production
`

const (
	commit   = "0123456789abcdef0123456789abcdef01234567"
	artifact = "the artifact"
)

// A requirement is a job that wants a lease, and what may be wrong with it.
type requirement struct {
	job      providers.Job
	approval string
	artifact string
	policy   string
	dir      string // where approvals are
	file     string // where this one is
	prepare  func(t *testing.T)
}

func newRequirement(t *testing.T) *requirement {
	r := &requirement{artifact: artifact, policy: requirePolicy, dir: t.TempDir(), prepare: func(*testing.T) {}}
	r.job = job(
		providers.Step{ID: "test", Run: "exit 0"},
		providers.Step{Name: "Lint the code", Run: "exit 0"},
		providers.Step{ID: "deploy", Run: "env DEPLOY_KEY"},
		providers.Step{ID: "after", If: "failure()", Run: "print after"},
	)
	r.job.Subject.SHA, r.job.Subject.Environment = commit, "production"
	r.approval = fmt.Sprintf("version: 1\nrepository: acme/app\nsha: %s\nby: alice\nartifacts: [sha256:%x]\n", commit, sha256.Sum256([]byte(artifact)))
	r.file = filepath.Join(r.dir, "acme", "app", commit+".yaml")
	return r
}

// run runs the job, and says whether its step had the lease.
func (r *requirement) run(t *testing.T) (w *world, result providers.Result, had bool) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(r.file), 0o755); err != nil {
		t.Fatal(err)
	}
	if r.approval != "" {
		if err := os.WriteFile(r.file, []byte(r.approval), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	r.prepare(t)
	w = newWorld(t)
	if r.artifact != "" {
		w.files = map[string]string{sandbox.Workspace + "/dist/app.tar": r.artifact}
	}
	w.offers <- r.job
	p, err := policy.Parse([]byte(strings.ReplaceAll(r.policy, "DIR", r.dir)), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	ctx := lifetime(t)
	if err := w.agent(func(c *runner.Config) { c.Policy = p }).Run(ctx, ctx); err != nil {
		t.Errorf("run: %v", err)
	}
	select {
	case result = <-w.results:
	default:
		t.Fatal("the job was never reported")
	}
	w.clean()
	return w, result, slices.Contains(w.happened(), "issue")
}

// refusals are what is wrong, and what the job's log must say of it.
func refusals() map[string]func(r *requirement) (say string) {
	step := func(i int, change func(*providers.Step)) func(*requirement) {
		return func(r *requirement) { change(&r.job.Steps[i]) }
	}
	with := func(say string, change func(r *requirement)) func(*requirement) string {
		return func(r *requirement) string { change(r); return say }
	}
	replace := func(from, to string) func(*requirement) {
		return func(r *requirement) { r.approval = strings.Replace(r.approval, from, to, 1) }
	}
	return map[string]func(r *requirement) string{
		"a step failed":       with("step test must have passed before deploy, and ended as failure", step(0, func(s *providers.Step) { s.Run, s.ContinueOnError = "exit 1", "true" })),
		"a step was skipped":  with("step Lint the code must have passed before deploy, and ended as skipped", step(1, func(s *providers.Step) { s.If = "false" })),
		"a step is not there": with("step Lint the code must have passed, and none before deploy has that id or name", step(1, func(s *providers.Step) { s.Name = "Lint" })),
		"a step comes later":  with("and none before deploy has that id or name", func(r *requirement) { r.job.Steps[0], r.job.Steps[2] = r.job.Steps[2], r.job.Steps[0] }),
		"another step of that name": with("step Lint the code must have passed before deploy, and ended as skipped", func(r *requirement) {
			r.job.Steps = slices.Insert(r.job.Steps, 2, providers.Step{ID: "x", Name: "Lint the code", Run: "exit 0", If: "false"})
		}),
		"any step failed": with("no step before deploy may have failed, and test ended as failure", func(r *requirement) {
			r.policy = strings.Replace(r.policy, "[test, Lint the code]", "all", 1)
			r.job.Steps[0].Run, r.job.Steps[0].ContinueOnError = "exit 1", "true"
		}),
		"no approval":                        with("no such file", func(r *requirement) { r.approval = "" }),
		"another commit":                     with("it approves commit 1111111111111111111111111111111111111111, and the job is of "+commit, replace(commit, strings.Repeat("1", 40))),
		"a job of another commit":            with("no such file", func(r *requirement) { r.job.Subject.SHA = strings.Repeat("2", 40) }),
		"another repository":                 with(`it approves repository "acme/other"`, replace("acme/app", "acme/other")),
		"a job of another repository":        with("no such file", func(r *requirement) { r.job.Subject.Repository = "evil/app" }),
		"an approval that is over":           with("it was good until 2020-01-01T00:00:00Z", replace("by:", "until: 2020-01-01T00:00:00Z\nby:")),
		"an approval that is not understood": with(`unknown key "shaa"`, replace("sha:", "shaa:")),
		"an approval of any size":            with("it has more than 65536 bytes", func(r *requirement) { r.approval += "#" + strings.Repeat("x", 64<<10) }),
		"another artifact":                   with("which approval", func(r *requirement) { r.artifact = "something else" }),
		"no artifact":                        with("artifact dist/app.tar: ", func(r *requirement) { r.artifact = "" }),
		"no artifact is named":               with("does not name", func(r *requirement) { r.approval, _, _ = strings.Cut(r.approval, "artifacts") }),
		"another environment":                with("environment production is required, and the job was released for staging", func(r *requirement) { r.job.Subject.Environment = "staging" }),
		"a provider that is silent":          with("ci does not say that it released the job for any", func(r *requirement) { r.job.Subject.Environment = "" }),
	}
}

// TestRequires: what a lease requires is looked at before its step, and whatever is
// not so fails the step with the reason, and nothing is issued.
func TestRequires(t *testing.T) {
	t.Parallel()
	r := newRequirement(t)
	w, result, had := r.run(t)
	if result.Conclusion != providers.Success || !had || !strings.Contains(w.shown(), "***") {
		t.Errorf("with all that is required: got %+v, issued %t; log:\n%s", result, had, w.shown())
	}
	required(t, w, "ok", map[string]string{"approved_by": "alice", "artifact": "dist/app.tar", "artifact_digest": fmt.Sprintf("sha256:%x", sha256.Sum256([]byte(artifact)))})
	for name, spoil := range refusals() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRequirement(t)
			say := spoil(r)
			w, result, had := r.run(t)
			if result.Conclusion != providers.Failure || had || strings.Contains(w.shown(), "pw-") {
				t.Errorf("got %+v, issued %t; log:\n%s", result, had, w.shown())
			}
			if !strings.Contains(w.shown(), "lease key is refused: ") || !strings.Contains(w.shown(), say) {
				t.Errorf("the log does not say %q:\n%s", say, w.shown())
			}
			if !strings.Contains(w.shown(), "after\n") {
				t.Errorf("the step for failures did not run:\n%s", w.shown())
			}
			required(t, w, say, nil)
		})
	}
}

// required looks for the record of what was required.
func required(t *testing.T, w *world, say string, detail map[string]string) {
	t.Helper()
	for _, e := range w.events {
		if e.Action != "lease.require" {
			continue
		}
		if !strings.Contains(e.Result, say) || e.Detail["requires"] == "" {
			t.Errorf("the record says %+v, want %q", e, say)
		}
		for k, v := range detail {
			if e.Detail[k] != v {
				t.Errorf("the record says %s %q, want %q", k, e.Detail[k], v)
			}
		}
		return
	}
	t.Error("nothing is recorded")
}

// TestApprovalOwner: an approval that somebody else can write is none.
func TestApprovalOwner(t *testing.T) {
	t.Parallel()
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, tt := range map[string]struct {
		say     string
		prepare func(t *testing.T, r *requirement)
	}{
		"written by a group":      {"others can write it", func(t *testing.T, r *requirement) { must(t, os.Chmod(r.file, 0o664)) }},
		"of another user":         {"neither to root nor to the agent", func(t *testing.T, r *requirement) { must(t, os.Chown(r.file, 4711, 0)) }},
		"in a directory of all":   {"others can write it", func(t *testing.T, r *requirement) { must(t, os.Chmod(r.dir, 0o777)) }},
		"in somebody's directory": {"neither to root nor to the agent", func(t *testing.T, r *requirement) { must(t, os.Chown(filepath.Dir(r.file), 4711, 0)) }},
		"a link": {"too many levels of symbolic links", func(t *testing.T, r *requirement) {
			must(t, os.Rename(r.file, r.file+".real"))
			must(t, os.Symlink(r.file+".real", r.file))
		}},
		"below a link": {"it is no directory, or a link", func(t *testing.T, r *requirement) {
			must(t, os.Rename(filepath.Join(r.dir, "acme"), filepath.Join(r.dir, "real")))
			must(t, os.Symlink("real", filepath.Join(r.dir, "acme")))
		}},
		"with a second name": {"it has 2 names", func(t *testing.T, r *requirement) { must(t, os.Link(r.file, r.file+".other")) }},
		"a directory": {"it is no regular file", func(t *testing.T, r *requirement) {
			must(t, os.Remove(r.file))
			must(t, os.Mkdir(r.file, 0o755))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRequirement(t)
			r.prepare = func(t *testing.T) { tt.prepare(t, r) }
			w, result, had := r.run(t)
			if result.Conclusion != providers.Failure || had || !strings.Contains(w.shown(), tt.say) {
				t.Errorf("got %+v, issued %t, want %q; log:\n%s", result, had, tt.say, w.shown())
			}
		})
	}
}

// TestRequiresOfJob: a lease of the whole job is asked for, and refused, before any
// step runs.
func TestRequiresOfJob(t *testing.T) {
	t.Parallel()
	r := newRequirement(t)
	r.policy = strings.NewReplacer("        step: deploy\n", "", "          steps: [test, Lint the code]\n", "", "          artifact: dist/app.tar\n", "").Replace(r.policy)
	if w, result, had := r.run(t); result.Conclusion != providers.Success || !had {
		t.Errorf("approved: got %+v, issued %t; log:\n%s", result, had, w.shown())
	}
	r = newRequirement(t)
	r.policy = strings.NewReplacer("        step: deploy\n", "", "          steps: [test, Lint the code]\n", "", "          artifact: dist/app.tar\n", "").Replace(r.policy)
	r.job.Subject = creds.Subject{Provider: "ci", Repository: "acme/app", SHA: strings.Repeat("3", 40), Job: "build"}
	if w, result, had := r.run(t); result.Conclusion != providers.Failure || had || slices.Contains(w.happened(), "box.run") {
		t.Errorf("not approved: got %+v, issued %t; log:\n%s", result, had, w.shown())
	}
}
