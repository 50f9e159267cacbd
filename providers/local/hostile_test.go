package local

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/mayfly-ci/mayfly/providers"
)

// refused claims what lies in new/ID.json and wants it to be refused for that
// reason, with the claim standing, and to be completed like any other.
func refused(t *testing.T, p *Provider, id, want string) {
	t.Helper()
	name := "c-" + strings.ToLower(id)
	job, err := p.Claim(t.Context(), name, providers.Offer{ID: id})
	if !errors.Is(err, providers.ErrBadJob) || !strings.Contains(err.Error(), want) {
		t.Errorf("%s: Claim = %v, want ErrBadJob with %q", id, err, want)
	}
	if string(job.Ref) != id {
		t.Errorf("%s: Job.Ref = %q beside the error, want the id", id, job.Ref)
	}
	if _, again := p.Claim(t.Context(), name, providers.Offer{ID: id}); again == nil || err == nil || again.Error() != err.Error() {
		t.Errorf("%s: claimed again: %v, want the same error %v", id, again, err)
	}
	if err := p.Complete(t.Context(), name, nil, providers.Result{Conclusion: providers.Failure, Reason: err.Error()}); err != nil {
		t.Errorf("%s: Complete = %v", id, err)
	}
	if r, err := ReadResult(p.config.Dir, id); err != nil || !strings.Contains(r.Reason, want) {
		t.Errorf("%s: result %+v, %v; want the reason", id, r, err)
	}
	if left, err := os.ReadDir(filepath.Join(p.config.Dir, dirClaimed)); err != nil || len(left) > 0 {
		t.Errorf("%s: claims left: %v, %v", id, left, err)
	}
}

func TestBadJobFiles(t *testing.T) {
	t.Parallel()
	repo, sha := repository(t, flow("echo x"))
	p := open(t, Config{Dir: t.TempDir()})
	good := fmt.Sprintf(`{"repository":%q,"sha":%q,"workflow":%q`, repo, sha, ciFile)
	outside := filepath.Join(t.TempDir(), "out.yml")
	write(t, outside, flow("echo outside"))
	if err := errors.Join(os.Symlink(outside, filepath.Join(repo, "out.yml")), syscall.Mkfifo(filepath.Join(repo, "fifo"), 0o644)); err != nil {
		t.Fatal(err)
	}
	for id, c := range map[string]struct{ text, want string }{
		"empty":     {"", "byte 0 of 0"},
		"truncated": {good, "unexpected EOF"},
		"unknown":   {good + `,"secrets":{}}`, `unknown field "secrets"`},
		"two":       {good + "}{}", "more than one value"},
		"array":     {"[]", "cannot unmarshal"},
		"big":       {good + `,"actor":"` + strings.Repeat("x", maxJob) + `"}`, "more than 65536 bytes"},
		"control":   {good + `,"actor":"a\nb"}`, "actor: it has control characters"},
		"relative":  {`{"repository":"../x","sha":"` + sha + `","workflow":"w"}`, "repository"},
		"dots":      {fmt.Sprintf(`{"repository":"%s/../x","sha":%q,"workflow":"w"}`, repo, sha), "repository"},
		"noname":    {`{"repository":"owner/repo","sha":"` + sha + `","workflow":"w"}`, "repository"},
		"norepo":    {`{"repository":"/nonexistent/x","sha":"` + sha + `","workflow":"w"}`, "no such directory"},
		"traversal": {strings.Replace(good, ciFile, "../../etc/passwd", 1) + "}", "workflow"},
		"absolute":  {strings.Replace(good, ciFile, "/etc/passwd", 1) + "}", "workflow"},
		"nofile":    {strings.Replace(good, ciFile, "absent.yml", 1) + "}", "there is no file absent.yml in commit"},
		"isdir":     {strings.Replace(good, ciFile, ".github", 1) + "}", "there is no file .github in commit"},
		"shortsha":  {strings.Replace(good, sha, sha[:8], 1) + "}", "sha"},
		"option":    {strings.Replace(good, sha, "--help", 1) + "}", "sha"},
		"nosha":     {strings.Replace(good, sha, strings.Repeat("0", 40), 1) + "}", "there is no commit"},
		"blobsha":   {strings.Replace(good, sha, git(t, repo, "rev-parse", "HEAD:"+ciFile), 1) + "}", "there is no commit"},
		"treesha":   {strings.Replace(good, sha, git(t, repo, "rev-parse", "HEAD^{tree}"), 1) + "}", "there is no commit"},
		"noref":     {fmt.Sprintf(`{"repository":%q,"workflow":%q}`, repo, ciFile), "neither a ref nor a sha"},
		"shortref":  {fmt.Sprintf(`{"repository":%q,"workflow":%q,"ref":"main"}`, repo, ciFile), "full name"},
		"absentref": {fmt.Sprintf(`{"repository":%q,"workflow":%q,"ref":"refs/heads/x"}`, repo, ciFile), "there is no commit refs/heads/x"},
		"operator":  {fmt.Sprintf(`{"repository":%q,"workflow":%q,"ref":"refs/heads/main~1"}`, repo, ciFile), "full name"},
		"nojob":     {good + `,"job":"other"}`, `there is no job "other"`},
		"notarepo":  {fmt.Sprintf(`{"repository":%q,"sha":%q,"workflow":%q}`, t.TempDir(), sha, ciFile), "git: fatal: not a git repository"},
		"wtlink":    {fmt.Sprintf(`{"repository":%q,"worktree":true,"workflow":"out.yml"}`, repo), "escapes"},
		"wtfifo":    {fmt.Sprintf(`{"repository":%q,"worktree":true,"workflow":"fifo"}`, repo), "not a regular file"},
	} {
		write(t, filepath.Join(p.config.Dir, dirNew, id+extension), c.text)
		refused(t, p, id, c.want)
	}
}

