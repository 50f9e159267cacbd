package local

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/providers"
)

// A repository whose settings make git run a program when an object is
// missing: the program does run with the environment of a user, and does not
// when the provider reads.
func TestGitRunsNothing(t *testing.T) {
	t.Parallel()
	repo, sha := repository(t, flow("echo x"))
	canary := filepath.Join(t.TempDir(), "canary")
	helper := filepath.Join(t.TempDir(), "helper")
	write(t, helper, "#!/bin/sh\ntouch "+canary+"\n")
	if err := os.Chmod(helper, 0o755); err != nil {
		t.Fatal(err)
	}
	for key, value := range map[string]string{
		"core.repositoryformatversion": "1", "extensions.partialClone": "evil", "remote.evil.promisor": "true",
		"remote.evil.url": "ext::" + helper, "protocol.ext.allow": "always",
		"core.fsmonitor": helper, "core.pager": helper, "core.sshCommand": helper,
	} {
		git(t, repo, "config", key, value)
	}
	missing := strings.Repeat("1", 40)

	user := exec.Command("git", "--git-dir="+repo+"/.git", "cat-file", "-e", missing)
	user.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + t.TempDir()}
	_ = user.Run() // it fails, for the program is no server
	if _, err := os.Stat(canary); err != nil {
		t.Fatalf("the attack does not work with the control off, so this test shows nothing: %v", err)
	}
	if err := os.Remove(canary); err != nil {
		t.Fatal(err)
	}

	p := open(t, Config{Dir: t.TempDir()})
	refused(t, p, submit(t, p.config.Dir, Job{Repository: repo, Workflow: ciFile, SHA: missing}), "there is no commit")
	id := submit(t, p.config.Dir, Job{Repository: repo, Workflow: ciFile, SHA: sha})
	if _, err := p.Claim(t.Context(), "c-honest", providers.Offer{ID: id}); err != nil {
		t.Errorf("a commit that is there: Claim = %v", err)
	}
	if _, err := os.Stat(canary); err == nil {
		t.Error("the repository's settings made git run a program")
	}

	// Versions before 2.45 do not all know GIT_NO_LAZY_FETCH: the other control
	// holds without it.
	old := exec.Command("git", "--git-dir="+repo+"/.git", "cat-file", "-e", missing)
	old.Env = slices.DeleteFunc(gitEnvironment(), func(e string) bool { return e == "GIT_NO_LAZY_FETCH=1" })
	_ = old.Run() // the object is missing
	if _, err := os.Stat(canary); err == nil {
		t.Error("without GIT_NO_LAZY_FETCH git ran a program")
	}
}

// refs/replace would let who can write to the repository give another text
// under a commit's name.
func TestGitIgnoresReplacedObjects(t *testing.T) {
	t.Parallel()
	repo, sha := repository(t, flow("echo honest"))
	evil := commit(t, repo, flow("echo evil"))
	cmd := exec.Command("git", "-C", repo, "replace", sha, evil)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("git replace: %v\n%s", err, out)
	}
	if out, err := exec.Command("git", "-C", repo, "show", sha+":"+ciFile).Output(); err != nil || !strings.Contains(string(out), "evil") {
		t.Fatalf("the attack does not work with the control off: %s, %v", out, err)
	}
	_, text, err := readCommit(t.Context(), repo, sha, ciFile)
	if err != nil || !strings.Contains(text, "honest") {
		t.Errorf("text of the commit = %q, %v; want its own", text, err)
	}
}

func TestGitReadsEveryKindOfRepository(t *testing.T) {
	t.Parallel()
	repo, sha := repository(t, flow("echo x"))
	root := t.TempDir()
	git(t, root, "clone", "-q", "--bare", "--no-local", repo, "owner/bare.git")
	git(t, repo, "worktree", "add", "-q", "--detach", filepath.Join(root, "linked"))
	git(t, repo, "pack-refs", "--all")
	other := filepath.Join(root, "other")
	git(t, root, "clone", "-q", "--no-local", repo, other)
	if err := os.Chown(filepath.Join(other, ".git"), 12345, 12345); err != nil {
		t.Fatalf("this test needs root, for chown: %v", err)
	}
	if err := os.Chown(other, 12345, 12345); err != nil {
		t.Fatal(err)
	}
	p := open(t, Config{Dir: t.TempDir(), Repositories: root})
	for name, repository := range map[string]string{
		"plain": repo, "bare": "owner/bare.git", "linked": "linked", "another-user-s": other,
	} {
		id := submit(t, p.config.Dir, Job{Repository: repository, Workflow: ciFile, Ref: "refs/heads/main"})
		job, err := p.Claim(t.Context(), "c-"+name, providers.Offer{ID: id})
		if err != nil || job.Subject.SHA != sha || job.Subject.Repository != repository {
			t.Errorf("%s: Claim = %s of %q, %v; want %s of %q", name, job.Subject.SHA, job.Subject.Repository, err, sha, repository)
		}
	}
	p = open(t, Config{Dir: t.TempDir(), Repositories: root})
	refused(t, p, submit(t, p.config.Dir, Job{Repository: "owner/../../x", Workflow: ciFile, Ref: "refs/heads/main"}), "repository")
}

// What is not the job's fault is no ErrBadJob, is not recorded, and goes away.
func TestClaimThatIsCutShort(t *testing.T) {
	t.Parallel()
	repo, _ := repository(t, flow("echo x"))
	p := open(t, Config{Dir: t.TempDir()})
	id := submit(t, p.config.Dir, Job{Repository: repo, Workflow: ciFile, Ref: "refs/heads/main"})
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	job, err := p.Claim(ended, "c", providers.Offer{ID: id})
	if !errors.Is(err, context.Canceled) || errors.Is(err, providers.ErrBadJob) || string(job.Ref) != id {
		t.Errorf("Claim = %+v, %v; want the ctx's error and the ref", job, err)
	}
	if _, err := p.Log(t.Context(), "c", nil); !errors.Is(err, providers.ErrGone) {
		t.Errorf("Log of a claim that was cut short = %v, want ErrGone", err)
	}
	if _, err := p.Claim(t.Context(), "c", providers.Offer{ID: id}); err != nil {
		t.Errorf("Claim again = %v, want the job", err)
	}
}
