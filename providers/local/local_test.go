package local

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/providertest"
)

const ciFile = ".github/workflows/ci.yml"

func flow(command string) string {
	return "on: push\njobs:\n  build:\n    runs-on: linux\n    steps:\n      - run: " + command + "\n"
}

// git runs git in dir without anybody's settings.
func git(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.Command("git", append([]string{"-C", dir, "-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "init.defaultBranch=main"}, args...)...)
	cmd.Env = append(gitEnvironment(), "HOME="+t.TempDir(), "GIT_ALLOW_PROTOCOL=file")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("git %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
}

func commit(t *testing.T, dir, text string) string {
	t.Helper()
	write(t, filepath.Join(dir, ciFile), text)
	git(t, dir, "add", "-A")
	git(t, dir, "commit", "-q", "--allow-empty", "-m", "x")
	return git(t, dir, "rev-parse", "HEAD")
}

// repository makes one with a commit on main.
func repository(t *testing.T, text string) (dir, sha string) {
	t.Helper()
	dir = t.TempDir()
	git(t, dir, "init", "-q")
	return dir, commit(t, dir, text)
}

func open(t *testing.T, c Config) *Provider {
	t.Helper()
	p, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func submit(t *testing.T, dir string, j Job) string {
	t.Helper()
	id, err := Submit(dir, j)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestConformance(t *testing.T) {
	t.Parallel()
	providertest.Run(t, func(t *testing.T) providertest.Service {
		dir, repo := t.TempDir(), t.TempDir()
		git(t, repo, "init", "-q")
		return providertest.Service{
			New: func() (providers.Provider, error) { return New(Config{Dir: dir}) },
			Submit: func(command string) (string, error) {
				name := strings.ReplaceAll(command, " ", "-") + ".yml"
				err := os.WriteFile(filepath.Join(repo, name), []byte(flow(command)), 0o644)
				if err != nil {
					return "", err
				}
				return Submit(dir, Job{Repository: repo, Workflow: name, Worktree: true})
			},
			SubmitBad: func() (string, error) {
				return Submit(dir, Job{Repository: repo, Workflow: "absent.yml", Worktree: true})
			},
			Cancel: func(id string) error { return Cancel(dir, id) },
			Reports: func(id string) ([]providers.Result, error) {
				r, err := ReadResult(dir, id)
				if errors.Is(err, fs.ErrNotExist) {
					return nil, nil
				}
				return []providers.Result{r.Result}, err
			},
			Log: func(id string) ([]byte, map[int]providers.StepState, error) {
				f, err := OpenLog(dir, id)
				if err != nil {
					return nil, nil, err
				}
				b, err := io.ReadAll(f)
				steps, serr := ReadSteps(dir, id)
				states := map[int]providers.StepState{}
				for _, s := range steps {
					states[s.Index] = s
				}
				return b, states, errors.Join(err, f.Close(), serr)
			},
			Notes: func(id string) ([]providers.Annotation, []byte, error) { return ReadNotes(dir, id) },
		}
	})
}

func TestJobFromACommit(t *testing.T) {
	t.Parallel()
	repo, sha := repository(t, flow("echo committed"))
	write(t, filepath.Join(repo, ciFile), flow("echo worktree"))
	dir := filepath.Join(t.TempDir(), "spool")
	p := open(t, Config{Dir: dir})
	for name, c := range map[string]struct {
		job  Job
		run  string
		want string // of the sha
	}{
		"ref":      {Job{Ref: "refs/heads/main"}, "echo committed", sha},
		"sha":      {Job{SHA: sha, Ref: "refs/tags/anything"}, "echo committed", sha},
		"worktree": {Job{Worktree: true}, "echo worktree", ""},
		"both":     {Job{Worktree: true, Ref: "refs/heads/main"}, "echo worktree", sha},
	} {
		c.job.Repository, c.job.Workflow, c.job.URL, c.job.Actor, c.job.Inputs = repo, ciFile, "file:///x", "mona", map[string]any{"a": "b"}
		id := submit(t, dir, c.job)
		job, err := p.Claim(t.Context(), "c-"+name, providers.Offer{ID: id})
		if err != nil {
			t.Errorf("%s: Claim = %v", name, err)
			continue
		}
		s := job.Subject
		if job.Steps[0].Run != c.run || s.SHA != c.want || s.Ref != c.job.Ref || s.Repository != repo || s.Workflow != ciFile || s.Job != "build" || s.Event != "push" || s.Provider != Name {
			t.Errorf("%s: runs %q as %+v, want %q at %q", name, job.Steps[0].Run, s, c.run, c.want)
		}
		if job.Trust != providers.TrustLocal || !job.ByName || string(job.Ref) != id || job.Subject.Actor != "mona" || job.Env.Vars["CI"] != "true" || job.Labels[0] != "linux" {
			t.Errorf("%s: job = %+v", name, job)
		}
		github, _ := job.Contexts["github"].(map[string]any)
		event, _ := github["event"].(map[string]any)
		inputs, _ := event["inputs"].(map[string]any)
		if github["run_id"] != id || github["repositoryUrl"] != "file:///x" || github["run_number"] != "1" || inputs["a"] != "b" {
			t.Errorf("%s: github = %v", name, github)
		}
	}
}

// A branch moves between two claims of one name, and another one's file is
// gone: the job stays what it was.
func TestClaimIsRecorded(t *testing.T) {
	t.Parallel()
	repo, sha := repository(t, flow("echo first"))
	dir := t.TempDir()
	id := submit(t, dir, Job{Repository: repo, Workflow: ciFile, Ref: "refs/heads/main"})
	if _, err := open(t, Config{Dir: dir}).Claim(t.Context(), "c", providers.Offer{ID: id}); err != nil {
		t.Fatal(err)
	}
	commit(t, repo, flow("echo second"))
	job, err := open(t, Config{Dir: dir}).Claim(t.Context(), "c", providers.Offer{ID: id})
	if err != nil || job.Subject.SHA != sha || job.Steps[0].Run != "echo first" {
		t.Errorf("second Claim = %q at %s, %v; want the first commit %s", job.Steps[0].Run, job.Subject.SHA, err, sha)
	}
}

func TestResult(t *testing.T) {
	t.Parallel()
	repo, sha := repository(t, flow("echo x"))
	dir := t.TempDir()
	p := open(t, Config{Dir: dir})
	id := submit(t, dir, Job{Repository: repo, Workflow: ciFile, Ref: "refs/heads/main"})
	waited := make(chan Result, 1)
	go func() {
		r, err := Wait(t.Context(), dir, id)
		if err != nil {
			t.Errorf("Wait: %v", err)
		}
		waited <- r
	}()
	before := time.Now()
	if _, err := p.Claim(t.Context(), "c", providers.Offer{ID: id}); err != nil {
		t.Fatal(err)
	}
	want := providers.Result{Conclusion: providers.Failure, Reason: "r", Outputs: map[string]string{"o": "v"}}
	if err := errors.Join(Cancel(dir, id), p.Complete(t.Context(), "c", nil, want)); err != nil {
		t.Fatal(err)
	}
	r := <-waited
	if r.ID != id || r.Name != "c" || r.SHA != sha || r.Conclusion != want.Conclusion || r.Reason != "r" || r.Outputs["o"] != "v" {
		t.Errorf("result = %+v, want %+v of %s claimed as c", r, want, id)
	}
	if r.ClaimedAt.Before(before) || r.AnsweredAt.Before(r.ClaimedAt) || r.CompletedAt.Before(r.AnsweredAt) {
		t.Errorf("claimed at %v, answered at %v, completed at %v; want them after %v in that order", r.ClaimedAt, r.AnsweredAt, r.CompletedAt, before)
	}
	for _, part := range []string{dirNew, dirClaimed, dirCancel} {
		if left, err := os.ReadDir(filepath.Join(dir, part)); err != nil || len(left) > 0 {
			t.Errorf("%s holds %v, %v after the job; want nothing", part, left, err)
		}
	}
	ended, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := Wait(ended, dir, "absent"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait for a job that never ends = %v, want the ctx's error", err)
	}
}

func TestOldestFirst(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	p := open(t, Config{Dir: dir})
	for i, id := range []string{"b", "a", "c"} {
		file := filepath.Join(dir, dirNew, id+extension)
		write(t, file, "{}")
		at := time.Now().Add(time.Duration(i-10) * time.Second)
		if err := os.Chtimes(file, at, at); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{".hidden.json", "no-suffix", "bad id.json", "-x.json", strings.Repeat("x", 65) + ".json"} {
		write(t, filepath.Join(dir, dirNew, name), "{}")
	}
	if err := os.Mkdir(filepath.Join(dir, dirNew, "dir.json"), 0o755); err != nil {
		t.Fatal(err)
	}
	got := ""
	for range 3 {
		o, err := p.Poll(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		got += o.ID
	}
	if got != "bac" {
		t.Errorf("offers in the order %q, want the oldest first: bac", got)
	}
	soon, stop := context.WithTimeout(t.Context(), rescan/10)
	defer stop()
	if o, err := p.Poll(soon); err == nil {
		t.Errorf("offered again at once: %+v; want an agent to have time to claim it", o)
	}
	// None was claimed: after a second they are on offer again, and only they.
	ctx, cancel := context.WithTimeout(t.Context(), 5*rescan)
	defer cancel()
	if o, err := p.Poll(ctx); err != nil || o.ID != "b" {
		t.Errorf("an offer that nobody claimed: Poll = %+v, %v; want b again", o, err)
	}
}

func TestHeartbeat(t *testing.T) {
	t.Parallel()
	repo, _ := repository(t, flow("echo x"))
	dir := t.TempDir()
	p := open(t, Config{Dir: dir})
	id := submit(t, dir, Job{Repository: repo, Workflow: ciFile, Ref: "refs/heads/main"})
	if _, err := p.Claim(t.Context(), "c", providers.Offer{ID: id}); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, dirClaimed, "c", "heartbeat")
	for range 2 { // the first makes it
		old := time.Now().Add(-time.Hour)
		_ = os.Chtimes(file, old, old)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if err := p.Watch(ctx, "c", nil); err != nil {
			t.Errorf("Watch = %v", err)
		}
		cancel()
		if info, err := os.Stat(file); err != nil || time.Since(info.ModTime()) > time.Minute {
			t.Errorf("heartbeat: %v, %v; want it to be now", info, err)
		}
	}
	if err := p.Watch(t.Context(), "never-claimed", nil); !errors.Is(err, providers.ErrGone) {
		t.Errorf("Watch of no claim = %v, want ErrGone", err)
	}
}

func TestLabels(t *testing.T) {
	t.Parallel()
	repo, _ := repository(t, flow("echo x"))
	dir := t.TempDir()
	for label, want := range map[string]error{"linux": nil, "large": providers.ErrBadJob} {
		id := submit(t, dir, Job{Repository: repo, Workflow: ciFile, Ref: "refs/heads/main"})
		p := open(t, Config{Dir: dir, Labels: []string{label}})
		if _, err := p.Claim(t.Context(), "c-"+label, providers.Offer{ID: id}); !errors.Is(err, want) {
			t.Errorf("agent with the label %q: Claim = %v, want %v", label, err, want)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "file")
	write(t, file, "")
	linked := t.TempDir()
	if err := os.Symlink(t.TempDir(), filepath.Join(linked, dirDone)); err != nil {
		t.Fatal(err)
	}
	for name, dir := range map[string]string{"nothing": "", "a file": file, "a part that is a link": linked} {
		if _, err := New(Config{Dir: dir}); err == nil {
			t.Errorf("New with %s as its spool = nil, want an error", name)
		}
	}
}

func TestProviderIsNamedAsConfigured(t *testing.T) {
	t.Parallel()
	repo, _ := repository(t, flow("echo"))
	for configured, want := range map[string]string{"": Name, "builds": "builds"} {
		spool := t.TempDir()
		p := open(t, Config{Dir: spool, Provider: configured})
		submit(t, spool, Job{Repository: repo, Ref: "refs/heads/main", Workflow: ciFile})
		offer, err := p.Poll(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		job, err := p.Claim(t.Context(), "mf-1", offer)
		if err != nil || job.Subject.Provider != want {
			t.Errorf("configured as %q: the policy is asked about provider %q (%v), want %q", configured, job.Subject.Provider, err, want)
		}
	}
}
