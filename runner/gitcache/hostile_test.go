package gitcache_test

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/runner/gitcache"
)

// hang makes the server answer nothing until end.
func (w *world) hang(end <-chan struct{}) {
	w.respond(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-end:
		case <-r.Context().Done():
		}
	})
}

func (w *world) respond(h http.HandlerFunc) { w.handle.Store(&h) }

// refused wants the filling to fail with a reason that has the words, a job to go
// on all the same, and the next honest filling to work.
func (w *world) refused(want gitcache.Want, words ...string) {
	w.t.Helper()
	dir, e := w.job(want)
	if e.Err == nil {
		w.t.Errorf("%s was filled: %+v", want.URL, e)
		return
	}
	for _, word := range words {
		if !strings.Contains(e.Err.Error(), word) {
			w.t.Errorf("%s: got %v, want %q in it", want.URL, e.Err, word)
		}
	}
	if left := w.halves(dir); len(left) > 0 {
		w.t.Errorf("%s: %q is left", want.URL, left)
	}
}

// halves are files that a git which was killed leaves.
func (w *world) halves(dir string) []string {
	w.t.Helper()
	var left []string
	err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if n := filepath.Base(p); strings.HasPrefix(n, "tmp_") || strings.HasSuffix(n, ".lock") || strings.HasSuffix(n, ".pack") {
			left = append(left, p)
		}
		return err
	})
	if err != nil {
		w.t.Error(err)
	}
	return left
}

// object writes an object that git itself would not, and returns its name.
func (w *world) object(dir, kind, content string) string {
	w.t.Helper()
	cmd := exec.CommandContext(w.t.Context(), "git", "-c", "safe.directory=*", "hash-object", "-t", kind, "--literally", "-w", "--stdin")
	cmd.Dir = dir
	cmd.Stdin = strings.NewReader(content)
	out, err := cmd.CombinedOutput()
	if err != nil {
		w.t.Fatalf("%v: %s", err, out)
	}
	return string(bytes.TrimSpace(out))
}

// tree is the content of a tree with one entry.
func tree(w *world, mode, name, id string) string {
	raw, err := hex.DecodeString(id)
	if err != nil {
		w.t.Fatal(err)
	}
	return mode + " " + name + "\x00" + string(raw)
}

// Repositories that are made to harm whoever checks them out do not get in.
func TestMalformedObjects(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	for name, make := range map[string]func(dir string) string{
		"dotgit": func(dir string) string {
			return w.object(dir, "tree", tree(w, "40000", ".git", w.object(dir, "tree", tree(w, "100644", "config", w.object(dir, "blob", "x")))))
		},
		"slash": func(dir string) string {
			return w.object(dir, "tree", tree(w, "100644", "../../x", w.object(dir, "blob", "x")))
		},
		"gitmodules": func(dir string) string {
			blob := w.object(dir, "blob", "[submodule \"x\"]\n\tpath = x\n\turl = --upload-pack=touch /tmp/x\n")
			return w.object(dir, "tree", tree(w, "100644", ".gitmodules", blob))
		},
	} {
		repo := w.repository(name, 1, 10)
		commit := w.object(repo, "commit", fmt.Sprintf("tree %s\nauthor a <a@b> 1 +0000\ncommitter a <a@b> 1 +0000\n\nx\n", make(repo)))
		w.git(repo, "update-ref", "refs/heads/main", commit)
		w.refused(w.want(name, "fork", commit), "fsck error")
	}
}

// A repository that is larger than the cache may be ends where the room does.
func TestTooLarge(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *gitcache.Config) { c.Size = 2 << 20 })
	repo := w.repository("big", 1, 16<<20)
	// Slowly enough for the size to be seen.
	w.respond(func(rw http.ResponseWriter, r *http.Request) {
		w.forward(&slowWriter{rw, r.Context().Done()}, r)
	})
	w.refused(w.want("big", "branch", w.git(repo, "rev-parse", "HEAD")), gitcache.ErrTooLarge.Error())
	if size := diskUse(t, w.config.Dir); size > 1<<20 {
		t.Errorf("%d bytes are left", size)
	}
}

