package runner_test

import (
	"context"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/gitcache"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
)

// The second net takes no warm box, and none that a job has, whenever it looks.
func TestReaperKnowsWarmBoxes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		var a *runner.Agent
		w.failWith(func(call, _ string) error {
			// Not under the lock: the reaper asks the world.
			if a == nil || strings.HasPrefix(call, "audit.") || strings.HasSuffix(call, ".list") {
				return nil
			}
			w.mu.Unlock()
			defer w.mu.Lock()
			if gone, err := a.Reap(t.Context()); err != nil || len(gone) > 0 {
				t.Errorf("at %s: reaped %v, %v", call, gone, err)
			}
			return nil
		})
		drain, end := context.WithCancel(lifetime(t))
		a = w.agent(warm(2))
		done := make(chan error)
		go func() { done <- a.Run(drain, lifetime(t)) }()
		warmed(t, a, 2)
		w.offers <- job(providers.Step{Run: "print one"}, providers.Step{ID: "deploy", Run: "print two"})
		if r := <-w.results; r.Conclusion != providers.Success || len(w.adopted()) != 1 {
			t.Errorf("got %+v, want success in a warm box", r)
		}
		end()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if n := len(w.did("reap")); n != 0 {
			t.Errorf("%d were reaped, want none", n)
		}
		w.clean()
	})
}

// One that looks beside the agent, as "mayfly reap --dry-run" does, knows them
// from the journal alone.
func TestOrphansBesideWarmBoxes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, stop := w.start(warm(2))
		warmed(t, a, 2)
		w.offers <- job(providers.Step{Run: "block", TimeoutMinutes: "1"})
		time.Sleep(30 * time.Second)
		synctest.Wait()
		state, err := runner.PeekState(filepath.Join(w.dir, "state"))
		if err != nil {
			t.Fatal(err)
		}
		if found, err := w.beside(state, nil).Orphans(t.Context()); err != nil || len(found) > 0 || len(w.adopted()) != 1 {
			t.Errorf("got %+v, %v, want none: two boxes are ready and a job has one, %v", found, err, w.adopted())
		}
		<-w.results
		stop()
		w.clean()
	})
}

// A box that cannot be made is not tried without pause, and jobs go on; others
// are ready meanwhile, of the same runtime and of another.
func TestWarmBoxCannotBeMade(t *testing.T) {
	t.Parallel()
	const rules = `version: 1
rules:
  - {name: odd, match: {trust: [local]}, runtime: odd}
  - {name: odder, match: {trust: [fork]}, runtime: odd, limits: {memory: 64MiB}}
  - {name: native, match: {trust: [fork]}}
`
	p, err := policy.Parse([]byte(rules), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		odd := refusing{worldRuntime{w.boxes, w}, make(chan struct{}, 1000)}
		a, stop := w.start(func(c *runner.Config) {
			warm(1)(c)
			c.Policy = p
			c.Runtimes["odd"] = odd
		})
		time.Sleep(time.Hour)
		warmed(t, a, 2)
		if n := len(odd.asked); n < 60 || n > 200 {
			t.Errorf("asked %d times in an hour, want every half a minute", n)
		}
		w.offers <- job(providers.Step{Run: "print one"})
		if r := <-w.results; r.Conclusion != providers.Failure || !strings.Contains(r.Reason, sandbox.ErrUnsupported.Error()) {
			t.Errorf("got %+v, want the runtime's own reason", r)
		}
		stop()
		w.clean()
	})
}

type refusing struct {
	worldRuntime
	asked chan struct{}
}

func (r refusing) Create(ctx context.Context, name string, s sandbox.Spec) (sandbox.Sandbox, error) {
	if s.Limits.Memory > 0 {
		return r.worldRuntime.Create(ctx, name, s)
	}
	r.asked <- struct{}{}
	return nil, sandbox.ErrUnsupported
}

// What a killed agent had ready is destroyed by the next one, and is no job.
func TestWarmBoxesOfAnEarlierLife(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.failWith(func(call, _ string) error {
			if call == "box.destroy" {
				return errDown
			}
			return nil
		})
		kill, killed := context.WithCancel(lifetime(t))
		a, done := w.agent(warm(2)), make(chan error)
		go func() { done <- a.Run(kill, kill) }()
		warmed(t, a, 2)
		killed()
		if err := <-done; err == nil {
			t.Error("got nil, want to hear that boxes are left")
		}
		w.failWith(func(string, string) error { return nil })
		w.freeState()
		if err := w.agent(nil).Recover(t.Context()); err != nil {
			t.Error(err)
		}
		if n := len(w.did("box.recover")); n != 2 || len(w.did("job.recover")) != 0 {
			t.Errorf("%d boxes recovered, want 2 and no job", n)
		}
		w.clean()
	})
}

