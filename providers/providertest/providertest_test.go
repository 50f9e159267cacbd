package providertest

import (
	"context"
	"errors"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
)

// fakeService is the fake as the suite wants it; wrap, if set, breaks it.
func fakeService(t *testing.T, wrap func(*Fake) providers.Provider) Service {
	t.Helper()
	dir := t.TempDir()
	control, err := NewFake(dir)
	if err != nil {
		t.Fatal(err)
	}
	return Service{
		New: func() (providers.Provider, error) {
			f, err := NewFake(dir)
			if err != nil || wrap == nil {
				return f, err
			}
			return wrap(f), nil
		},
		Submit: func(command string) (string, error) {
			return control.Submit(providers.Job{Steps: []providers.Step{{ID: "__1", Run: command}}})
		},
		SubmitBad: func() (string, error) { return control.SubmitBad("ci.yml:1:1: nonsense") },
		Cancel:    control.Cancel,
		Reports: func(id string) ([]providers.Result, error) {
			reports, err := control.Reports()
			var results []providers.Result
			for _, r := range reports {
				if r.ID == id {
					results = append(results, r.Result)
				}
			}
			return results, err
		},
		Log: control.LogOf, Notes: control.NotesOf,
	}
}

func TestFakeConforms(t *testing.T) {
	t.Parallel()
	Run(t, func(t *testing.T) Service { return fakeService(t, nil) })
}

// TestSuiteSeesBrokenProviders is the test of the suite: for each clause there
// is a provider that breaks it, and the clause says so.
func TestSuiteSeesBrokenProviders(t *testing.T) {
	t.Parallel()
	broken := mutants()
	for _, c := range clauses() {
		mutate, ok := broken[c.name]
		if !ok {
			t.Errorf("clause %q has no provider that breaks it", c.name)
			continue
		}
		t.Run(strings.ReplaceAll(c.name, " ", "_"), func(t *testing.T) {
			t.Parallel()
			s := fakeService(t, func(f *Fake) providers.Provider {
				if mutate == nil {
					return lateLog{f}
				}
				p := &faulty{Fake: f}
				mutate(p)
				return p
			})
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			err := c.check(ctx, s)
			if err == nil {
				t.Errorf("clause %q is green for a provider that breaks it", c.name)
			}
			t.Logf("seen: %v", err)
		})
	}
}

func TestFakeIsDownAndUp(t *testing.T) {
	t.Parallel()
	f, err := NewFake(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Submit(providers.Job{}); err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	o, err := f.Poll(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Claim(ctx, "n", o); err != nil {
		t.Fatal(err)
	}
	if err := f.SetDown(true); err != nil {
		t.Fatal(err)
	}
	_, perr := f.Poll(ctx)
	_, cerr := f.Claim(ctx, "n", o)
	_, lerr := f.Log(ctx, "n", nil)
	for call, err := range map[string]error{
		"Poll": perr, "Claim": cerr, "Log": lerr, "Watch": f.Watch(ctx, "n", nil), "Complete": f.Complete(ctx, "n", nil, providers.Result{}),
	} {
		if !errors.Is(err, ErrDown) {
			t.Errorf("%s while down = %v, want ErrDown", call, err)
		}
	}
	if owed, err := f.Owed(); err != nil || len(owed) != 1 || owed[0] != "n" {
		t.Errorf("Owed() = %q, %v; want the claim n", owed, err)
	}
	if err := errors.Join(f.SetDown(false), f.SetDown(false), f.Complete(ctx, "n", nil, providers.Result{Conclusion: providers.Success})); err != nil {
		t.Errorf("after it is up again: %v", err)
	}
	if err := f.Complete(ctx, "n", nil, providers.Result{Conclusion: providers.Lost}); err != nil {
		t.Errorf("second Complete: %v", err)
	}
	reports, err := f.Reports()
	if err != nil || len(reports) != 1 || reports[0].Result.Conclusion != providers.Success {
		t.Errorf("Reports() = %+v, %v; want one success", reports, err)
	}
	if calls, err := f.Calls(); err != nil || len(calls) != 2 {
		t.Errorf("Calls() = %+v, %v; want both", calls, err)
	}
	if owed, err := f.Owed(); err != nil || len(owed) != 0 {
		t.Errorf("Owed() = %q, %v; want none", owed, err)
	}
}

// An agent that dies behind an effect of the fake finds it done.
func TestFakeSurvivesDeath(t *testing.T) {
	t.Parallel()
	for _, point := range []string{"fake.claimed", "fake.reported", "fake.completed"} {
		dir := t.TempDir()
		f, err := NewFake(dir)
		if err != nil {
			t.Fatal(err)
		}
		id, err := f.Submit(providers.Job{})
		if err != nil {
			t.Fatal(err)
		}
		f.Trace = func(at string) {
			if at == point {
				runtime.Goexit()
			}
		}
		dead := make(chan struct{})
		go func() {
			defer close(dead)
			_, cerr := f.Claim(t.Context(), "n", providers.Offer{ID: id})
			if err := errors.Join(cerr, f.Complete(t.Context(), "n", nil, providers.Result{Conclusion: providers.Success})); err != nil {
				t.Errorf("%s: %v", point, err)
			}
		}()
		<-dead
		next, err := NewFake(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := next.Complete(t.Context(), "n", nil, providers.Result{Conclusion: providers.Lost}); err != nil {
			t.Errorf("died at %s: Complete = %v", point, err)
		}
		want := providers.Success
		if point == "fake.claimed" {
			want = providers.Lost
		}
		reports, err := next.Reports()
		if err != nil || len(reports) != 1 || reports[0].ID != id || reports[0].Result.Conclusion != want {
			t.Errorf("died at %s: reports = %+v, %v; want one %q", point, reports, err, want)
		}
		if owed, err := next.Owed(); err != nil || len(owed) > 0 {
			t.Errorf("died at %s: owed %q, %v", point, owed, err)
		}
	}
}
