package runner_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

const renewPolicy = `version: 1
rules:
  - name: all
    match: {trust: [local]}
    timeout: 20m
    egress: [{name: other.example, port: 443, protocol: tls}]
    leases:
      - name: job
        issuer: pg
        ttl: 3m
        env: {TOKEN: token}
        broker: [{name: api.example, port: 443, as: bearer, value: token}]
`

// ticking is an issuer whose provider has a clock of its own. It says until when
// each lease is good, and refuses what is not.
type ticking struct {
	skew time.Duration // by which the provider's clock is ahead
	min  time.Duration // that it gives at least
	down func() bool

	mu   sync.Mutex
	ends map[string]time.Time // by name; those that are not revoked
	all  []string             // names, as they were asked for
	late time.Time            // the latest end that was asked for
}

func (i *ticking) provider() time.Time { return time.Now().Add(i.skew) }

func (i *ticking) Issue(_ context.Context, name string, g creds.Grant) (creds.Lease, error) {
	if i.down() {
		return creds.Lease{}, errDown
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if time.Until(g.Expires) < i.min {
		return creds.Lease{}, fmt.Errorf("%s: less than %v", name, i.min)
	}
	i.all = append(i.all, name)
	i.ends[name] = i.provider().Add(time.Until(g.Expires).Truncate(time.Second)) // it is told for how long
	if g.Expires.After(i.late) {
		i.late = g.Expires
	}
	return creds.Lease{
		Values: map[string]creds.Secret{"token": creds.NewSecret("tk-" + name)}, Handle: []byte("tk-" + name), ByName: true,
		ExpiresAt: g.Expires.Truncate(time.Second),
	}, nil
}

// good says whether the provider takes a token.
func (i *ticking) good(token string) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.provider().Before(i.ends[strings.TrimPrefix(token, "tk-")])
}

func (i *ticking) live() (names []string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	for name := range i.ends {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func (i *ticking) Revoke(_ context.Context, name string, _ []byte) error {
	if i.down() {
		return errDown
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.ends, name)
	return nil
}

func (i *ticking) Probe(_ context.Context, name string, handle []byte) (creds.Proof, error) {
	if i.down() {
		return creds.Proof{}, errDown
	}
	if i.good(string(handle)) {
		return creds.Proof{}, creds.ErrStillValid
	}
	return creds.Proof{At: time.Now(), How: "used " + name, Refusal: "no such token"}, nil
}

func (i *ticking) List(context.Context) ([]creds.Info, error) { return nil, errors.ErrUnsupported }

func (i *ticking) MinLife() time.Duration { return i.min }

// used is what the gateway would give to a request now: the credential of the
// newest rules.
type used struct {
	*worldGateway
	mu    sync.Mutex
	rules []egress.Rule
	names []string
}

func (g *used) Open(ctx context.Context, name string, o egress.Opening) error {
	if o.Parent != "" {
		g.mu.Lock()
		g.names, g.rules = append(g.names, name), append(g.rules, o.Rules.Allow[0])
		g.mu.Unlock()
	}
	return g.worldGateway.Open(ctx, name, o)
}

func (g *used) Close(ctx context.Context, name string) error {
	g.mu.Lock()
	if i := slices.Index(g.names, name); i >= 0 {
		g.names, g.rules = slices.Delete(g.names, i, i+1), slices.Delete(g.rules, i, i+1)
	}
	g.mu.Unlock()
	return g.worldGateway.Close(ctx, name)
}

func (g *used) now() (in egress.Injection, open int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.rules) == 0 {
		return egress.Injection{}, 0
	}
	return *g.rules[len(g.rules)-1].Inject, len(g.rules)
}

// renewing runs a job of a quarter of an hour with a lease of three minutes, and
// looks at it each second.
func renewing(t *testing.T, i *ticking, text string, look func(at time.Duration, g *used)) (*world, providers.Result) {
	t.Helper()
	w := newWorld(t)
	i.ends = map[string]time.Time{}
	g := &used{worldGateway: (*worldGateway)(w)}
	begun := time.Now()
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for pauseIn(ctx, time.Second) {
			look(time.Since(begun), g)
		}
	}()
	time.AfterFunc(15*time.Minute+500*time.Millisecond, func() { close(w.cancel) })
	r := w.run(lifetime(t), func(c *runner.Config) {
		withPolicy(t, text)(c)
		c.Gateway, c.Issuers = g, map[string]creds.Issuer{"pg": i}
	}, providers.Step{Run: "env TOKEN\nblock"}, providers.Step{Run: "env TOKEN", If: "always()"})
	cancel()
	synctest.Wait()
	w.clean()
	if left := i.live(); len(left) > 0 {
		t.Errorf("left at the provider: %v", left)
	}
	if i.late.After(begun.Add(20 * time.Minute)) {
		t.Errorf("a lease was asked for until %v after the job began, which has 20m", i.late.Sub(begun))
	}
	return w, r
}

