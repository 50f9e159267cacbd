package gitcache_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner/gitcache"
)

// patience bounds every wait of a test.
const patience = 2 * time.Minute

// A world is a git server over http, with repositories, and a cache.
type world struct {
	t      *testing.T
	dir    string // repositories of the server
	server *httptest.Server
	sent   atomic.Int64 // bytes that the server sent
	asked  atomic.Int64 // requests
	token  string       // that the server wants; "" is none
	handle atomic.Pointer[http.HandlerFunc]

	cache  *gitcache.Cache
	config gitcache.Config
	events chan gitcache.Event
}

// open makes directories of a test that other users can pass through.
func open(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for p := dir; p != os.TempDir() && p != "/"; p = filepath.Dir(p) {
		if err := os.Chmod(p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func newWorld(t *testing.T, change func(*gitcache.Config)) *world {
	t.Helper()
	w := &world{t: t, dir: filepath.Join(open(t), "srv"), events: make(chan gitcache.Event, 100)}
	if err := os.Mkdir(w.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	w.server = httptest.NewUnstartedServer(http.HandlerFunc(w.serve))
	w.server.Listener = counting{w.server.Listener, &w.sent}
	w.server.Start()
	t.Cleanup(w.server.Close)
	w.config = gitcache.Config{Dir: filepath.Join(open(t), "cache"), Pause: 1, Note: func(e gitcache.Event) { w.events <- e }}
	if change != nil {
		change(&w.config)
	}
	w.start()
	t.Cleanup(func() {
		if err := w.cache.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
			t.Error(err)
		}
	})
	return w
}

func (w *world) start() {
	w.t.Helper()
	var err error
	if w.cache, err = gitcache.New(w.config); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) serve(rw http.ResponseWriter, r *http.Request) {
	w.asked.Add(1)
	if h := w.handle.Load(); h != nil {
		(*h)(rw, r)
		return
	}
	if _, password, _ := r.BasicAuth(); w.token != "" && password != w.token {
		rw.Header().Set("WWW-Authenticate", "Basic")
		rw.WriteHeader(http.StatusUnauthorized)
		return
	}
	w.forward(rw, r)
}

// counting counts what is written to its connections.
type counting struct {
	net.Listener
	sent *atomic.Int64
}

func (c counting) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return countingConn{conn, c.sent}, nil
}

type countingConn struct {
	net.Conn
	sent *atomic.Int64
}

func (c countingConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.sent.Add(int64(n))
	return n, err
}

// git runs git as a person would, and returns what it prints.
func (w *world) git(dir string, args ...string) string {
	w.t.Helper()
	out, err := w.tryGit(dir, nil, args...)
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

func (w *world) tryGit(dir string, env []string, args ...string) (string, error) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(w.t.Context()), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "git", args...)
	cmd.Dir = dir
	cmd.Env = append([]string{
		"PATH=" + os.Getenv("PATH"), "HOME=/nonexistent", "GIT_CONFIG_NOSYSTEM=1", "GIT_TERMINAL_PROMPT=0",
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@example.org", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@example.org",
		"GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*",
	}, env...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("git %q: %w: %s", args, err, errs.String())
	}
	return strings.TrimSpace(string(out)), nil
}

// repository makes a repository with so many commits of so many random bytes.
func (w *world) repository(name string, commits, size int) string {
	w.t.Helper()
	dir := filepath.Join(w.dir, name+".git")
	w.git(w.dir, "init", "-q", "-b", "main", dir)
	for i := range commits {
		w.commit(dir, fmt.Sprint("f", i), size)
	}
	return dir
}

// commit adds a file of random bytes and returns the commit.
func (w *world) commit(dir, file string, size int) string {
	w.t.Helper()
	b := make([]byte, size)
	_, _ = rand.Read(b) // never fails
	if err := os.WriteFile(filepath.Join(dir, file), b, 0o644); err != nil {
		w.t.Fatal(err)
	}
	w.git(dir, "add", file)
	w.git(dir, "commit", "-q", "-m", file)
	return w.git(dir, "rev-parse", "HEAD")
}

func (w *world) want(name, tier, sha string) gitcache.Want {
	return gitcache.Want{
		Provider: "forge", Repository: "acme/" + name, Tier: tier, Ref: "refs/heads/main", SHA: sha,
		URL: w.server.URL + "/" + name + ".git/.git", User: "token", Token: creds.NewSecret(w.token),
	}
}

// job is a job that asks for w, and wants the cache to be filled before it ends.
func (w *world) job(want gitcache.Want) (dir string, e gitcache.Event) {
	w.t.Helper()
	dir, done, err := w.cache.Prepare(w.t.Context(), want)
	if err != nil {
		w.t.Fatal(err)
	}
	e = w.event()
	done()
	return dir, e
}

func (w *world) event() gitcache.Event {
	w.t.Helper()
	select {
	case e := <-w.events:
		return e
	case <-time.After(patience):
		w.t.Fatal("no event")
		return gitcache.Event{}
	}
}

// has says whether a cache has an object.
func (w *world) has(dir, sha string) bool {
	w.t.Helper()
	_, err := w.tryGit(dir, nil, "--git-dir="+dir+"/repository.git", "cat-file", "-e", sha)
	return err == nil
}

// everybodyReads wants what a box sees to be readable without being root.
func (w *world) everybodyReads(dir string) {
	w.t.Helper()
	err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && (info.Mode()&0o004 == 0 || d.IsDir() && info.Mode()&0o001 == 0 || info.Mode()&0o022 != 0) {
			w.t.Errorf("%s has mode %v", p, info.Mode())
		}
		return err
	})
	if err != nil {
		w.t.Error(err)
	}
}