// A server that hangs, floods, or leads elsewhere costs its time and no more.
func TestHostileServer(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *gitcache.Config) { c.Time = 2 * time.Second })
	repo := w.repository("one", 1, 1000)
	want := w.want("one", "branch", w.git(repo, "rev-parse", "HEAD"))

	w.hang(t.Context().Done())
	w.refused(want, "time for one filling is over")

	w.respond(func(rw http.ResponseWriter, r *http.Request) { // refs without end
		rw.Header().Set("Content-Type", "application/x-git-upload-pack-advertisement")
		fmt.Fprint(rw, "001e# service=git-upload-pack\n0000")
		for line := "00c4" + strings.Repeat("a", 40) + " refs/heads/" + strings.Repeat("b", 139) + "\n"; r.Context().Err() == nil; {
			if _, err := fmt.Fprint(rw, line); err != nil {
				return
			}
		}
	})
	w.refused(want)

	for _, to := range []string{"file://" + w.dir + "/one.git/.git", "ext::sh -c touch% /tmp/mayfly-ext", "ftp://127.0.0.1/x", w.server.URL + "/one.git/.git/elsewhere"} {
		w.respond(func(rw http.ResponseWriter, r *http.Request) {
			rw.Header().Set("Location", to)
			rw.WriteHeader(http.StatusFound)
		})
		w.refused(want)
	}

	// Nor to another server, which would get the token.
	var elsewhere atomic.Int64
	other := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		elsewhere.Add(1)
		w.forward(rw, r)
	}))
	defer other.Close()
	w.respond(func(rw http.ResponseWriter, r *http.Request) {
		http.Redirect(rw, r, other.URL+r.URL.String(), http.StatusFound)
	})
	w.refused(want)
	if n := elsewhere.Load(); n != 0 {
		t.Errorf("git followed a redirection to another server: %d requests", n)
	}

	w.handle.Store(nil)
	if dir, e := w.job(want); e.Err != nil || !w.has(dir, want.SHA) {
		t.Errorf("afterwards the honest server fills nothing: %+v", e)
	}
}

// A repository that could not be filled is left alone for a while.
func TestPause(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *gitcache.Config) { c.Pause = time.Hour })
	want := w.want("none", "branch", "")
	w.refused(want, "not found")
	asked := w.asked.Load()
	_, done, err := w.cache.Prepare(t.Context(), want)
	if err != nil {
		t.Fatal(err)
	}
	done()
	if err := w.cache.Close(); err != nil {
		t.Fatal(err)
	}
	if n := w.asked.Load() - asked; n != 0 {
		t.Errorf("the server was asked %d times more", n)
	}
}

// What git could take for something else than a ref and an address is not asked.
func TestStrangeNames(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	good := w.want("one", "branch", "")
	for _, ref := range []string{"", "main", "--upload-pack=x", "refs/heads/a:refs/heads/b", "refs/heads/*", "refs/heads/a b", "refs/heads/\n", "refs/../x", "^refs/heads/a", strings.Repeat("refs/", 300)} {
		want := good
		want.Ref = ref
		if _, _, err := w.cache.Prepare(t.Context(), want); !errors.Is(err, gitcache.ErrUnusable) {
			t.Errorf("ref %q: got %v, want ErrUnusable", ref, err)
		}
	}
	for _, url := range []string{"", "ext::sh -c x", "ssh://git@host/x", "-x", "git://host/x", "file://host/x", "file:relative", "https://user:pass@host/x", "https://", "/srv/git/x"} {
		want := good
		want.URL = url
		if _, _, err := w.cache.Prepare(t.Context(), want); !errors.Is(err, gitcache.ErrUnusable) {
			t.Errorf("url %q: got %v, want ErrUnusable", url, err)
		}
	}
	if n := w.asked.Load(); n != 0 {
		t.Errorf("the server was asked %d times", n)
	}
}