func pauseIn(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// TestRenewed: a job that is longer than its lease has a good one at every moment,
// behind the same placeholder, whatever the provider's clock says within a minute;
// those before are revoked and seen refused while the job runs.
func TestRenewed(t *testing.T) {
	t.Parallel()
	for _, skew := range []time.Duration{0, 50 * time.Second, -50 * time.Second} {
		t.Run(skew.String(), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				i := &ticking{skew: skew, down: func() bool { return false }}
				place, most := "", 0
				w, r := renewing(t, i, renewPolicy, func(at time.Duration, g *used) {
					in, open := g.now()
					if !i.good(in.Value.Reveal()) {
						t.Errorf("after %v the gateway has %s, which is no good", at, in.Lease)
					}
					if place == "" {
						place = in.Placeholder
					}
					if in.Placeholder != place {
						t.Errorf("after %v the placeholder is another", at)
					}
					if most = max(most, open, len(i.live())); most > 2 {
						t.Fatalf("after %v there are %d", at, most)
					}
				})
				if r.Conclusion != providers.Cancelled || len(i.all) < 5 || most != 2 {
					t.Errorf("got %+v, %d leases, %d at once", r, len(i.all), most)
				}
				if shown := w.shown(); strings.Count(shown, place+"\n") != 2 || strings.Contains(shown, "tk-mf-") {
					t.Errorf("the job has %q, want the one placeholder in both of its steps", shown)
				}
				w.receipts(i.all)
			})
		})
	}
}

// receipts wants of each lease what the record says of its whole life.
func (w *world) receipts(names []string) {
	w.t.Helper()
	for n, name := range names {
		var got []string
		for _, e := range w.events {
			if e.Object != name || !strings.HasPrefix(e.Action, "lease.") {
				continue
			}
			got = append(got, e.Action)
			if e.Action == "lease.revoke" && (e.Result != "ok" || e.Detail["probe"] != "used "+name || e.Detail["refusal"] == "" || e.Detail["refused_at"] == "") {
				w.t.Errorf("%s: the receipt is %+v", name, e)
			}
		}
		want := []string{"lease.request", "lease.issue", "lease.renew", "lease.revoke"}
		if n == len(names)-1 {
			want = slices.Delete(want, 2, 3)
		}
		if !slices.Equal(got, want) {
			w.t.Errorf("%s: the record has %v, want %v", name, got, want)
		}
	}
}

// TestRenewalFails: an issuer that is down for a minute is asked again; one that
// stays down costs the job its lease, and the log says so.
func TestRenewalFails(t *testing.T) {
	t.Parallel()
	for minutes, lost := range map[int]bool{0: false, 20: true} {
		t.Run(fmt.Sprint(minutes), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				begun := time.Now()
				end := begun.Add(2*time.Minute + time.Duration(minutes)*time.Minute + 40*time.Second)
				i := &ticking{}
				i.down = func() bool { return time.Since(begun) > 90*time.Second && time.Now().Before(end) }
				bad := 0
				w, _ := renewing(t, i, renewPolicy, func(_ time.Duration, g *used) {
					if in, _ := g.now(); !i.good(in.Value.Reveal()) {
						bad++
					}
				})
				if lost != (bad > 0) {
					t.Errorf("no good lease for %d seconds, want that to be so: %v", bad, lost)
				}
				if said := strings.Contains(w.shown(), "could not be renewed"); said != lost {
					t.Errorf("log: %s", w.shown())
				}
			})
		})
	}
}

