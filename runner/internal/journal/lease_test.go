package journal

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func states() []State {
	return []State{Intended, Issued, Renewed, Revoking, Stuck, Dead, Unprovable}
}

// Every pair of states is either on this list, or refused and not written.
func TestTransitions(t *testing.T) {
	t.Parallel()
	legal := []string{
		"intended issued", "intended revoking", "intended dead", "issued renewed", "issued revoking", "renewed revoking",
		"revoking stuck", "revoking dead", "revoking unprovable", "stuck dead", "stuck unprovable",
	}
	for _, from := range states() {
		for _, to := range states() {
			want := slices.Contains(legal, string(from)+" "+string(to))
			if got := from.To(to) == nil; got != want {
				t.Errorf("%s to %s: allowed %v, want %v", from, to, got, want)
			}
			j := open(t, t.TempDir())
			l := begun(t, j, "a")
			l.find("a-l-db").State = from
			size := l.size
			if err := l.Turn("a-l-db", to, time.Time{}, ""); (err == nil) != want {
				t.Errorf("Turn from %s to %s: %v", from, to, err)
			} else if err != nil && (l.size != size || !strings.Contains(err.Error(), "a-l-db")) {
				t.Errorf("Turn from %s to %s wrote a line, or does not name the lease: %v", from, to, err)
			}
		}
	}
	l := begun(t, open(t, t.TempDir()), "a")
	if l.Turn("nobody", Issued, time.Time{}, "") == nil || l.Turn("a-gw", Issued, time.Time{}, "") == nil {
		t.Error("Turn of what is no lease: got nil, want an error")
	}
}

// Whatever is tried in whatever order, and however often the agent dies: the
// journal knows the state that was reached, and a lease is never forgotten that
// was asked for and is not at an end.
func TestLeaseWalks(t *testing.T) {
	t.Parallel()
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		dir := t.TempDir()
		j := open(t, dir)
		l := begun(t, j, "a")
		want := Debt{State: Intended}
		for range 20 {
			switch r.IntN(8) {
			case 0: // a crash
				must(t, l.Close())
				logs, err := j.Unfinished()
				must(t, err)
				l = logs[0]
			case 1:
				err := l.Release("a-l-db")
				free := want.State == Revoking || want.State == Stuck || want.State.Ended()
				if (err == nil) != free {
					t.Fatalf("seed %d: Release of one that is %s: %v", seed, want.State, err)
				}
				if free {
					if l.find("a-l-db") != nil {
						t.Fatalf("seed %d: it is there after Release", seed)
					}
					must(t, l.Intend(Debt{Kind: kindLease, Name: "a-l-db", By: "pg"}))
					must(t, l.Try("a-l-db"))
					want = Debt{State: Intended}
				}
			default:
				next := states()[r.IntN(len(states()))]
				until := time.Unix(int64(r.IntN(1000)), 0).UTC()
				legal := want.State.To(next) == nil
				if err := l.Turn("a-l-db", next, until, "why "+string(next)); (err == nil) != legal {
					t.Fatalf("seed %d: %s to %s: %v", seed, want.State, next, err)
				}
				if legal {
					want = Debt{State: next, Why: "why " + string(next), Expires: until}
				}
			}
			d := l.find("a-l-db")
			if d.State != want.State || d.Why != want.Why || !d.Expires.Equal(want.Expires) || d.Since.IsZero() != (want.State == Intended) {
				t.Fatalf("seed %d: the journal has %+v, want %+v", seed, *d, want)
			}
		}
		must(t, l.Close())
	}
}

// A lease that nobody asked for is released without being taken back; after a
// crash nobody knows that.
func TestReleaseOfAnIntention(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	j := open(t, dir)
	l, err := j.Begin("a", Debt{Kind: "claim", Name: "a"})
	must(t, err)
	must(t, l.Intend(Debt{Kind: kindLease, Name: "one"}, Debt{Kind: kindLease, Name: "two"}))
	must(t, l.Release("one"))
	must(t, l.Close())
	logs, err := j.Unfinished()
	must(t, err)
	if logs[0].Release("two") == nil {
		t.Error("Release of a lease that an earlier life may have asked for: got nil, want an error")
	}
	// A line of another version, or a damaged one, is not taken for a state.
	path := filepath.Join(dir, "jobs", "a.wal")
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0o600)
	must(t, err)
	_, err = f.WriteString(`{"op":"lease","name":"two","state":"blessed"}` + "\n")
	must(t, err)
	must(t, f.Close())
	logs, err = j.Unfinished()
	must(t, err)
	if d := logs[0].find("two"); d.State != Intended {
		t.Errorf("got state %q, want what was known before", d.State)
	}
}

// Why a lease is stuck may quote a page of a server's: the journal takes a line.
func TestLongWhy(t *testing.T) {
	t.Parallel()
	l := begun(t, open(t, t.TempDir()), "a")
	must(t, l.Turn("a-l-db", Revoking, time.Time{}, ""))
	must(t, l.Turn("a-l-db", Stuck, time.Time{}, strings.Repeat("ä", 5000)))
	if why := l.find("a-l-db").Why; len(why) > whyBytes+3 || !strings.HasSuffix(why, "ä…") {
		t.Errorf("got %d bytes", len(why))
	}
}
