package runner_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
)

// warm keeps n boxes of each class ready.
func warm(n int) func(*runner.Config) {
	return func(c *runner.Config) { c.Once, c.Warm = false, runner.Warm{Boxes: n} }
}

// warmed waits, in a bubble, until all that can be made has been.
func warmed(t *testing.T, a *runner.Agent, want int) {
	t.Helper()
	<-time.After(10 * time.Second)
	synctest.Wait()
	if n := a.Status().Warm; n != want {
		t.Errorf("%d warm boxes, want %d", n, want)
	}
}

// adopted are the warm boxes that jobs got.
func (w *world) adopted() []string {
	var names []string
	for _, e := range w.did("box.adopt") {
		names = append(names, e.Object)
	}
	return names
}

// dropped are the reasons for which warm boxes went that no job had.
func (w *world) dropped() []string {
	var why []string
	for _, e := range w.did("box.drop") {
		why = append(why, e.Detail["why"])
	}
	return why
}

// A job gets a box that was made before, which is destroyed before the job is
// reported, and replaced. What is left when the agent stops is destroyed too.
func TestWarm(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, stop := w.start(warm(2))
		warmed(t, a, 2)
		for i := range 3 {
			before := w.made("box.create")
			w.offers <- job(providers.Step{Run: fmt.Sprint("print ", i)})
			if r := <-w.results; r.Conclusion != providers.Success {
				t.Errorf("got %+v, want success", r)
			}
			if n := w.made("box.create"); n != before {
				t.Errorf("%d boxes were made before the job was over, want that it takes one that is there", n-before)
			}
			warmed(t, a, 2)
		}
		names := w.adopted()
		if len(names) != 3 || names[0] == names[1] || names[1] == names[2] || names[0] == names[2] {
			t.Errorf("adopted: got %v, want three boxes", names)
		}
		for i, e := range w.did("job.end") {
			if e.Detail["took_adopt"] == "" || e.Detail["took_box"] != "" {
				t.Errorf("job %d: got %v, want to read that it adopted its box", i, e.Detail)
			}
		}
		warmEvents := w.did("box.warm")
		if len(warmEvents) != 5 || warmEvents[0].Job != "" || warmEvents[0].Detail["runtime"] != "native" {
			t.Errorf("box.warm: got %+v, want five boxes of no job", warmEvents)
		}
		jobs, err := runner.PeekState(filepath.Join(w.dir, "state"))
		if err != nil {
			t.Fatal(err)
		}
		if owed, err := jobs.Jobs(); err != nil || len(owed) != 2 || !owed[0].Warm || len(owed[0].Owes) != 1 || owed[0].Owes[0].Kind != "box" {
			t.Errorf("owed while idle: got %+v, %v, want the two boxes", owed, err)
		}
		w.destroyedFirst(t, 3)
		stop()
		if why := w.dropped(); len(why) != 2 || why[0] != "the agent stops" {
			t.Errorf("dropped: got %q, want those that no job took", why)
		}
		w.clean()
	})
}

// destroyedFirst fails the test if a job was reported beside its box.
func (w *world) destroyedFirst(t *testing.T, jobs int) {
	t.Helper()
	destroyed, reported := 0, 0
	for _, call := range w.happened() {
		switch call {
		case "box.destroy":
			destroyed++
		case "complete":
			if reported++; destroyed < reported {
				t.Errorf("report %d came after %d boxes were gone: %v", reported, destroyed, w.happened())
			}
		}
	}
	if reported != jobs {
		t.Errorf("%d reports, want %d", reported, jobs)
	}
}