// TestNotRenewed: what the job holds itself is what it was given.
func TestNotRenewed(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(string) string{
		"in clear": func(s string) string {
			return strings.Replace(s, "issuer: pg", "issuer: pg\n        clear: [token]", 1)
		},
		"counted":  func(s string) string { return strings.Replace(s, "issuer: pg", "issuer: pg\n        uses: 5", 1) },
		"env":      func(s string) string { return s[:strings.Index(s, "        broker:")] },
		"too late": func(s string) string { return strings.Replace(s, "ttl: 3m", "ttl: 10m", 1) },
		"long":     func(s string) string { return strings.Replace(s, "ttl: 3m", "ttl: 20m", 1) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				i := &ticking{down: func() bool { return false }}
				if name == "too late" {
					i.min = 16 * time.Minute
					change = func(s string) string { return strings.Replace(s, "ttl: 3m", "ttl: 17m", 1) }
				}
				w, _ := renewing(t, i, change(renewPolicy), func(time.Duration, *used) {})
				if len(i.all) != 1 {
					t.Errorf("%d leases: %v", len(i.all), i.all)
				}
				if said := strings.Contains(w.shown(), "gives none for less than 16m"); said != (name == "too late") {
					t.Errorf("log: %s", w.shown())
				}
			})
		})
	}
}

// TestRenewedInTime: where a provider gives nothing short, the renewal is early
// enough to be given, and no earlier than it must be.
func TestRenewedInTime(t *testing.T) {
	t.Parallel()
	for ttl, at := range map[string]time.Duration{
		"14m30s": 9*time.Minute + 40*time.Second, // two thirds
		"18m":    9*time.Minute + 50*time.Second, // two thirds are 12m, and then no 10m are left
	} {
		t.Run(ttl, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				i := &ticking{min: 10 * time.Minute, down: func() bool { return false }}
				first, renewed := "", time.Duration(0)
				w, _ := renewing(t, i, strings.Replace(renewPolicy, "ttl: 3m", "ttl: "+ttl, 1), func(at time.Duration, g *used) {
					in, _ := g.now()
					token := in.Value.Reveal()
					if !i.good(token) {
						t.Errorf("no good lease after %v", at)
					}
					if first == "" {
						first = token
					}
					if renewed == 0 && token != first {
						renewed = at
					}
				})
				if len(i.all) != 2 || renewed < at || renewed > at+2*time.Second {
					t.Errorf("leases: %v, renewed after %v, want that after %v", i.all, renewed, at)
				}
				if strings.Contains(w.shown(), "could not be renewed") {
					t.Errorf("log: %s", w.shown())
				}
			})
		})
	}
}

// TestRenewalUnrecorded: a renewal that could not be written into the record is taken
// back, and the next one is made all the same.
func TestRenewalUnrecorded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		lost := 0
		w.failWith(func(call, _ string) error {
			if call == "audit.lease.renew" && lost == 0 {
				lost++
				return errDown
			}
			return nil
		})
		time.AfterFunc(5*time.Minute, func() { close(w.cancel) })
		text := strings.ReplaceAll(renewPolicy, "token", "password")
		w.run(lifetime(t), withPolicy(t, text), providers.Step{Run: "block"})
		if n := slices.DeleteFunc(w.actions("lease.renew"), func(a string) bool { return a != "lease.renew" }); lost != 1 || len(n) != 2 {
			t.Errorf("%d renewals in five minutes, want two; log: %s", len(n), w.shown())
		}
		w.clean()
	})
}

