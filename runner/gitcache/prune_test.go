package gitcache_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/runner/gitcache"
)

// eventually asks until ok says yes.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

func exists(p string) bool {
	_, err := os.Stat(p)
	return err == nil
}

// The repository that was used the longest ago goes when there is no room, and
// none goes that a box reads.
func TestPruneBySize(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *gitcache.Config) { c.Size = 5 << 20 })
	dirs := map[string]string{}
	fill := func(name string) (done func()) {
		sha := w.git(w.repository(name, 1, 2<<20), "rev-parse", "HEAD")
		dir, done, err := w.cache.Prepare(t.Context(), w.want(name, "branch", sha))
		if err != nil {
			t.Fatal(err)
		}
		if e := w.event(); e.Err != nil {
			t.Fatal(e.Err)
		}
		dirs[name] = dir
		return done
	}
	inUse := fill("in-use")
	fill("old")()
	fill("third")()
	eventually(t, "the repository that nobody uses goes", func() bool { return !exists(dirs["old"]) })
	if !exists(dirs["in-use"]) || !exists(dirs["third"]) {
		t.Error("a repository went that a box reads, or one that was used later")
	}
	inUse()
}

// What no job used for long goes at the next occasion, and at the start.
func TestPruneByAge(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *gitcache.Config) { c.Age = time.Hour })
	sha := w.git(w.repository("one", 1, 1000), "rev-parse", "HEAD")
	dir, e := w.job(w.want("one", "branch", sha))
	if e.Err != nil {
		t.Fatal(e.Err)
	}
	if err := w.cache.Close(); err != nil {
		t.Fatal(err)
	}
	key := filepath.Dir(dir)
	old := time.Now().Add(-2 * time.Hour)
	half := filepath.Join(w.config.Dir, ".new-123")
	if err := os.Mkdir(half, 0o700); err != nil {
		t.Fatal(err)
	}
	if !exists(key) {
		t.Fatal("it went too early")
	}
	if err := os.Chtimes(key, old, old); err != nil {
		t.Fatal(err)
	}
	w.start()
	eventually(t, "what is old goes, and what is half", func() bool { return !exists(key) && !exists(half) })
}

// Many small packs become one when nobody reads them, and what no ref reaches
// goes; a job that comes meanwhile ends that and sees a whole repository.
func TestPack(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	repo := w.repository("one", 1, 1000)
	want := w.want("one", "branch", w.git(repo, "rev-parse", "HEAD"))
	dir, keep, err := w.cache.Prepare(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	w.event()
	packs := func() int {
		found, err := filepath.Glob(dir + "/repository.git/objects/pack/*.pack")
		if err != nil {
			t.Fatal(err)
		}
		return len(found)
	}
	var lost string
	for i := range 18 {
		if i == 10 { // somebody takes a commit back
			lost = want.SHA
			w.git(repo, "reset", "-q", "--hard", "HEAD^")
		}
		want.SHA = w.commit(repo, fmt.Sprint("more", i), 1000)
		if _, e := w.job(want); e.Err != nil {
			t.Fatal(e.Err)
		}
	}
	if n := packs(); n < 16 || !w.has(dir, lost) {
		t.Errorf("%d packs while a box reads them, and the lost commit is there: %v; want all", n, w.has(dir, lost))
	}
	keep()
	eventually(t, "one pack", func() bool { return packs() == 1 })
	if err := w.cache.Close(); err != nil {
		t.Fatal(err)
	}
	if !w.has(dir, want.SHA) || w.has(dir, lost) {
		t.Errorf("has the last commit: %v, has the lost one: %v; want yes and no", w.has(dir, want.SHA), w.has(dir, lost))
	}
	if out, err := w.tryGit(w.dir, nil, "--git-dir="+dir+"/repository.git", "fsck", "--full"); err != nil {
		t.Errorf("%v %s", err, out)
	}
}

// A repository of this machine is read as anybody may read it, whoever owns it.
func TestLocal(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	repo := w.repository("one", 1, 1000)
	want := w.want("one", "local", w.git(repo, "rev-parse", "HEAD"))
	want.URL = "file://" + repo
	if dir, e := w.job(want); e.Err != nil || !w.has(dir, want.SHA) {
		t.Errorf("%+v", e)
	}
	if os.Geteuid() != 0 {
		return
	}
	want.SHA = w.commit(repo, "secret", 1000)
	if err := os.Chmod(repo, 0o700); err != nil {
		t.Fatal(err)
	}
	if dir, e := w.job(want); e.Err == nil || w.has(dir, want.SHA) {
		t.Errorf("a repository that only root reads: %+v", e)
	}
}
