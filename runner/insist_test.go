package runner_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
)

// A lease that its issuer still accepts is not taken for dead.
func TestProbedUntilRefused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		probes := 0
		w.failWith(func(call, _ string) error {
			if call == "probe" && probes < 5 {
				probes++
				return creds.ErrStillValid
			}
			return nil
		})
		if r := w.run(lifetime(t), nil, providers.Step{Run: "print one"}); r.Conclusion != providers.Success {
			t.Errorf("got %+v, want success", r)
		}
		if probes != 5 {
			t.Errorf("probed %d times and believed it, want until it is refused", probes)
		}
		w.clean()
	})
}

// A lease that lives longer than the policy allows is not used.
func TestGenerousIssuer(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.generous = time.Hour
	r := w.run(lifetime(t), nil, providers.Step{Run: "print never"})
	if r.Conclusion != providers.Failure || !strings.Contains(r.Reason, "more than it may") {
		t.Errorf("got %+v, want a failure that says why", r)
	}
	if strings.Contains(w.shown(), "never") {
		t.Error("a step ran with the lease")
	}
	w.clean()
}

// No lease is asked for that could outlive its job, however late it is asked for.
func TestLeaseEndsWithItsJob(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.latest = time.Now().Add(10 * time.Minute) // the policy's timeout
		w.run(lifetime(t), nil,
			providers.Step{Run: "block", TimeoutMinutes: "9.5", ContinueOnError: "true"},
			providers.Step{ID: "deploy", Run: "print two"}) // its lease may live a minute
		if !strings.Contains(w.shown(), "two") {
			t.Errorf("the step did not run: %s", w.shown())
		}
		w.clean()
	})
}

// What stops a job may quote what the job knows.
func TestReasonIsMasked(t *testing.T) {
	t.Parallel()
	const token = "correct-horse-battery"
	w := newWorld(t)
	w.failWith(func(call, _ string) error {
		if call == "attach" {
			return errors.New("no such network: " + token)
		}
		return nil
	})
	j := job(providers.Step{Run: "print one"})
	j.Secrets = map[string]creds.Secret{"TOKEN": creds.NewSecret(token)}
	w.offers <- j
	if err := w.agent(nil).Run(lifetime(t), lifetime(t)); err != nil {
		t.Error(err)
	}
	if r := <-w.results; !strings.Contains(r.Reason, "no such network") || strings.Contains(r.Reason, token) {
		t.Errorf("the provider was told %q, want the reason without the secret", r.Reason)
	}
	if strings.Contains(fmt.Sprint(w.events)+w.shown(), token) {
		t.Errorf("the secret is shown: %v %s", w.events, w.shown())
	}
	w.clean()
}

// A guest that does not answer does not hold its job for ever.
func TestGuestThatDoesNotAnswer(t *testing.T) {
	t.Parallel()
	for _, call := range []string{"put", "get"} {
		t.Run(call, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.hang = call
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				r := w.run(ctx, nil, providers.Step{ID: "deploy", Run: "print one"})
				if r.Conclusion != providers.Failure {
					t.Errorf("got %+v, want failure", r)
				}
				w.clean()
			})
		})
	}
}

// The debts of an earlier life are not forgotten because the audit could not
// take a line when the agent started.
func TestRecoverWaitsForTheAudit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.abandons = true
		w.failWith(func(call, _ string) error {
			if call == "revoke" {
				return errDown
			}
			return nil
		})
		w.offers <- job(providers.Step{Run: "print one"})
		kill, cancel := context.WithCancelCause(lifetime(t))
		time.AfterFunc(time.Minute, func() { cancel(runner.ErrStopping) })
		if err := w.agent(nil).Run(kill, kill); err == nil {
			t.Error("the agent stopped with debts: got nil, want an error that says so")
		}
		w.freeState()
		failed := 0
		w.failWith(func(call, _ string) error {
			if call == "audit.job.recover" && failed < 3 {
				failed++
				return errDown
			}
			return nil
		})
		if err := w.agent(nil).Recover(lifetime(t)); err != nil {
			t.Error(err)
		}
		w.clean()
	})
}