// clone clones as a job does that sees the cache at dir ("" is none), and returns
// how many bytes the server sent.
func (w *world) clone(dir, name string) int64 {
	w.t.Helper()
	to := filepath.Join(w.t.TempDir(), "clone")
	var env []string
	if dir != "" {
		// Not the template: the alternate in it is where a box has the cache.
		env = []string{"GIT_ALTERNATE_OBJECT_DIRECTORIES=" + dir + "/repository.git/objects"}
	}
	before := w.sent.Load()
	if _, err := w.tryGit(w.dir, env, "clone", "-q", w.server.URL+"/"+name+".git/.git", to); err != nil {
		w.t.Fatal(err)
	}
	sent := w.sent.Load() - before
	if out, err := w.tryGit(to, env, "fsck", "--full", "--no-dangling"); err != nil {
		w.t.Fatalf("the clone is broken: %v %s", err, out)
	}
	return sent
}

// forward answers as git does, whatever else the server was told to do.
func (w *world) forward(rw http.ResponseWriter, r *http.Request) {
	(&cgi.Handler{
		Path: "/usr/lib/git-core/git-http-backend", Dir: w.dir, Stderr: io.Discard, Logger: log.New(io.Discard, "", 0),
		Env: []string{
			"GIT_PROJECT_ROOT=" + w.dir, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*",
			"GIT_PROTOCOL=" + r.Header.Get("Git-Protocol"),
		},
	}).ServeHTTP(rw, r)
}

// A slowWriter sends a megabyte in a tenth of a second.
type slowWriter struct {
	http.ResponseWriter
	gone <-chan struct{}
}

func (s *slowWriter) Write(b []byte) (int, error) {
	timer := time.NewTimer(time.Duration(len(b)) * 100 * time.Millisecond / (1 << 20))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-s.gone:
	}
	return s.ResponseWriter.Write(b)
}

func diskUse(t *testing.T, dir string) (size int64) {
	t.Helper()
	err := filepath.WalkDir(dir, func(_ string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err == nil && d.Type().IsRegular() {
			size += info.Size()
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	return size
}
