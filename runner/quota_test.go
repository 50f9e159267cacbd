package runner_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/audit"
)

// oneAtOnce lets one job of acme/app run at a time, and two claimed ones wait.
func oneAtOnce(c *runner.Config) {
	c.Once, c.Slots = false, 3
	c.Quotas = runner.Quotas{Waiting: 2, Patience: time.Hour, Jobs: func(provider, repository string) int {
		return map[string]int{"ci acme/app": 1}[provider+" "+repository]
	}}
}

// minute is a job of a repository that runs for a minute and says so.
func minute(repository, name string) providers.Job {
	j := job(providers.Step{Run: "block", TimeoutMinutes: "1", ContinueOnError: "true"}, providers.Step{Run: "print " + name})
	j.Subject.Repository = repository
	return j
}

// start runs the agent; the function that it returns stops it and waits for it.
func (w *world) start(change func(*runner.Config)) (a *runner.Agent, stop func()) {
	w.t.Helper()
	drain, end := context.WithCancel(lifetime(w.t))
	done := make(chan error, 1)
	a = w.agent(change)
	go func() { done <- a.Run(drain, lifetime(w.t)) }()
	return a, func() {
		w.t.Helper()
		end()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	}
}

// did returns the events of one action.
func (w *world) did(action string) []audit.Event {
	w.mu.Lock()
	defer w.mu.Unlock()
	var found []audit.Event
	for _, e := range w.events {
		if e.Action == action {
			found = append(found, e)
		}
	}
	return found
}

// made counts the calls of one kind.
func (w *world) made(call string) int {
	n := 0
	for _, c := range w.happened() {
		if c == call {
			n++
		}
	}
	return n
}

// A repository gets what its quota says, and others run meanwhile; what waits
// is claimed, bounded, and written down.
func TestQuota(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		for i := range 5 {
			w.offers <- minute("acme/app", fmt.Sprint("app", i))
		}
		w.offers <- minute("acme/lib", "lib")
		a, stop := w.start(oneAtOnce)
		time.Sleep(30 * time.Second)
		if n := w.made("claim"); n != 3 {
			t.Errorf("%d claims at first, want one job and the 2 that may wait", n)
		}
		if s := a.Status(); s.Busy != 1 || s.Slots != 3 || s.Providers["ci"].Waiting != 2 || s.Providers["ci"].Working != 1 || s.Providers["ci"].Claimed != 0 {
			t.Errorf("got %+v, want 1 slot of 3 held and 2 waiting", s)
		}
		if n := w.made("box.create"); n != 1 {
			t.Errorf("%d boxes, want that of the one that runs", n)
		}
		time.Sleep(4 * time.Minute) // the fourth of the repository runs, and the sixth in the queue
		if shown := w.shown(); !strings.Contains(shown, "app0") || strings.Contains(shown, "app4") {
			t.Errorf("after four minutes: %s", shown)
		}
		for range 6 {
			if r := <-w.results; r.Conclusion != providers.Success {
				t.Errorf("got %+v", r)
			}
		}
		stop()
		waited := w.did("job.wait")
		if len(waited) != 4 || waited[0].Detail["repository"] != "acme/app" || waited[0].Detail["quota"] != "1" || waited[0].Detail["provider"] != "ci" {
			t.Errorf("got %+v, want 4 events job.wait of acme/app", waited)
		}
		if shown := w.shown(); strings.Count(shown, "mayfly: waiting: 1 jobs of acme/app run on this agent") != 4 {
			t.Errorf("the jobs' logs do not say why they wait: %s", shown)
		}
		for _, e := range w.did("job.end") {
			took, err := time.ParseDuration(e.Detail["took_wait"])
			if e.Detail["took_wait"] != "" && (err != nil || took < 30*time.Second) {
				t.Errorf("took_wait: got %q, %v", e.Detail["took_wait"], err)
			}
		}
		w.clean()
	})
}

