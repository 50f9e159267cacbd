package gitcache_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/runner/gitcache"
)

// The second job's clone transfers what the first one's cache does not have, and
// without the cache it transfers all.
func TestCloneCostsWhatChanged(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	repo := w.repository("big", 5, 1<<20)
	sha := w.git(repo, "rev-parse", "HEAD")
	dir, e := w.job(w.want("big", "branch", sha))
	if e.Err != nil || !w.has(dir, sha) || e.Size < 5<<20 {
		t.Fatalf("the first job: event %+v, has the commit %v", e, w.has(dir, sha))
	}
	w.everybodyReads(dir)
	w.commit(repo, "new", 1000)
	with, without := w.clone(dir, "big"), w.clone("", "big")
	t.Logf("with the cache %d bytes, without %d", with, without)
	if with > 50_000 || without < 5<<20 {
		t.Errorf("with the cache %d bytes, without %d: want less than 50,000 and more than 5 MiB", with, without)
	}
}

// A tier, a repository and a provider have caches of their own.
func TestKeysKeepApart(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	repo := w.repository("one", 1, 1000)
	sha := w.git(repo, "rev-parse", "HEAD")
	want := w.want("one", "protected", sha)
	dir, e := w.job(want)
	if e.Err != nil || !w.has(dir, sha) {
		t.Fatalf("%+v", e)
	}
	fork, other, provider := want, want, want
	fork.Tier, other.Repository, provider.Provider = "fork", "acme/two", "other"
	hanging := make(chan struct{})
	defer close(hanging)
	w.hang(hanging) // so that their own fillings bring nothing
	for name, want := range map[string]gitcache.Want{"tier": fork, "repository": other, "provider": provider} {
		dir, done, err := w.cache.Prepare(t.Context(), want)
		if err != nil {
			t.Fatal(err)
		}
		defer done()
		if w.has(dir, sha) {
			t.Errorf("a job of another %s sees the objects", name)
		}
	}
	if os.Geteuid() == 0 {
		owner := func(dir string) string {
			return w.git(w.dir, "-c", "alias.owner=!stat -c %u "+dir+"/repository.git/objects", "owner")
		}
		forkDir, done, err := w.cache.Prepare(t.Context(), fork)
		if err != nil {
			t.Fatal(err)
		}
		defer done()
		if a, b := owner(dir), owner(forkDir); a == b || a == "0" || b == "0" {
			t.Errorf("git runs as users %s and %s, want two and none of them root", a, b)
		}
	}
}

// The token reaches the server, and nothing that a process or a file shows.
func TestToken(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	w.token = "sesame-" + strings.Repeat("x", 20)
	repo := w.repository("private", 1, 1000)
	sha := w.git(repo, "rev-parse", "HEAD")
	dir, e := w.job(w.want("private", "branch", sha))
	if e.Err != nil || !w.has(dir, sha) {
		t.Fatalf("with the token: %+v", e)
	}
	err := filepath.WalkDir(w.config.Dir, func(p string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(p)
		if strings.Contains(string(b), "sesame") {
			t.Errorf("%s holds the token", p)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	w.token = "another"
	want := w.want("private", "fork", sha)
	w.token = "sesame"
	if _, e := w.job(want); e.Err == nil || strings.Contains(e.Err.Error(), "another") {
		t.Errorf("with a wrong token: got %v, want an error that does not hold it", e.Err)
	}
}

// What is there is not fetched again, and a job does not wait for what is not.
func TestPrepareDoesNotWait(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	repo := w.repository("one", 1, 1000)
	sha := w.git(repo, "rev-parse", "HEAD")
	w.job(w.want("one", "branch", sha))
	asked := w.asked.Load()
	_, done, err := w.cache.Prepare(t.Context(), w.want("one", "branch", sha))
	if err != nil {
		t.Fatal(err)
	}
	done()
	if err := w.cache.Close(); err != nil {
		t.Fatal(err)
	}
	if n := w.asked.Load() - asked; n != 0 {
		t.Errorf("the server was asked %d times for what the cache has", n)
	}
	w.start()
	w.hang(t.Context().Done())
	if _, done, err = w.cache.Prepare(t.Context(), w.want("one", "branch", "")); err != nil {
		t.Fatal(err)
	}
	done()
}

// A second agent does not get the directory of the first.
func TestOneAgent(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	if _, err := gitcache.New(w.config); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("got %v", err)
	}
}
