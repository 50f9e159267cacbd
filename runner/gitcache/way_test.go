package gitcache_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/runner/gitcache"
	"github.com/mayfly-ci/mayfly/runner/outbound"
)

// A record keeps what was written down.
type record struct {
	mu     sync.Mutex
	events []audit.Event
}

func (r *record) Append(_ context.Context, e audit.Event) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.events = append(r.events, e)
	return nil
}

// TestWayOut: git goes out by the agent's way, with a password for it that is its
// own, and by no other.
func TestWayOut(t *testing.T) {
	t.Parallel()
	r := &record{}
	way, err := outbound.New(outbound.Config{Audit: r})
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t, func(c *gitcache.Config) { c.Out = way.For("git cache").Relay })
	repo := w.repository("one", 1, 1000)
	w.token = "t0ken-of-the-job"
	want := w.want("one", "branch", w.git(repo, "rev-parse", "HEAD"))
	want.User, want.Token = "x", creds.NewSecret(w.token)
	dir, e := w.job(want)
	if e.Err != nil || !w.has(dir, want.SHA) {
		t.Fatalf("by the relay: %+v", e)
	}
	if err := way.Close(); err != nil {
		t.Fatal(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	requests := 0
	for _, e := range r.events {
		if e.Object != "git cache" || strings.Contains(strings.Join([]string{e.Result, e.Detail["path"], e.Detail["name"]}, " "), w.token) {
			t.Errorf("audit: %+v", e)
		}
		if e.Action == "agent.request" {
			requests++
		}
	}
	if requests == 0 || int64(requests) != w.asked.Load() {
		t.Errorf("%d requests are written down, the server had %d", requests, w.asked.Load())
	}
}

// TestNoWayOut: without a way there is no filling, and nobody is asked directly.
func TestNoWayOut(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *gitcache.Config) {
		c.Out = func(context.Context, string) (creds.Secret, func(), error) {
			return creds.Secret{}, nil, errors.New("the proxy is away")
		}
	})
	repo := w.repository("one", 1, 1000)
	_, e := w.job(w.want("one", "branch", w.git(repo, "rev-parse", "HEAD")))
	if e.Err == nil || !strings.Contains(e.Err.Error(), "the proxy is away") || w.asked.Load() != 0 {
		t.Errorf("%v, and the server was asked %d times", e.Err, w.asked.Load())
	}
}