// A service that is down when a stuck job is to be reported is told later, not
// never.
func TestStuckJobIsReportedLater(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		begun := time.Now()
		w.failWith(func(call, _ string) error {
			if call == "box.destroy" || call == "complete" && time.Since(begun) < 5*time.Minute {
				return errDown
			}
			return nil
		})
		w.offers <- job(providers.Step{Run: "print one"})
		done := make(chan error)
		a := w.agent(nil)
		go func() { done <- a.Run(lifetime(t), lifetime(t)) }()
		time.Sleep(10 * time.Minute)
		if len(w.results) != 1 {
			t.Errorf("%d reports ten minutes later, want 1", len(w.results))
		}
		w.failWith(func(string, string) error { return nil })
		if err := <-done; err != nil {
			t.Error(err)
		}
		w.clean()
	})
}

// told calls a function before it reports.
type told struct {
	*worldProvider
	before func()
}

func (p told) Complete(ctx context.Context, name string, ref []byte, r providers.Result) error {
	p.before()
	return p.worldProvider.Complete(ctx, name, ref, r)
}

// The service that hears of a stuck job does not get its slot filled again.
func TestNoSlotForAStuckBox(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.failWith(func(call, _ string) error {
			if call == "box.destroy" {
				return errDown
			}
			return nil
		})
		report := sync.OnceFunc(func() {
			w.offers <- job(providers.Step{Run: "print two"})
			time.Sleep(time.Second)
			if n := w.made("claim"); n != 1 {
				t.Error("a job was claimed between the report of a stuck one and the stop")
			}
		})
		w.offers <- job(providers.Step{Run: "print one"})
		drain, stop := context.WithCancel(lifetime(t))
		done := make(chan error)
		a := w.agent(func(c *runner.Config) {
			c.Providers = map[string]providers.Provider{"ci": told{(*worldProvider)(w), report}}
			c.Once, c.Slots = false, 2
		})
		go func() { done <- a.Run(drain, lifetime(t)) }()
		<-w.results
		w.failWith(func(string, string) error { return nil })
		<-w.results
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		w.clean()
	})
}

// An agent for one job says that it cannot begin it, instead of trying for ever.
func TestOnceThatCannotBegin(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.offers <- job(providers.Step{Run: "print never"})
		a := w.agent(nil)
		jobs := filepath.Join(w.dir, "state", "jobs")
		if err := errors.Join(os.Remove(jobs), os.WriteFile(jobs, nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		if err := a.Run(ctx, ctx); err == nil || ctx.Err() != nil {
			t.Errorf("got %v (%v), want an error at once", err, ctx.Err())
		}
	})
}

// The second signal ends a job whose provider cancelled it before, too.
func TestStopAfterCancel(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		kill, stop := context.WithCancelCause(lifetime(t))
		defer stop(nil)
		time.AfterFunc(time.Second, func() { close(w.cancel) })
		time.AfterFunc(2*time.Second, func() { stop(runner.ErrStopping) })
		begun := time.Now()
		r := w.run(kill, nil, providers.Step{Run: "block"}, providers.Step{Run: "block", If: "always()"},
			providers.Step{Run: "print never", If: "always()"})
		if took := time.Since(begun); r.Conclusion != providers.Cancelled || took > 10*time.Second {
			t.Errorf("got %+v after %v, want cancelled at once", r, took)
		}
		if strings.Contains(w.shown(), "never") {
			t.Error("a step was started after the agent was told to stop")
		}
		w.clean()
	})
}

// deaf is a provider whose Watch does not work.
type deaf struct {
	*worldProvider
	calls atomic.Int32
}

func (d *deaf) Watch(context.Context, string, []byte) error {
	d.calls.Add(1)
	return errDown
}

// A service that is down is asked less and less often.
func TestWatchBacksOff(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		p := &deaf{worldProvider: (*worldProvider)(w)}
		w.run(lifetime(t), func(c *runner.Config) { c.Providers = map[string]providers.Provider{"ci": p} },
			providers.Step{Run: "block"})
		if n := p.calls.Load(); n < 10 || n > 40 {
			t.Errorf("watched %d times in ten minutes, want about one each half a minute", n)
		}
		w.clean()
	})
}
