package runner

import (
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/mask"
)

// TestRenewedToTheLastName: when no name is left that is short enough, nothing more
// is asked for, and the job's log says when the lease ends.
func TestRenewedToTheLastName(t *testing.T) {
	t.Parallel()
	now := time.Now()
	out := &stream{set: mask.New(nil), shown: map[refusal]bool{}, left: 1 << 20, midline: true}
	s := &steps{life: &life{Agent: &Agent{}, out: out}, deadline: now.Add(time.Hour)}
	for turn := turnsMax - 1; turn <= turnsMax; turn++ {
		r := &renewal{steps: s, now: creds.Lease{ExpiresAt: now.Add(time.Minute)}, turn: turn}
		last := turn == turnsMax
		if r.plan(now); r.due.IsZero() != last || (len(out.pending) > 0) != last {
			t.Errorf("after %d renewals the next is at %v; log: %q", turn, r.due, out.pending)
		}
	}
	if n := len(turned(turnsMax)); n != 2 || len(turned(turnsMax+1)) == 2 {
		t.Errorf("the last name has %d digits", n)
	}
}
