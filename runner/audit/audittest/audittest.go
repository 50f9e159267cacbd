// Package audittest is the conformance suite of audit.Sink: one subtest for
// each clause of the contract.
//
// It cannot see whether durable events are on disk: that takes the power away
// from a machine. Each implementation tests its own calls to fsync.
package audittest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/runner/audit"
)

// A Store is one place that can be opened as a Sink, once after the other. A
// Sink that is an io.Closer is closed before the next one is opened.
type Store struct {
	Open   func() (audit.Sink, error)
	Events func() ([]audit.Event, error) // all that is stored, in order
	// Break makes the open sink unable to store anything, as a full disk does.
	Break func(audit.Sink) error
}

// Run runs the suite. newStore returns an empty Store.
func Run(t *testing.T, newStore func(t *testing.T) Store) {
	t.Helper()
	for _, c := range clauses() {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if err := c.check(t.Context(), newStore(t)); err != nil {
				t.Errorf("clause %q: %v", c.text, err)
			}
		})
	}
}

// A clause is a sentence of the contract and the check that holds it.
type clause struct {
	name, text string
	check      func(context.Context, Store) error
}

func clauses() []clause {
	return []clause{
		{"order", "a Sink stores events in order", checkOrder},
		{"fields", "what is appended is what is stored", checkFields},
		{"concurrent", "it is safe for concurrent use", checkConcurrent},
		{"failure", "an event that is not stored is an error", checkFailure},
		{"cancelled", "if ctx is done before the event is written, nothing is written", checkCancelled},
		{"reopened", "a record that is opened again goes on", checkReopened},
	}
}

// epoch is the time of events that do not care.
func epoch() time.Time { return time.Date(2026, 11, 23, 12, 0, 0, 123456789, time.UTC) }

func event(object string) audit.Event {
	return audit.Event{Time: epoch(), Job: "job", Action: "test.event", Object: object, Result: "ok"}
}

// with opens the store, uses the sink and closes it.
func with(s Store, use func(audit.Sink) error) error {
	sink, err := s.Open()
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	err = use(sink)
	if c, ok := sink.(io.Closer); ok {
		err = errors.Join(err, c.Close())
	}
	return err
}

func stored(s Store, want ...string) error {
	events, err := s.Events()
	if err != nil {
		return fmt.Errorf("events: %w", err)
	}
	var got []string
	for _, e := range events {
		got = append(got, e.Object)
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		return fmt.Errorf("stored: got %v, want %v", got, want)
	}
	return nil
}

// The clock of the events runs backwards: order is that of the calls.
func checkOrder(ctx context.Context, s Store) error {
	var want []string
	err := with(s, func(sink audit.Sink) error {
		for i := range 20 {
			e := event(strconv.Itoa(i))
			e.Time = e.Time.Add(-time.Duration(i) * time.Hour)
			want = append(want, e.Object)
			if err := sink.Append(ctx, e); err != nil {
				return err
			}
		}
		return nil
	})
	return errors.Join(err, stored(s, want...))
}

func checkFields(ctx context.Context, s Store) error {
	want := audit.Event{
		Time: epoch().In(time.FixedZone("", 3600)), Job: "mf-1", Action: "lease.revoke", Object: "mf-1-l-db",
		Result: "line\nbreak \"quoted\" <&> \u2028 ü \x00",
		Detail: map[string]string{"how": "login as mf_1", "": "empty key", "refusal": ""},
	}
	if err := with(s, func(sink audit.Sink) error { return sink.Append(ctx, want) }); err != nil {
		return err
	}
	events, err := s.Events()
	if err != nil || len(events) != 1 {
		return fmt.Errorf("events: got %v, %w, want one", events, err)
	}
	got := events[0]
	same := got.Time.Equal(want.Time) && got.Job == want.Job && got.Action == want.Action &&
		got.Object == want.Object && got.Result == want.Result && maps.Equal(got.Detail, want.Detail)
	if !same {
		return fmt.Errorf("got %+v, want %+v", got, want)
	}
	return nil
}

func checkConcurrent(ctx context.Context, s Store) error {
	const writers, each = 8, 50
	err := with(s, func(sink audit.Sink) error {
		var wg sync.WaitGroup
		errs := make([]error, writers)
		for w := range writers {
			wg.Go(func() {
				for i := range each {
					e := event(fmt.Sprintf("%d/%d", w, i))
					if i%10 == 0 {
						e.Action = "job.complete" // a durable one
					}
					errs[w] = errors.Join(errs[w], sink.Append(ctx, e))
				}
			})
		}
		wg.Wait()
		return errors.Join(errs...)
	})
	if err != nil {
		return err
	}
	events, err := s.Events()
	if err != nil {
		return err
	}
	var next [writers]int
	for _, e := range events {
		var w, i int
		if _, err := fmt.Sscanf(e.Object, "%d/%d", &w, &i); err != nil || w < 0 || w >= writers {
			return fmt.Errorf("event %q was never appended", e.Object)
		}
		if i != next[w] {
			return fmt.Errorf("writer %d: got its event %d, want %d: lost, doubled or out of order", w, i, next[w])
		}
		next[w]++
	}
	for w, n := range next {
		if n != each {
			return fmt.Errorf("writer %d: got %d events, want %d", w, n, each)
		}
	}
	return nil
}

func checkFailure(ctx context.Context, s Store) error {
	return with(s, func(sink audit.Sink) error {
		if err := sink.Append(ctx, event("before")); err != nil {
			return err
		}
		if err := s.Break(sink); err != nil {
			return fmt.Errorf("break: %w", err)
		}
		for _, action := range []string{"test.event", "job.complete"} {
			e := event(action)
			e.Action = action
			if sink.Append(ctx, e) == nil {
				return fmt.Errorf("%s: got no error from a store that can store nothing", action)
			}
		}
		return stored(s, "before")
	})
}

func checkCancelled(ctx context.Context, s Store) error {
	done, cancel := context.WithCancel(ctx)
	cancel()
	err := with(s, func(sink audit.Sink) error {
		if err := sink.Append(ctx, event("before")); err != nil {
			return err
		}
		if sink.Append(done, event("cancelled")) == nil {
			return errors.New("got no error though ctx was done")
		}
		return sink.Append(ctx, event("after"))
	})
	return errors.Join(err, stored(s, "before", "after"))
}

func checkReopened(ctx context.Context, s Store) error {
	for _, object := range []string{"first", "second", "third"} {
		if err := with(s, func(sink audit.Sink) error { return sink.Append(ctx, event(object)) }); err != nil {
			return err
		}
	}
	return stored(s, "first", "second", "third")
}
