package gitcache_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/mayfly-ci/mayfly/runner/gitcache"
)

// childEnv holds an order for a process of the test's own binary.
const childEnv = "MAYFLY_GITCACHE_CHILD"

// An order is what an agent does that is killed: it begins to fill.
type order struct{ Dir, URL, SHA string }

func TestMain(m *testing.M) {
	if text := os.Getenv(childEnv); text != "" {
		fmt.Fprintln(os.Stderr, child(text))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func child(text string) error {
	var o order
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		return err
	}
	end := make(chan gitcache.Event, 1)
	c, err := gitcache.New(gitcache.Config{Dir: o.Dir, Note: func(e gitcache.Event) { end <- e }})
	if err != nil {
		return err
	}
	_, _, err = c.Prepare(context.Background(), gitcache.Want{
		Provider: "forge", Repository: "acme/big", Tier: "branch", Ref: "refs/heads/main", SHA: o.SHA, URL: o.URL, User: "token",
	})
	if err != nil {
		return err
	}
	return fmt.Errorf("it was filled before anybody killed it: %+v", <-end)
}

// After kill -9 in the middle of a filling no git is left, and the next agent
// removes the half and fills the repository.
func TestKilled(t *testing.T) {
	t.Parallel()
	w := newWorld(t, nil)
	repo := w.repository("big", 1, 8<<20)
	want := w.want("big", "branch", w.git(repo, "rev-parse", "HEAD"))
	if err := w.cache.Close(); err != nil {
		t.Fatal(err)
	}
	w.respond(func(rw http.ResponseWriter, r *http.Request) {
		w.forward(&slowWriter{rw, r.Context().Done()}, r)
	})
	text, err := json.Marshal(order{w.config.Dir, want.URL, want.SHA})
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+string(text))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	half := func() []string {
		found, err := filepath.Glob(w.config.Dir + "/*/view/repository.git/objects/pack/tmp_*")
		if err != nil {
			t.Fatal(err)
		}
		return found
	}
	eventually(t, "half of a pack", func() bool { return len(half()) > 0 })
	if n := len(gits(t, w.config.Dir)); n == 0 {
		t.Error("no git is seen while one runs, so that the following says nothing")
	}
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	eventually(t, "no git is left", func() bool { return len(gits(t, w.config.Dir)) == 0 })
	if len(half()) == 0 {
		t.Error("git removed the half itself, so that the following says nothing")
	}
	w.handle.Store(nil)
	w.start()
	dir, e := w.job(want)
	if e.Err != nil || !w.has(dir, want.SHA) || len(half()) != 0 {
		t.Errorf("the next agent: %+v, has the commit %v, half %q", e, w.has(dir, want.SHA), half())
	}
}

// gits are the processes that have the directory in their arguments or their
// environment.
func gits(t *testing.T, dir string) (pids []string) {
	t.Helper()
	found, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range found {
		args, _ := os.ReadFile(p + "/cmdline") // it may have ended
		env, _ := os.ReadFile(p + "/environ")
		if all := string(args) + string(env); strings.Contains(all, dir) && !strings.Contains(all, childEnv) {
			pids = append(pids, p)
		}
	}
	return pids
}