// However many jobs come at once, each gets a box that no other ever had: while
// one still looks at a box, nobody else gets that.
func TestWarmBoxIsUsedOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, stop := w.start(func(c *runner.Config) {
			c.Once, c.Slots, c.Warm = false, 8, runner.Warm{Boxes: 6}
			c.Runtimes["native"] = slow{worldRuntime{w.boxes, w}}
		})
		warmed(t, a, 6)
		const jobs = 40
		for range jobs {
			w.offers <- job(providers.Step{Run: "print x"})
		}
		for range jobs {
			if r := <-w.results; r.Conclusion != providers.Success {
				t.Errorf("got %+v, want success", r)
			}
		}
		stop()
		seen := map[string]bool{}
		for _, name := range w.adopted() {
			if seen[name] {
				t.Errorf("%s was given to two jobs", name)
			}
			seen[name] = true
		}
		if len(seen) < 6 {
			t.Errorf("%d jobs adopted a box, want at least the 6 that there were", len(seen))
		}
		w.clean()
	})
}

// A slow runtime has boxes whose guest takes a while to answer.
type slow struct{ worldRuntime }

func (r slow) Create(ctx context.Context, name string, s sandbox.Spec) (sandbox.Sandbox, error) {
	box, err := r.worldRuntime.Create(ctx, name, s)
	return slowBox{box.(worldBox)}, err
}

type slowBox struct{ worldBox }

func (b slowBox) Get(ctx context.Context, name string, limit int64) ([]byte, error) {
	select {
	case <-time.After(100 * time.Millisecond):
	case <-ctx.Done():
	}
	return b.worldBox.Get(ctx, name, limit)
}

// A box that died while it waited is given to nobody.
func TestWarmBoxDied(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, stop := w.start(warm(2))
		warmed(t, a, 2)
		first := w.did("box.warm")[0].Object
		w.kill(first)
		w.offers <- job(providers.Step{Run: "print one"})
		if r := <-w.results; r.Conclusion != providers.Success {
			t.Errorf("got %+v, want success in the other box", r)
		}
		if names := w.adopted(); len(names) != 1 || names[0] == first {
			t.Errorf("adopted: got %v, want the one that lives and not %s", names, first)
		}
		warmed(t, a, 2)
		if why := w.dropped(); len(why) != 1 || !strings.Contains(why[0], "does not answer") {
			t.Errorf("dropped: got %q, want the dead one", why)
		}
		// All of them: then the job's is made for it.
		for _, e := range w.did("box.warm") {
			w.kill(e.Object)
		}
		w.offers <- job(providers.Step{Run: "print two"})
		if r := <-w.results; r.Conclusion != providers.Success || len(w.adopted()) != 1 {
			t.Errorf("got %+v, want success in a box of its own", r)
		}
		// One that nobody asks for is found too, and replaced.
		warmed(t, a, 2)
		made := w.did("box.warm")
		w.kill(made[len(made)-1].Object)
		time.Sleep(time.Minute)
		warmed(t, a, 2)
		if n := len(w.did("box.warm")); n != len(made)+1 {
			t.Errorf("%d were made, want one more than %d", n, len(made))
		}
		stop()
		w.clean()
	})
}

func (w *world) kill(box string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.dead == nil {
		w.dead = map[string]bool{}
	}
	w.dead[box] = true
}

// A box that is too old for a job's whole time is not given to it, and is
// replaced.
func TestWarmBoxExpires(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, stop := w.start(func(c *runner.Config) { c.Once, c.Warm = false, runner.Warm{Boxes: 1, Age: 10 * time.Minute} })
		warmed(t, a, 1)
		time.Sleep(100 * time.Minute)
		warmed(t, a, 1)
		if n := len(w.did("box.drop")); n < 9 || n > 10 {
			t.Errorf("%d boxes were replaced in 100 minutes, want one each ten", n)
		}
		w.offers <- job(providers.Step{Run: "print one"})
		<-w.results
		e := w.did("box.adopt")
		if len(e) != 1 {
			t.Fatalf("adopted: got %+v, want one", e)
		}
		// The policy's timeout is 10 minutes, and 5 are for the agent.
		if until, err := time.Parse(time.RFC3339Nano, e[0].Detail["expires"]); err != nil || until.Before(e[0].Time.Add(15*time.Minute)) || until.After(e[0].Time.Add(25*time.Minute)) {
			t.Errorf("adopted at %v: got a box until %v (%v), want one for the job's time and at most ten minutes more", e[0].Time, until, err)
		}
		stop()
		w.clean()
	})
}

