package runner_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/sandbox"
)

// A box out of which something goes runs no command of the job's, and a job
// that opened a way out is no success.
func TestBoxThatLeaks(t *testing.T) {
	t.Parallel()
	for look, runs := range []int{0, 1} {
		w := newWorld(t)
		looks := 0
		w.probed = func(o []sandbox.Outcome) {
			if looks == look {
				o[0].Err = nil
			}
			looks++
		}
		r := w.run(lifetime(t), nil, providers.Step{Run: "print one"})
		if r.Conclusion != providers.Failure || !strings.Contains(r.Reason, "wall of the box does not hold: tcp 169.254.169.254:80: went through") {
			t.Errorf("look %d: got %+v, want a failure that says what went through", look, r)
		}
		ran := 0
		for _, call := range w.happened() {
			if call == "box.run" {
				ran++
			}
		}
		if ran != runs {
			t.Errorf("look %d: %d commands ran, want %d", look, ran, runs)
		}
		var results []string
		for _, e := range w.events {
			if e.Action == "box.attest" {
				results = append(results, e.Detail["when"]+" "+e.Result[:min(len(e.Result), 8)])
			}
		}
		want := [][]string{{"before the wall"}, {"before ok", "after the wall"}}[look]
		if !slices.Equal(results, want) {
			t.Errorf("look %d: audit: got %q, want %q", look, results, want)
		}
		w.clean()
	}
}
