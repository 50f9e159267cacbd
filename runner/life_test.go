package runner_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
)

var errDown = errors.New("down")

func TestLifeInOrder(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	r := w.run(lifetime(t), nil,
		providers.Step{Run: "print one\nenv PGUSER"},
		providers.Step{ID: "deploy", Run: "env DEPLOY_KEY\nprint two"},
		providers.Step{Run: "env DEPLOY_KEY\nprint three"})
	if r.Conclusion != providers.Success {
		t.Errorf("got %+v, want success; log:\n%s", r, w.shown())
	}
	want := []string{
		"claim", "box.pull", "open", "box.create", "attach", "box.probe", "issue", "box.run", // the first step
		"open", "issue", "box.run", "revoke", "probe", "close", // the step with a scope of its own
		"box.run", "box.probe", "revoke", "probe", "box.destroy", "close", "log.close", "complete",
	}
	if got := w.happened(); !slices.Equal(got, want) {
		t.Errorf("order:\n got %v\nwant %v", got, want)
	}
	if got, want := w.shown(), "one\nu\n***\ntwo\n\nthree\n"; got != want {
		t.Errorf("log: got %q, want %q", got, want)
	}
	if f := w.deploy; len(f) != 3 || f[0] != "" || !strings.HasPrefix(f[1], "pw-") || f[2] != "" {
		t.Errorf("the file of the deploy step's lease: got %q when each step ran, want it in the second alone", f)
	}
	w.clean()
}

// Whatever fails, once or for a while, the job is reported exactly once and
// nothing of it is left.
func TestEveryCallFails(t *testing.T) {
	t.Parallel()
	calls := []string{
		"claim", "box.pull", "open", "box.create", "attach", "box.probe", "issue", "box.run", "revoke", "probe", "box.destroy", "close",
		"log.close", "complete", "audit.job.admit", "audit.box.attest", "audit.lease.request", "audit.lease.issue", "audit.lease.revoke",
		"audit.job.end", "audit.job.complete",
	}
	for _, call := range calls {
		for _, times := range []int{1, 3} {
			t.Run(call, func(t *testing.T) {
				t.Parallel()
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t)
					left := times
					w.failWith(func(c, _ string) error {
						if c == call && left > 0 {
							left--
							return errDown
						}
						return nil
					})
					r := w.run(lifetime(t), nil, providers.Step{Run: "print one"}, providers.Step{ID: "deploy", Run: "print two"})
					harmless := strings.HasPrefix(call, "audit.job.end") || call == "log.close" || call == "complete" || call == "audit.job.complete"
					if r.Conclusion == providers.Success && !harmless && !slices.Contains([]string{"revoke", "probe", "box.destroy", "close", "audit.lease.revoke"}, call) {
						t.Errorf("%s failed %d times: got success, want failure", call, times)
					}
					for _, e := range w.events {
						if e.Action == "release.stuck" {
							t.Errorf("%s failed %d times: the job got stuck: %s", call, times, e.Result)
						}
					}
					w.clean()
				})
			})
		}
	}
}

func TestRefusedByPolicyHoldsNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	j := job(providers.Step{Run: "print one"})
	j.Trust = providers.TrustFork
	w.offers <- j
	if err := w.agent(nil).Run(lifetime(t), lifetime(t)); err != nil {
		t.Error(err)
	}
	if r := <-w.results; r.Conclusion != providers.Refused || !strings.Contains(r.Reason, "policy") {
		t.Errorf("got %+v, want refused, with the reason", r)
	}
	if got, want := w.happened(), []string{"claim", "log.close", "complete"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v: nothing may be acquired", got, want)
	}
	if !strings.Contains(w.shown(), "mayfly: ") {
		t.Errorf("the job's log does not say why: %q", w.shown())
	}
	w.clean()
}

func TestHowAJobEnds(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name  string
		end   func(w *world, kill context.CancelCauseFunc)
		steps []providers.Step
		want  providers.Conclusion
		shows string
	}{
		{"exit 0", nil, []providers.Step{{Run: "exit 0"}}, providers.Success, ""},
		{"exit 3", nil, []providers.Step{{Run: "exit 3"}, {Run: "print never"}}, providers.Failure, "exit status 3"},
		{"tolerated", nil, []providers.Step{{Run: "exit 3", ContinueOnError: "true"}, {Run: "print on"}}, providers.Success, "on\n"},
		{"on failure", nil, []providers.Step{{Run: "exit 3"}, {Run: "print cleanup", If: "failure()"}}, providers.Failure, "cleanup"},
		{"deadline", nil, []providers.Step{{Run: "block"}}, providers.TimedOut, "time is over"},
		{"step timeout", nil, []providers.Step{{Run: "block", TimeoutMinutes: "1"}, {Run: "print after", If: "always()"}}, providers.Failure, "after"},
		{
			"cancelled by the provider", func(w *world, _ context.CancelCauseFunc) { close(w.cancel) },
			[]providers.Step{{Run: "block"}, {Run: "print never"}, {Run: "print cleanup", If: "always()"}},
			providers.Cancelled, "cleanup",
		},
		{
			"agent stopped", func(_ *world, kill context.CancelCauseFunc) { kill(runner.ErrStopping) },
			[]providers.Step{{Run: "block"}, {Run: "print never", If: "always()"}},
			providers.Cancelled, "told to stop",
		},
		{"bad expression", nil, []providers.Step{{Run: "print ${{ nosuch( }}"}}, providers.Failure, "mayfly: step"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				kill, cancel := context.WithCancelCause(lifetime(t))
				defer cancel(nil)
				if test.end != nil {
					time.AfterFunc(time.Second, func() { test.end(w, cancel) })
				}
				r := w.run(kill, nil, test.steps...)
				if r.Conclusion != test.want {
					t.Errorf("got %+v, want %s; log:\n%s", r, test.want, w.shown())
				}
				if shown := w.shown(); !strings.Contains(shown, test.shows) || strings.Contains(shown, "never") {
					t.Errorf("log %q: want %q in it and no step that must not run", shown, test.shows)
				}
				w.clean()
			})
		})
	}
}

