package credstest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// A world is a fake, its harness, and the parts that a test may break.
type world struct {
	*Fake
	issue  func(ctx context.Context, name string, g creds.Grant) (creds.Lease, error)
	revoke func(ctx context.Context, name string, handle []byte) error
	probe  func(ctx context.Context, name string, handle []byte) (creds.Proof, error)
	list   func(ctx context.Context) ([]creds.Info, error)
	scope  func(scope json.RawMessage) error
	hold   func(ctx context.Context, l creds.Lease) (<-chan error, error)
}

func (w *world) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	return w.issue(ctx, name, g)
}

func (w *world) Revoke(ctx context.Context, name string, handle []byte) error {
	return w.revoke(ctx, name, handle)
}

func (w *world) Probe(ctx context.Context, name string, handle []byte) (creds.Proof, error) {
	return w.probe(ctx, name, handle)
}
func (w *world) List(ctx context.Context) ([]creds.Info, error) { return w.list(ctx) }
func (w *world) CheckScope(scope json.RawMessage) error         { return w.scope(scope) }

func newWorld(t *testing.T, needsHandle bool) (*world, Harness) {
	t.Helper()
	var mu sync.Mutex
	var thawed chan struct{} // nil while nothing is frozen
	frozen := func() chan struct{} { mu.Lock(); defer mu.Unlock(); return thawed }
	set := func(c chan struct{}) { mu.Lock(); defer mu.Unlock(); thawed = c }
	fake, err := NewFake(FakeConfig{
		Dir: t.TempDir(), Owner: "inst-1", NeedsHandle: needsHandle,
		Hook: func(ctx context.Context, _, _ string) error {
			if c := frozen(); c != nil {
				select {
				case <-c:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			return nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{Fake: fake, issue: fake.Issue, revoke: fake.Revoke, probe: fake.Probe, list: fake.List, scope: fake.CheckScope}
	w.hold = func(ctx context.Context, l creds.Lease) (<-chan error, error) {
		ended := make(chan error, 1)
		var wg sync.WaitGroup
		wg.Go(func() {
			tick := time.NewTicker(time.Millisecond)
			defer tick.Stop()
			for {
				if err := fake.Use(ctx, l); err != nil {
					ended <- err
					return
				}
				<-tick.C
			}
		})
		t.Cleanup(wg.Wait)
		return ended, nil
	}
	return w, Harness{
		Issuer: w, Owner: "inst-1",
		Scope: json.RawMessage(`{"read":["a"]}`), BadScopes: []json.RawMessage{json.RawMessage(`{"read":1}`)},
		Use:    fake.Use,
		Hold:   func(ctx context.Context, l creds.Lease) (<-chan error, error) { return w.hold(ctx, l) },
		Down:   func(context.Context) error { return fake.SetDown(true) },
		Up:     func(context.Context) error { return fake.SetDown(false) },
		Freeze: func(context.Context) error { set(make(chan struct{})); return nil },
		Thaw:   func(context.Context) error { close(frozen()); set(nil); return nil },
	}
}

func TestFake(t *testing.T) {
	t.Parallel()
	for _, needsHandle := range []bool{false, true} {
		t.Run(fmt.Sprintf("needsHandle=%v", needsHandle), func(t *testing.T) {
			t.Parallel()
			Run(t, func(t *testing.T) Harness {
				_, h := newWorld(t, needsHandle)
				return h
			})
		})
	}
}

// A mutant breaks a world. The suite must say red for just these clauses.
type mutant struct {
	name   string
	red    []string // the clause that it is made for first
	mutate func(w *world)
}

// TestSuite runs the suite against issuers that break one clause each: a check
// that cannot fail proves nothing.
func TestSuite(t *testing.T) {
	t.Parallel()
	hit := map[string]bool{}
	for _, m := range slices.Concat(issueMutants(), revokeMutants(), probeMutants(), otherMutants()) {
		hit[m.red[0]] = true
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			var mu sync.Mutex
			var red []string
			var wg sync.WaitGroup
			for _, c := range clauses() {
				w, h := newWorld(t, false)
				m.mutate(w)
				h.soon = 5 * time.Second
				wg.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), clauseTimeout)
					defer cancel()
					if err := c.check(ctx, h); err != nil {
						mu.Lock()
						defer mu.Unlock()
						red = append(red, c.name)
					}
				})
			}
			wg.Wait()
			want := slices.Clone(m.red)
			slices.Sort(want)
			slices.Sort(red)
			if !slices.Equal(red, want) {
				t.Errorf("red clauses:\n\t%s\nwant:\n\t%s", strings.Join(red, "\n\t"), strings.Join(want, "\n\t"))
			}
		})
	}
	for _, c := range clauses() {
		if !hit[c.name] {
			t.Errorf("no mutant is made for clause %q", c.name)
		}
	}
}