// A job that waits is a claimed job: it is cancelled, it gives up, it is
// stopped and it is recovered like any other, and has made nothing.
func TestWaitingJobEnds(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		after time.Duration
		end   func(w *world, kill context.CancelCauseFunc)
		want  providers.Conclusion
		why   string
	}{
		{"cancelled", time.Second, func(w *world, _ context.CancelCauseFunc) { close(w.cancel) }, providers.Cancelled, "cancelled by the provider"},
		{"stopped", time.Second, func(_ *world, kill context.CancelCauseFunc) { kill(runner.ErrStopping) }, providers.Cancelled, "told to stop"},
		{"impatient", 5 * time.Minute, nil, providers.Failure, "waited 5m0s for other jobs of acme/app, of which this agent runs 1 at once"},
		{"audit fails", 0, nil, providers.Failure, "audit job.wait: down"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.offers <- job(providers.Step{Run: "block"}) // ten minutes
				w.stops = "print never"                       // the one that runs goes on, or its turn could come first
				if c.after == 0 {
					w.failWith(func(call, _ string) error {
						if call == "audit.job.wait" {
							return errDown
						}
						return nil
					})
				}
				kill, cancel := context.WithCancelCause(lifetime(t))
				if c.end != nil {
					time.AfterFunc(c.after, func() { c.end(w, cancel) })
				}
				begun, done := time.Now(), make(chan error, 1)
				drain, stop := context.WithCancel(kill)
				a := w.agent(func(cfg *runner.Config) { oneAtOnce(cfg); cfg.Quotas.Patience = 5 * time.Minute })
				go func() { done <- a.Run(drain, kill) }()
				synctest.Wait() // the first has its turn
				w.offers <- minute("acme/app", "never")
				found := false
				for range 2 {
					r := <-w.results
					found = found || r.Conclusion == c.want && strings.Contains(r.Reason, c.why) && time.Since(begun) < c.after+5*time.Second
				}
				if !found {
					t.Errorf("no job ended %s (%s) after %v", c.want, c.why, c.after)
				}
				if n := w.made("box.create"); n != 1 || strings.Contains(w.shown(), "never") {
					t.Errorf("%d boxes, want none for the job that waited", n)
				}
				stop()
				if err := <-done; err != nil {
					t.Error(err)
				}
				if s := a.Status(); s.Busy != 0 || s.Providers["ci"].Waiting+s.Providers["ci"].Working+s.Providers["ci"].Claimed != 0 {
					t.Errorf("at the end: %+v", s)
				}
				cancel(nil)
				w.clean()
			})
		})
	}
}

// silent is a provider that has no jobs.
type silent struct{ *worldProvider }

func (silent) Poll(ctx context.Context) (providers.Offer, error) {
	<-ctx.Done()
	return providers.Offer{}, ctx.Err()
}

// A service without jobs does not hold a slot, and one with many does not keep
// another from its turn.
func TestProvidersShareSlots(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w, calm := newWorld(t), newWorld(t)
		for i := range 20 {
			w.offers <- minute("acme/app", fmt.Sprint("app", i))
		}
		_, stop := w.start(func(c *runner.Config) {
			c.Once, c.Slots = false, 1
			c.Providers = map[string]providers.Provider{"ci": (*worldProvider)(w), "calm": (*worldProvider)(calm), "silent": silent{(*worldProvider)(w)}}
		})
		time.Sleep(3*time.Minute + 30*time.Second) // the fourth job runs
		j := minute("acme/lib", "lib")
		j.Subject.Provider = "calm"
		calm.offers <- j
		time.Sleep(2*time.Minute + 30*time.Second)
		if n := len(calm.results); n != 1 {
			t.Errorf("%d reports of the calm service, want its job to be the next one or the one behind", n)
		}
		for len(w.results) < 20 {
			time.Sleep(time.Minute)
		}
		stop()
		w.clean()
		calm.clean()
	})
}