// Between two looks of the pool a box can get too old; the job looks itself.
func TestWarmBoxTooOldForItsJob(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		_, stop := w.start(func(c *runner.Config) { c.Once, c.Warm = false, runner.Warm{Boxes: 1, Age: 5 * time.Second} })
		time.Sleep(7 * time.Second) // it is looked at every ten
		w.offers <- job(providers.Step{Run: "print one"})
		if r := <-w.results; r.Conclusion != providers.Success || len(w.adopted()) != 0 {
			t.Errorf("got %+v in %v, want success in a box of its own", r, w.adopted())
		}
		stop()
		w.clean()
	})
}

// A box is for jobs whose plan would have made the same, and for no other.
func TestWarmClasses(t *testing.T) {
	t.Parallel()
	const rules = `version: 1
rules:
  - {name: small, match: {trust: local, workflow: small}, limits: {memory: 64MiB}}
  - {name: the-same, match: {trust: local, workflow: same}, timeout: 3h, limits: {memory: 64MiB}}
  - {name: large, match: {trust: local}, limits: {memory: 128MiB}}
  - {name: leased, match: {trust: fork}, image: "debian:12", pull: hub, leases: [{name: hub, issuer: pg}]}
`
	p, err := policy.Parse([]byte(rules), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a, stop := w.start(func(c *runner.Config) { warm(1)(c); c.Policy = p })
		warmed(t, a, 2)
		for _, workflow := range []string{"large", "same", "small"} {
			j := job(providers.Step{Run: "print one"})
			j.Subject.Workflow = workflow
			w.offers <- j
			<-w.results
			warmed(t, a, 2)
		}
		events := w.did("box.warm")
		if names := w.adopted(); len(names) != 3 || names[0] != events[1].Object || names[1] != events[0].Object || names[2] != events[3].Object {
			t.Errorf("adopted %v of %+v, want the second, the first, and what replaced the first", names, events)
		}
		// A policy that has none of them takes them away.
		other, err := policy.Parse([]byte(strings.ReplaceAll(rules, "MiB", "KiB")), "policy.yaml")
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Reload(t.Context(), other, nil); err != nil {
			t.Fatal(err)
		}
		warmed(t, a, 2)
		if why := w.dropped(); len(why) != 2 || !strings.Contains(why[0], "no rule") {
			t.Errorf("dropped: got %q, want both", why)
		}
		stop()
		w.clean()
	})
}

// A box that a job took is destroyed with the job, also if the job never came to
// use it. It does not go back.
func TestWarmBoxOfJobThatFails(t *testing.T) {
	t.Parallel()
	for _, call := range []string{"open", "audit.box.adopt", "attach", "issue"} {
		t.Run(call, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				a, stop := w.start(warm(1))
				warmed(t, a, 1)
				w.failWith(func(c, _ string) error {
					if c == call {
						return errDown
					}
					return nil
				})
				w.offers <- job(providers.Step{Run: "print never"})
				if r := <-w.results; r.Conclusion != providers.Failure {
					t.Errorf("got %+v, want failure", r)
				}
				first := w.did("box.warm")[0].Object
				if _, err := os.Stat(filepath.Join(w.boxes.Dir, first)); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s is there although its job is over: %v", first, err)
				}
				w.failWith(func(string, string) error { return nil })
				warmed(t, a, 1)
				stop()
				if why := w.dropped(); len(why) != 1 || why[0] != "the agent stops" {
					t.Errorf("dropped: got %q, want the one that replaced it", why)
				}
				w.clean()
			})
		})
	}
}
