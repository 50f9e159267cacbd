package egresstest

import (
	"testing"
	"time"
)

// Names are the clauses.
func Names() []string {
	var all []string
	for _, c := range clauses() {
		all = append(all, c.name)
	}
	return all
}

// Check checks one clause and returns how it is broken.
func Check(tb testing.TB, s Subject, name string) error {
	for _, c := range clauses() {
		if c.name == name {
			b := newBench(tb, s)
			b.patience = time.Second
			return c.check(b)
		}
	}
	tb.Fatalf("no clause %q", name)
	return nil
}