func TestBadWorkflowsAreNamed(t *testing.T) {
	t.Parallel()
	repo, _ := repository(t, flow("${{ nope }}"))
	git(t, repo, "checkout", "-q", "-b", "big")
	commit(t, repo, flow("x")+strings.Repeat("# 10 MB\n", 10<<17))
	p := open(t, Config{Dir: t.TempDir()})
	for ref, want := range map[string]string{
		"refs/heads/main": ciFile + ":6:14: expression", "refs/heads/big": "has 10485",
	} {
		refused(t, p, submit(t, p.config.Dir, Job{Repository: repo, Workflow: ciFile, Ref: ref}), want)
	}
	refused(t, p, submit(t, p.config.Dir, Job{Repository: repo, Workflow: ciFile, Worktree: true}), "1 MiB")
}

// What is no file, or not whoever's it must be, is refused and never opened:
// the fifo would block, the links lead to a good job of another.
func TestJobFilesThatAreNone(t *testing.T) {
	t.Parallel()
	repo, sha := repository(t, flow("echo x"))
	p := open(t, Config{Dir: t.TempDir()})
	inNew := func(name string) string { return filepath.Join(p.config.Dir, dirNew, name) }
	text := fmt.Sprintf(`{"repository":%q,"sha":%q,"workflow":%q}`, repo, sha, ciFile)
	outside := filepath.Join(t.TempDir(), "job.json")
	write(t, outside, text)
	write(t, inNew(".inside"), text)
	write(t, inNew("owner.json"), text)
	err := errors.Join(
		os.Symlink(outside, inNew("link-out.json")),
		os.Symlink("../../"+dirNew+"/.inside", inNew("link-in.json")),
		os.Link(outside, inNew("hard.json")),
		syscall.Mkfifo(inNew("fifo.json"), 0o644),
		os.Mkdir(inNew("dir.json"), 0o755),
		os.Chown(inNew("owner.json"), 12345, 12345),
	)
	if err != nil {
		t.Fatalf("this test needs root, for chown: %v", err)
	}
	for id, want := range map[string]string{
		"link-out": "not a regular file", "link-in": "not a regular file", "fifo": "not a regular file", "dir": "not a regular file",
		"hard": "has 2 names", "owner": "belongs to user 12345",
	} {
		refused(t, p, id, want)
	}
	// The same text as a file of the owner's is a good job.
	write(t, inNew("good.json"), text)
	if _, err := p.Claim(t.Context(), "c-good", providers.Offer{ID: "good"}); err != nil {
		t.Errorf("the same job as a plain file: %v", err)
	}
}

// Two jobs of one id: the first keeps it, and the second can neither change
// its result nor be run.
func TestDuplicateID(t *testing.T) {
	t.Parallel()
	repo, sha := repository(t, flow("echo x"))
	p := open(t, Config{Dir: t.TempDir()})
	text := fmt.Sprintf(`{"repository":%q,"sha":%q,"workflow":%q}`, repo, sha, ciFile)
	file := filepath.Join(p.config.Dir, dirNew, "same.json")
	write(t, file, text)
	if _, err := p.Claim(t.Context(), "first", providers.Offer{ID: "same"}); err != nil {
		t.Fatal(err)
	}
	write(t, file, text)
	if _, err := p.Claim(t.Context(), "second", providers.Offer{ID: "same"}); !errors.Is(err, providers.ErrGone) {
		t.Errorf("second job of the id: Claim = %v, want ErrGone", err)
	}
	write(t, file, text)
	if err := p.rename("third", "same"); err != nil { // an agent that died at once
		t.Fatal(err)
	}
	for _, name := range []string{"second", "third", "first"} {
		c := map[string]providers.Conclusion{"first": providers.Success}[name]
		if err := p.Complete(t.Context(), name, nil, providers.Result{Conclusion: c}); err != nil {
			t.Errorf("Complete of %s = %v", name, err)
		}
	}
	if r, err := ReadResult(p.config.Dir, "same"); err != nil || r.Name != "first" || r.Conclusion != providers.Success {
		t.Errorf("result = %+v, %v; want the first's", r, err)
	}
	for _, name := range []string{"second", "third"} {
		if _, err := os.Stat(filepath.Join(p.config.Dir, dirDone, "same", "duplicate-"+name+".json")); err != nil {
			t.Errorf("the job of %s is not kept: %v", name, err)
		}
	}
}

func TestHostileNames(t *testing.T) {
	t.Parallel()
	p := open(t, Config{Dir: t.TempDir()})
	for _, name := range []string{"", "..", "../x", "A", "a/b", "a.b", strings.Repeat("a", 41), "a\x00"} {
		_, cerr := p.Claim(t.Context(), name, providers.Offer{ID: "x"})
		_, lerr := p.Log(t.Context(), name, nil)
		for call, err := range map[string]error{
			"Claim": cerr, "Log": lerr, "Watch": p.Watch(t.Context(), name, nil), "Complete": p.Complete(t.Context(), name, nil, providers.Result{}),
		} {
			if err == nil || errors.Is(err, providers.ErrGone) {
				t.Errorf("%s with the name %q = %v, want it to be refused", call, name, err)
			}
		}
	}
	for _, id := range []string{"", "..", "../new", "a/b"} {
		_, rerr := ReadResult(p.config.Dir, id)
		if err := Cancel(p.config.Dir, id); err == nil || rerr == nil {
			t.Errorf("id %q: Cancel = %v, ReadResult = %v; want both refused", id, err, rerr)
		}
	}
}
