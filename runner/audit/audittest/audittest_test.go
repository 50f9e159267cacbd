package audittest

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"

	"github.com/mayfly-ci/mayfly/runner/audit"
)

// memory is a Sink that keeps the contract, except where broken says otherwise.
type memory struct {
	mu     sync.Mutex
	events []audit.Event
	calls  int
	full   bool
	broken string
}

func (m *memory) Append(ctx context.Context, e audit.Event) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls++
	switch {
	case ctx.Err() != nil && m.broken != "cancelled":
		return ctx.Err()
	case m.full && m.broken == "failure":
		return nil
	case m.full:
		return errors.New("full")
	case m.broken == "concurrent" && m.calls == 300:
		return nil // two calls took the same place
	case m.broken == "fields":
		e.Detail = nil
	}
	m.events = append(m.events, e)
	if m.broken == "order" {
		slices.SortStableFunc(m.events, func(a, b audit.Event) int { return a.Time.Compare(b.Time) })
	}
	return nil
}

func (m *memory) store() Store {
	return Store{
		Open: func() (audit.Sink, error) {
			if m.broken == "reopened" {
				m.events = nil
			}
			return m, nil
		},
		Events: func() ([]audit.Event, error) { return m.events, nil },
		Break:  func(audit.Sink) error { m.full = true; return nil },
	}
}

func TestMemoryKeepsTheContract(t *testing.T) {
	t.Parallel()
	Run(t, func(*testing.T) Store { return new(memory).store() })
}

// Each broken sink must fail its own clause and no other.
func TestSuiteFindsBrokenSinks(t *testing.T) {
	t.Parallel()
	for _, broken := range clauses() {
		for _, c := range clauses() {
			err := c.check(t.Context(), (&memory{broken: broken.name}).store())
			if red, want := err != nil, c.name == broken.name; red != want {
				t.Errorf("sink that breaks %q, clause %q: got error %v, want one: %v", broken.name, c.name, err, want)
			}
		}
	}
}