// A warm box that will not die keeps the agent from taking jobs, as that of a
// job does.
func TestWarmBoxThatWillNotDie(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, stop := w.start(warm(1))
		warmed(t, a, 1)
		first := w.did("box.warm")[0].Object
		w.failWith(func(call, name string) error {
			if call == "box.destroy" && name == first {
				return errDown
			}
			return nil
		})
		w.kill(first)
		time.Sleep(5 * time.Minute)
		if s := a.Status(); s.Jammed != 1 || s.Warm != 0 {
			t.Errorf("got %+v, want an agent that is jammed and has no more than one box of the class", s)
		}
		w.failWith(func(string, string) error { return nil })
		warmed(t, a, 0) // it is tried again within half a minute
		time.Sleep(time.Minute)
		if s := a.Status(); s.Jammed != 0 || s.Warm != 1 {
			t.Errorf("got %+v, want a new box", s)
		}
		stop()
		w.clean()
	})
}

// A tag that has moved since the box was made is another image: the job gets a
// box of that, and the other is destroyed with it, also beside one that is kept.
func TestWarmBoxOfAnotherImage(t *testing.T) {
	t.Parallel()
	const rules = `version: 1
rules: [{name: all, match: {trust: local}, image: "debian:12", keep-on-failure: 10m}]
`
	p, err := policy.Parse([]byte(rules), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, moved := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t)
			registry := &retagged{worldRuntime: worldRuntime{w.boxes, w}}
			registry.ref.Store("debian:12")
			a, stop := w.start(func(c *runner.Config) {
				warm(1)(c)
				c.Keep, c.Policy = 1, p
				c.Runtimes["native"] = registry
			})
			warmed(t, a, 1)
			if moved {
				w.dropWarm(t, a, func() { registry.ref.Store("debian:12@sha256:1") })
				registry.ref.Store("debian:12")
			}
			name, r := w.failing()
			if r.Conclusion != providers.Failure || r.Reason != "" {
				t.Errorf("got %+v, want a job that failed by itself", r)
			}
			kept := w.did("box.keep")
			if len(kept) != 1 || kept[0].Job != name || strings.HasPrefix(kept[0].Object, "pool-") == moved || len(w.adopted()) == 1 == moved {
				t.Fatalf("kept %+v, adopted %v; want the box of the job, which is the warm one: %v", kept, w.adopted(), !moved)
			}
			warmed(t, a, 1)
			if boxes := w.boxNames(); len(boxes) != 2 || !slices.Contains(boxes, kept[0].Object) {
				t.Errorf("boxes: got %v, want %s and a new warm one", boxes, kept[0].Object)
			}
			stop()
			w.clean()
		})
	}
}

// dropWarm has the pool make its box anew after the change.
func (w *world) dropWarm(t *testing.T, a *runner.Agent, change func()) {
	t.Helper()
	change()
	for _, name := range w.boxNames() {
		w.kill(name)
	}
	<-time.After(time.Minute)
	warmed(t, a, 1)
}

// A retagged runtime has images whose name says something else from time to time.
type retagged struct {
	worldRuntime
	ref atomic.Value
}

func (r *retagged) Pull(context.Context, sandbox.Pull) (sandbox.Image, error) {
	return sandbox.Image{Ref: r.ref.Load().(string), Digest: "sha256:1"}, nil
}

// A warm box is shown the git objects of the job that takes it, if that can be
// done. Where it cannot, or fails, the job has a box that is made for it.
func TestWarmBoxWithGitCache(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		fails   func(mounts int) bool // the n-th call of Mount; the first only asks
		adopted int
		dropped string
	}{
		"can":    {func(int) bool { return false }, 1, "the agent stops"},
		"cannot": {func(int) bool { return true }, 0, "the agent stops"},
		"fails":  {func(n int) bool { return n == 2 }, 0, "no mount today"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				calls := 0
				w.failWith(func(call, _ string) error { // the world's lock is held
					if call != "box.mount" {
						return nil
					}
					if calls++; test.fails(calls) {
						return errors.New("no mount today")
					}
					return nil
				})
				a, stop := w.start(func(c *runner.Config) {
					warm(1)(c)
					c.Git = &worldGit{w: w}
					c.Providers = map[string]providers.Provider{"ci": sourceProvider{worldProvider: (*worldProvider)(w)}}
				})
				warmed(t, a, 1)
				w.offers <- job(providers.Step{Run: "mounted " + gitcache.Target + "\nenv GIT_TEMPLATE_DIR"})
				r := <-w.results
				if got, want := w.shown(), "/objects/of/local\n"+gitcache.TemplateDir+"\n"; r.Conclusion != providers.Success || got != want {
					t.Errorf("got %+v and the log %q, want success and %q", r, got, want)
				}
				if n := len(w.adopted()); n != test.adopted {
					t.Errorf("%d boxes were adopted, want %d", n, test.adopted)
				}
				warmed(t, a, 1)
				stop()
				if why := w.dropped(); len(why) == 0 || why[0] != test.dropped {
					t.Errorf("dropped: got %q, want %q first", why, test.dropped)
				}
				w.clean()
			})
		})
	}
}