func issueMutants() []mutant {
	return []mutant{
		{"an empty value", []string{"an issued lease is usable"}, func(w *world) {
			w.issue = func(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
				l, err := w.Fake.Issue(ctx, name, g)
				if err == nil {
					l.Values["more"] = creds.Secret{}
				}
				return l, err
			}
		}},
		{"expires late", []string{"a lease ends no later than its grant"}, func(w *world) {
			w.issue = func(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
				if g.Expires.After(time.Now()) {
					g.Expires = g.Expires.Add(time.Minute)
				}
				return w.Fake.Issue(ctx, name, g)
			}
		}},
		{"renews expired grants", []string{"an expired grant gives nothing usable"}, func(w *world) {
			w.issue = func(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
				if !g.Expires.After(time.Now()) {
					g.Expires = time.Now().Add(time.Minute)
				}
				return w.Fake.Issue(ctx, name, g)
			}
		}},
		{"second issue is a success", []string{"issuing a name twice fails"}, func(w *world) {
			w.issue = func(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
				l, err := w.Fake.Issue(ctx, name, g)
				if errors.Is(err, fs.ErrExist) {
					return creds.Lease{}, nil
				}
				return l, err
			}
		}},
		{"cuts names", []string{"names of full length are different"}, func(w *world) {
			var first sync.Map // by what is left of a name
			cut := func(name string) string {
				whole, _ := first.LoadOrStore(name[:39], name)
				return whole.(string)
			}
			w.issue = func(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
				return w.Fake.Issue(ctx, cut(name), g)
			}
			w.revoke = func(ctx context.Context, name string, h []byte) error { return w.Fake.Revoke(ctx, cut(name), h) }
		}},
	}
}

func revokeMutants() []mutant {
	all := []string{
		"a revoked lease is refused", "revoking without a handle works or is ErrNotRevocable", "revoking ends uses in flight",
		"probing a dead lease is a proof", "probing without a handle proves no more than it can", "revoking while the backend is down fails",
		"a lease is listed while it lives", "a context that ends while nobody answers is honoured", "names do not disturb each other",
	}
	unissued := []string{"an expired grant gives nothing usable", "a scope that is not understood gives nothing", "a context that has ended is honoured", "a context that ends while nobody answers is honoured"}
	return []mutant{
		{"revokes nothing", all, func(w *world) {
			w.revoke = func(ctx context.Context, _ string, _ []byte) error {
				_, err := w.Fake.List(ctx) // which fails when it has to
				return err
			}
		}},
		{"refuses the third revocation", []string{"revoking twice is success"}, func(w *world) {
			var mu sync.Mutex
			calls := map[string]int{}
			w.revoke = func(ctx context.Context, name string, h []byte) error {
				err := w.Fake.Revoke(ctx, name, h)
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					calls[name]++
				}
				if calls[name] > 2 {
					return errors.New("gone")
				}
				return err
			}
		}},
		{"knows only what it issued", append([]string{"revoking what never was is success"}, unissued...), func(w *world) {
			var issued sync.Map
			w.issue = func(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
				l, err := w.Fake.Issue(ctx, name, g)
				if err == nil {
					issued.Store(name, true)
				}
				return l, err
			}
			w.revoke = func(ctx context.Context, name string, h []byte) error {
				if _, ok := issued.Load(name); !ok {
					return errors.New("unknown lease")
				}
				return w.Fake.Revoke(ctx, name, h)
			}
		}},
		{"says ByName and is not", []string{"revoking without a handle works or is ErrNotRevocable"}, func(w *world) {
			w.revoke = func(ctx context.Context, name string, h []byte) error {
				if h == nil {
					return creds.ErrNotRevocable
				}
				return w.Fake.Revoke(ctx, name, h)
			}
		}},
		{"keeps sessions", []string{"revoking ends uses in flight"}, func(w *world) {
			w.hold = func(context.Context, creds.Lease) (<-chan error, error) { return make(chan error), nil }
		}},
		{"revokes while down", []string{"revoking while the backend is down fails"}, func(w *world) {
			w.revoke = func(ctx context.Context, name string, h []byte) error {
				if err := w.Fake.Revoke(ctx, name, h); !errors.Is(err, ErrDown) {
					return err
				}
				return nil
			}
		}},
	}
}

