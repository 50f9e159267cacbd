package bypass

import (
	"crypto/rand"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// TestRows makes the attacks of every row that this package judges.
func TestRows(t *testing.T) {
	w := newWorld(t)
	rows := ownRows()
	for _, e := range catalogue() {
		if attacks := rows[e.row]; len(attacks) > 0 {
			t.Run(e.row, func(t *testing.T) {
				for _, a := range attacks {
					w.judge(t, a)
				}
			})
		}
	}
	// The last, because nothing works after it.
	t.Run("B27", func(t *testing.T) { w.withoutGateway(t) })
}

// ownRows are the attacks by their row.
func ownRows() map[string][]attack {
	all := nameRows()
	for _, more := range []map[string][]attack{packetRows(), hostRows(), requestRows()} {
		maps.Copy(all, more)
	}
	return all
}

// word stands nowhere else, and is a label of a name.
func word() string { return "w" + strings.ToLower(rand.Text()) }

// judge makes an attack in the box and then beside it.
func (w *world) judge(t *testing.T, a attack) {
	t.Helper()
	if a.honest != "" {
		mine := word()
		if r := w.inside(t, a.honest, mine); !w.canary.reached(mine) {
			t.Errorf("%s: what the rules allow did not arrive: %+v; %+v", a.what, r, w.ledger.since(0))
		}
	}
	before := len(w.ledger.since(0))
	on, off := word(), word()
	inside := w.inside(t, a.script, on)
	if a.kernel != "" && !strings.Contains(inside.out, a.kernel) {
		t.Errorf("%s in a box: got %+v, want %q", a.what, inside, a.kernel)
	}
	if a.line != nil {
		w.await(t, a, before, inside)
	}
	beside := w.beside(t, a.script, off)
	if !w.soon(func() bool { return w.canary.reached(a.arrives + off) }) {
		t.Errorf("%s without the control: got %+v, want it to arrive, or the other half says nothing", a.what, beside)
	}
	if w.canary.reached(a.arrives + on) {
		t.Errorf("%s in a box arrived: %+v", a.what, inside)
	}
}

// await waits for the line of an attack.
func (w *world) await(t *testing.T, a attack, before int, r result) {
	t.Helper()
	if !w.soon(func() bool { return slices.ContainsFunc(w.ledger.since(before), a.line) }) {
		t.Errorf("%s: no such line; got %+v of %+v", a.what, w.ledger.since(before), r)
	}
}

// soon polls until ok, for a time that is no judge of a busy machine.
func (w *world) soon(ok func() bool) bool {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for late := time.Now().Add(time.Minute); !ok(); <-tick.C {
		if time.Now().After(late) {
			return false
		}
	}
	return true
}

// withoutGateway wants a box whose gateway is gone to have no network, and not
// an open one.
func (w *world) withoutGateway(t *testing.T) {
	t.Helper()
	const script = "curl -sk -m 2 http://good.example/$1; curl -sk -m 2 http://" + evilAddress + "/$1"
	off, on := word(), word()
	if w.inside(t, script, off); !w.canary.reached(off) {
		t.Errorf("an allowed name before the gateway went: want it to arrive")
	}
	if err := w.gate.Close(bounded(t), "job"); err != nil {
		t.Fatal(err)
	}
	r := w.inside(t, script, on)
	if w.inside(t, "true", ""); r.code == 0 || w.canary.reached(on) {
		t.Errorf("an allowed name after it went: got %+v, want nothing to arrive", r)
	}
	after := w.ledger.since(0)
	if last := after[len(after)-1]; last.Verdict != egress.Ended && last.Verdict != egress.Refused {
		t.Errorf("the last line is %+v, want one that ends something", last)
	}
}