// TestUnprovableAndDead: an agent that dies between the two lines that end a lease
// which nobody can take back leaves nothing that the next one cannot end.
func TestUnprovableAndDead(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.failWith(func(call, _ string) error {
			if call == "revoke" {
				return creds.ErrNotRevocable
			}
			return nil
		})
		a := w.agent(nil)
		wal := `{"op":"begin","version":1,"generation":1,"debts":[{"kind":"claim","name":"mf-a","by":"ci"}]}
{"op":"intend","debts":[{"kind":"lease","name":"mf-a-l-db","by":"pg"}]}
{"op":"lease","name":"mf-a-l-db","state":"revoking"}
{"op":"lease","name":"mf-a-l-db","state":"unprovable"}
`
		if err := os.WriteFile(filepath.Join(w.dir, "state", "jobs", "mf-a.wal"), []byte(wal), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := a.Recover(lifetime(t)); err != nil {
			t.Error(err)
		}
		w.clean()
	})
}

// TestRenewedForNothing: a lease that is over when it comes is no renewal, and not
// asked for without end.
func TestRenewedForNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var calls atomic.Int64
		i := &ticking{down: func() bool { n := calls.Add(1); return n > 100 && n < 150 }}
		w, _ := renewing(t, i, strings.Replace(renewPolicy, "ttl: 3m", "ttl: 1s", 1), func(time.Duration, *used) {})
		if len(i.all) != 2 || !strings.Contains(w.shown(), "could not be renewed: ") || !strings.Contains(w.shown(), "too soon") {
			t.Errorf("%d leases; log: %.500s", len(i.all), w.shown())
		}
	})
}

// TestRenewedWhileApproved: an approval that is over, or taken back, is none for the
// next lease either.
func TestRenewedWhileApproved(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := filepath.Join(dir, "approval.yaml")
	synctest.Test(t, func(t *testing.T) {
		if err := os.WriteFile(file, []byte("version: 1\nrepository: acme/app\nsha: "+commit+"\nby: alice\nuntil: "+time.Now().Add(5*time.Minute).Format(time.RFC3339)+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		w := newWorld(t)
		time.AfterFunc(12*time.Minute, func() { close(w.cancel) })
		text := strings.ReplaceAll(renewPolicy, "token", "password") + "        requires: {approval: " + file + "}\n"
		j := job(providers.Step{Run: "block"})
		j.Subject.SHA = commit
		w.offers <- j
		ctx := lifetime(t)
		if err := w.agent(withPolicy(t, text)).Run(ctx, ctx); err != nil {
			t.Error(err)
		}
		if n := len(w.actions("lease.issue")); n != 3 || !strings.Contains(w.shown(), "could not be renewed: approval "+file+": it was good until") {
			t.Errorf("%d leases, want the first and those of two and four minutes; log: %s", n, w.shown())
		}
		w.clean()
	})
}

// TestRenewedAndStuck: a lease that was renewed and cannot be taken back is stuck
// in the journal, which says why, and the job goes on.
func TestRenewedAndStuck(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.failWith(func(call, name string) error {
			if call == "revoke" && strings.HasSuffix(name, "-l-job") {
				return errDown
			}
			return nil
		})
		var seen []string
		time.AfterFunc(6*time.Minute, func() {
			state, err := runner.PeekState(filepath.Join(w.dir, "state"))
			if err != nil {
				t.Error(err)
				return
			}
			jobs, err := state.Jobs()
			if err != nil || len(jobs) != 1 {
				t.Errorf("%v, %v", jobs, err)
				return
			}
			for _, d := range jobs[0].Owes {
				if d.Kind == "lease" {
					seen = append(seen, d.State)
				}
				if d.Stuck() && (d.Why == "" || d.Since.IsZero() || d.Expires.IsZero()) {
					t.Errorf("stuck: %+v", d)
				}
			}
			w.failWith(func(string, string) error { return nil })
		})
		time.AfterFunc(7*time.Minute, func() { close(w.cancel) })
		text := strings.ReplaceAll(renewPolicy, "token", "password")
		w.run(lifetime(t), withPolicy(t, text), providers.Step{Run: "block"})
		if slices.Sort(seen); !slices.Contains(seen, "stuck") || !slices.Contains(seen, "issued") {
			t.Errorf("after six minutes the leases are %v", seen)
		}
		w.clean()
	})
}