func probeMutants() []mutant {
	return []mutant{
		{"live is just an error", []string{"probing a live lease is ErrStillValid"}, func(w *world) {
			w.probe = func(ctx context.Context, name string, h []byte) (creds.Proof, error) {
				p, err := w.Fake.Probe(ctx, name, h)
				if errors.Is(err, creds.ErrStillValid) {
					err = errors.New("try again")
				}
				return p, err
			}
		}},
		{"proof without the refusal", []string{"probing a dead lease is a proof", "probing without a handle proves no more than it can", "names do not disturb each other"}, func(w *world) {
			w.probe = func(ctx context.Context, name string, h []byte) (creds.Proof, error) {
				p, err := w.Fake.Probe(ctx, name, h)
				p.Refusal = ""
				return p, err
			}
		}},
		{"claims to have tried", []string{"probing without a handle proves no more than it can"}, func(w *world) {
			w.probe = func(ctx context.Context, name string, h []byte) (creds.Proof, error) {
				if h == nil {
					h = []byte("x")
				}
				return w.Fake.Probe(ctx, name, h)
			}
		}},
		{"down is dead", []string{"probing while the backend is down is neither"}, func(w *world) {
			w.probe = func(ctx context.Context, name string, h []byte) (creds.Proof, error) {
				p, err := w.Fake.Probe(ctx, name, h)
				if errors.Is(err, ErrDown) {
					return creds.Proof{At: time.Now(), How: "asked", Refusal: "no answer"}, nil
				}
				return p, err
			}
		}},
		{"down is alive", []string{"probing while the backend is down is neither"}, func(w *world) {
			w.probe = func(ctx context.Context, name string, h []byte) (creds.Proof, error) {
				p, err := w.Fake.Probe(ctx, name, h)
				if errors.Is(err, ErrDown) {
					err = creds.ErrStillValid
				}
				return p, err
			}
		}},
	}
}

func otherMutants() []mutant {
	return []mutant{
		{"lists nothing", []string{"a lease is listed while it lives"}, func(w *world) {
			w.list = func(ctx context.Context) ([]creds.Info, error) { _, err := w.Fake.List(ctx); return nil, err }
		}},
		{"lists without the owner", []string{"a lease is listed while it lives"}, func(w *world) {
			w.list = func(ctx context.Context) ([]creds.Info, error) {
				infos, err := w.Fake.List(ctx)
				for i := range infos {
					infos[i].Owner = ""
				}
				return infos, err
			}
		}},
		{"ignores what it does not know", []string{"a scope that is not understood gives nothing"}, func(w *world) {
			w.issue = func(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
				g.Scope = nil
				return w.Fake.Issue(ctx, name, g)
			}
		}},
		{"issues and then refuses", []string{"a scope that is not understood gives nothing"}, func(w *world) {
			w.issue = func(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
				l, err := w.Fake.Issue(ctx, name, g)
				if errors.Is(err, creds.ErrBadScope) {
					g.Scope = nil
					_, made := w.Fake.Issue(ctx, name, g)
					err = errors.Join(err, made)
				}
				return l, err
			}
		}},
		{"checks nothing", []string{"a scope that is not understood gives nothing"}, func(w *world) {
			w.scope = func(json.RawMessage) error { return nil }
		}},
		{"lists for the dead", []string{"a context that has ended is honoured"}, func(w *world) {
			w.list = func(ctx context.Context) ([]creds.Info, error) {
				if ctx.Err() != nil {
					return nil, nil
				}
				return w.Fake.List(ctx)
			}
		}},
		{"probes for ever", []string{"a context that ends while nobody answers is honoured"}, func(w *world) {
			w.probe = func(ctx context.Context, name string, h []byte) (creds.Proof, error) {
				if ctx.Err() != nil {
					return creds.Proof{}, ctx.Err()
				}
				return w.Fake.Probe(context.WithoutCancel(ctx), name, h)
			}
		}},
		{"shows the token", []string{"no secret is printed"}, func(w *world) {
			w.revoke = func(ctx context.Context, name string, h []byte) error {
				return wrap(string(h), w.Fake.Revoke(ctx, name, h))
			}
		}},
		{"shows the token in a fact", []string{"no secret is printed"}, func(w *world) {
			w.issue = func(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
				l, err := w.Fake.Issue(ctx, name, g)
				if err == nil {
					l.Facts["dsn"] = "fake://" + l.Values["token"].Reveal()
				}
				return l, err
			}
		}},
		{"one at a time", []string{"names do not disturb each other"}, func(w *world) {
			var busy atomic.Int32
			w.issue = func(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
				defer busy.Add(-1)
				if busy.Add(1) > 1 {
					return creds.Lease{}, errors.New("busy")
				}
				tick := time.NewTicker(5 * time.Millisecond)
				defer tick.Stop()
				<-tick.C
				return w.Fake.Issue(ctx, name, g)
			}
		}},
	}
}