// A box that will not die holds the result back for two minutes, not for ever;
// it stays owed, and the agent takes no new jobs until it is gone.
func TestBoxThatWillNotDie(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.failWith(func(call, _ string) error {
			if call == "box.destroy" {
				return errDown
			}
			return nil
		})
		w.offers <- job(providers.Step{Run: "print one"})
		w.offers <- job(providers.Step{Run: "print two"})
		drain, stop := context.WithCancel(lifetime(t))
		done := make(chan error)
		begun := time.Now()
		a := w.agent(func(c *runner.Config) { c.Once, c.Slots = false, 4 })
		go func() { done <- a.Run(drain, lifetime(t)) }()
		for range 2 { // both were taken before the first was found stuck
			r := <-w.results
			if r.Conclusion != providers.Success {
				t.Errorf("got %+v, want the true result", r)
			}
			if held := time.Since(begun); held < 2*time.Minute || held > 4*time.Minute {
				t.Errorf("the result was held back for %v, want a little over two minutes", held)
			}
		}
		w.offers <- job(providers.Step{Run: "print three"})
		time.Sleep(10 * time.Minute)
		if n := w.made("claim"); n != 2 {
			t.Errorf("%d claims while a box would not die, want the 2 of before", n)
		}
		w.failWith(func(string, string) error { return nil })
		if r := <-w.results; r.Conclusion != providers.Success {
			t.Errorf("the third job: got %+v", r)
		}
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		stuck := 0
		for _, e := range w.events {
			if e.Action == "release.stuck" {
				stuck++
			}
		}
		if stuck != 2 {
			t.Errorf("%d events release.stuck, want 2", stuck)
		}
		w.clean()
	})
}

// The first signal waits for running jobs and takes no new ones.
func TestDrain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.offers <- job(providers.Step{Run: "block", TimeoutMinutes: "5", ContinueOnError: "true"})
		drain, stop := context.WithCancel(lifetime(t))
		done := make(chan error)
		a := w.agent(func(c *runner.Config) { c.Once = false })
		go func() { done <- a.Run(drain, lifetime(t)) }()
		time.Sleep(time.Second)
		stop()
		w.offers <- job(providers.Step{Run: "print never"})
		if err := <-done; err != nil {
			t.Error(err)
		}
		if r := <-w.results; r.Conclusion != providers.Success {
			t.Errorf("the running job: got %+v, want its own result", r)
		}
		if len(w.offers) != 1 {
			t.Error("a job was taken while draining")
		}
		w.clean()
	})
}

// What an earlier life left is released by the next, and a finished success is
// not reported as lost.
func TestRecoverAfterStop(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.failWith(func(call, _ string) error {
			if call == "revoke" {
				return errDown
			}
			return nil
		})
		w.abandons = true
		w.offers <- job(providers.Step{Run: "print one"})
		kill, cancel := context.WithCancelCause(lifetime(t))
		time.AfterFunc(time.Minute, func() { cancel(runner.ErrStopping) })
		if err := w.agent(nil).Run(kill, kill); err == nil {
			t.Error("the agent stopped with debts: got nil, want an error that says so")
		}
		if len(w.results) != 0 {
			t.Error("reported although a lease is left")
		}
		if boxes, err := w.boxesLeft(); err != nil || len(boxes)+len(w.gates) > 0 {
			t.Errorf("a lease that cannot be revoked kept boxes %v and gateways %v (%v)", boxes, w.gates, err)
		}
		w.failWith(func(string, string) error { return nil })
		w.freeState()
		if err := w.agent(nil).Recover(lifetime(t)); err != nil {
			t.Error(err)
		}
		if r := <-w.results; r.Conclusion != providers.Success {
			t.Errorf("got %+v, want the success that was reached", r)
		}
		w.clean()
	})
}

func TestGoneOfferLeavesNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.failWith(func(call, _ string) error {
		if call == "claim" {
			return providers.ErrGone
		}
		return nil
	})
	w.offers <- job(providers.Step{Run: "print one"})
	if err := w.agent(nil).Run(lifetime(t), lifetime(t)); err != nil {
		t.Error(err)
	}
	if got := w.happened(); !slices.Equal(got, []string{"claim"}) || len(w.results) != 0 {
		t.Errorf("got %v and %d reports, want a claim and none", got, len(w.results))
	}
	w.clean()
}
