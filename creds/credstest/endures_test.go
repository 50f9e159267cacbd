package credstest

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// TestEndures: what nothing ends must say so. Revoke must not be nil, and Probe
// no proof.
func TestEndures(t *testing.T) {
	t.Parallel()
	names := map[string]bool{}
	for _, c := range clauses() {
		names[c.name] = true
	}
	for _, name := range ends() {
		if !names[name] {
			t.Errorf("%q is no clause", name)
		}
	}
	honest := func(w *world) {
		w.revoke = func(context.Context, string, []byte) error { return creds.ErrNotRevocable }
		w.probe = func(context.Context, string, []byte) (creds.Proof, error) {
			return creds.Proof{}, creds.ErrNotRevocable
		}
	}
	for name, lie := range map[string]func(*world){
		"honest":      func(*world) {},
		"revokes":     func(w *world) { w.revoke = func(context.Context, string, []byte) error { return nil } },
		"proves":      func(w *world) { w.probe = proof },
		"just lives":  func(w *world) { w.probe = w.Fake.Probe },
		"cannot tell": func(w *world) { w.revoke = func(context.Context, string, []byte) error { return ErrDown } },
	} {
		var red []string
		for _, c := range clauses() {
			// One that fails in its world leaves a lease there, which is of no use.
			if slices.Contains(append(ends(), "a lease is listed while it lives", "a scope that is not understood gives nothing", "a context that has ended is honoured"), c.name) {
				continue
			}
			w, h := newWorld(t, false)
			h.Endures = true
			honest(w)
			lie(w)
			if err := c.check(t.Context(), h); err != nil {
				red = append(red, c.name)
			}
		}
		if (name == "honest") != (len(red) == 0) {
			t.Errorf("%s: red are %q", name, red)
		}
	}
}

func proof(context.Context, string, []byte) (creds.Proof, error) {
	return creds.Proof{At: time.Now(), How: "asked", Refusal: "gone"}, nil
}
