package journal

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// A State is where a lease is, between the writing of its name and its end:
//
//	intended ─┬─────────────────────────────────────┐ never asked for
//	          ├─► issued ─┬───────────┐             │
//	          │           └─► renewed ┤             ▼
//	          └───────────────────────┴─► revoking ─┬─► dead
//	                                        │       ├─► unprovable
//	                                        ▼       │
//	                                       stuck ───┘
//
// The journal is the only place that it is kept in. A lease that is stuck is
// tried again for ever, and stays so until it has an end.
type State string

// The states of a lease.
const (
	Intended   State = "intended"   // it has a name, and may have been asked for
	Issued     State = "issued"     // its provider has given it
	Renewed    State = "renewed"    // another one is used in its place
	Revoking   State = "revoking"   // it was asked to be taken back
	Stuck      State = "stuck"      // and that failed, or could not be seen
	Dead       State = "dead"       // it was used, and refused; or never asked for
	Unprovable State = "unprovable" // nobody can take it back: it ends at its expiry
)

const kindLease = "lease"

// whyBytes bounds why a lease is stuck: an error may quote a page.
const whyBytes = 500

// nexts are the states that may follow each.
func nexts() map[State][]State {
	return map[State][]State{
		Intended: {Issued, Revoking, Dead},
		Issued:   {Renewed, Revoking},
		Renewed:  {Revoking},
		Revoking: {Stuck, Dead, Unprovable},
		Stuck:    {Dead, Unprovable},
	}
}

// To says whether a lease may go from s to next.
func (s State) To(next State) error {
	if !slices.Contains(nexts()[s], next) {
		return fmt.Errorf("lease is %s: it cannot become %s", s, next)
	}
	return nil
}

// Ended reports that nothing follows.
func (s State) Ended() bool { return s == Dead || s == Unprovable }

// Turn records that a lease is in another state. until, if it is not zero, is
// when its provider ends it; why is why it is stuck. It is not forced to the
// disk: a life that does not know it takes the lease back all the same. What must
// not follow is an error, and is not written.
func (l *Log) Turn(name string, next State, until time.Time, why string) error {
	l.mu.Lock()
	d := l.find(name)
	err := fmt.Errorf("journal %s: %s was not intended", l.Job, name)
	if d != nil {
		err = d.State.To(next)
	}
	l.mu.Unlock()
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if len(why) > whyBytes {
		why = strings.ToValidUTF8(why[:whyBytes], "") + "…"
	}
	return l.append(record{Op: opLease, Name: name, State: next, Until: until, At: time.Now().UTC(), Why: why}, false)
}

// turned is a Turn that was written. A line that is damaged may lie between two,
// so what is read is not judged.
func (l *Log) turned(r record) {
	d := l.find(r.Name)
	if d == nil || nexts()[r.State] == nil && !r.State.Ended() {
		return
	}
	d.State, d.Since, d.Why = r.State, r.At, r.Why
	if !r.Until.IsZero() {
		d.Expires = r.Until
	}
}

// mayRelease refuses to forget a lease that may be alive.
func (l *Log) mayRelease(name string) error {
	d := l.find(name)
	switch {
	case d == nil || d.State == "" || d.State.Ended():
		return nil
	case d.State == Intended && d.Tried:
		return fmt.Errorf("%s: lease is %s, and may have been issued: it must be taken back", name, d.State)
	}
	if err := d.State.To(Dead); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func (l *Log) find(name string) *Debt {
	for i := range l.debts {
		if l.debts[i].Name == name {
			return &l.debts[i]
		}
	}
	return nil
}
