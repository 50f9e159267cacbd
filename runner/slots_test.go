package runner

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// A passage is one grant of a slot for a claim: when it was asked for and when
// it came, in grants.
type passage struct {
	provider    string
	asked, came uint64
}

// A crowd is providers without end of work, over slots.
type crowd struct {
	*slots
	t    *testing.T
	each int // jobs of each provider

	log      sync.Mutex
	passages []passage
}

// look checks what must hold at any moment.
func (c *crowd) look() {
	c.mu.Lock()
	defer c.mu.Unlock()
	works := 0
	for p, n := range c.running {
		if quota := c.quota(p); n < 1 || quota > 0 && n > quota {
			c.t.Errorf("%d jobs of %v work, want 1 to %d", n, p, quota)
		}
		works += n
	}
	if c.busy < works || c.busy > c.total {
		c.t.Errorf("%d slots of %d are held and %d jobs work", c.busy, c.total, works)
	}
	for p, n := range c.pending {
		if n < 0 || c.quotas.Jobs != nil && n > c.quotas.Waiting {
			c.t.Errorf("%d jobs of %s are claimed and do not work, want at most %d", n, p, c.quotas.Waiting)
		}
	}
	if slices.ContainsFunc(c.queue, c.eligible) {
		c.t.Error("somebody waits who could go on")
	}
}

// serve is the loop of one provider and the lives of its jobs.
func (c *crowd) serve(ctx context.Context, provider string, dice *rand.Rand) {
	var jobs sync.WaitGroup
	defer jobs.Wait()
	for range c.each {
		turn := &turn{slots: c.slots, party: party{provider: provider}}
		c.mu.Lock()
		asked := c.clock // under the lock of the queue: others go on before and after
		c.enqueue(turn)
		c.mu.Unlock()
		if err := turn.wait(ctx); err != nil {
			c.t.Errorf("%s starves: no slot in an hour", provider)
			return
		}
		c.mu.Lock()
		came := c.served[party{provider: provider}]
		c.mu.Unlock()
		c.log.Lock()
		c.passages = append(c.passages, passage{provider, asked, came})
		c.log.Unlock()
		c.look()
		repository := fmt.Sprint("r", dice.IntN(3)*dice.IntN(2)) // one has most of the jobs
		work, patience := time.Duration(dice.IntN(5000))*time.Millisecond, time.Duration(dice.IntN(20))*time.Second
		jobs.Go(func() {
			defer c.look()
			defer turn.leave()
			if !turn.begin(repository) {
				ctx, cancel := context.WithTimeout(ctx, patience)
				defer cancel()
				if err := turn.wait(ctx); err != nil {
					pause(context.Background(), time.Second) // its release takes time
					return
				}
			}
			c.look()
			pause(context.Background(), work)
		})
		if dice.IntN(4) == 0 {
			pause(ctx, time.Duration(dice.IntN(3000))*time.Millisecond)
		}
	}
}

// Whatever comes in which order: quotas and bounds hold, no slot is idle while
// somebody could use it, and nobody who waits to claim is passed twice by the
// same provider.
func TestSlotsAreFair(t *testing.T) {
	t.Parallel()
	for seed := range uint64(30) {
		for _, parked := range []int{1, 2, 1000} {
			synctest.Test(t, func(t *testing.T) {
				dice := rand.New(rand.NewPCG(seed, 1))
				c := &crowd{t: t, each: 30, slots: newSlots(1+dice.IntN(4), Quotas{
					Waiting: parked,
					Jobs: func(_, repository string) int {
						return map[string]int{"r0": 1, "r1": 2}[repository] // 0 for r2: no quota
					},
				})}
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				var all sync.WaitGroup
				providers := []string{"a", "b", "c"}[:1+dice.IntN(3)]
				for i, p := range providers {
					all.Go(func() { c.serve(ctx, p, rand.New(rand.NewPCG(seed, uint64(2+i)))) })
				}
				all.Wait()
				if parked == 1000 {
					c.neverPassedTwice(seed, providers)
				}
				if len(c.passages) != c.each*len(providers) {
					t.Errorf("seed %d: %d claims, want %d", seed, len(c.passages), c.each*len(providers))
				}
				for p := range c.served {
					if p.repository != "" {
						t.Errorf("seed %d: %v is remembered and has no jobs", seed, p)
					}
				}
				if c.busy != 0 || len(c.running)+len(c.queue) != 0 || c.pending["a"]+c.pending["b"]+c.pending["c"] != 0 {
					t.Errorf("seed %d: at the end: %+v", seed, c.slots)
				}
			})
		}
	}
}

func (c *crowd) neverPassedTwice(seed uint64, providers []string) {
	for _, p := range c.passages {
		for _, other := range providers {
			n := 0
			for _, q := range c.passages {
				if q.provider == other && other != p.provider && p.asked < q.came && q.came < p.came {
					n++
				}
			}
			if n > 1 {
				c.t.Errorf("seed %d: %s was passed %d times by %s while it waited for a slot", seed, p.provider, n, other)
			}
		}
	}
}

// Among repositories that wait, the one that was served longest ago is next,
// however many jobs of another came before. A new claim comes behind them.
func TestRepositoriesTakeTurns(t *testing.T) {
	t.Parallel()
	s := newSlots(0, Quotas{Jobs: func(string, string) int { return 5 }})
	waits := []*turn{{slots: s, party: party{provider: "ci"}}} // asks for a claim
	s.enqueue(waits[0])
	for _, repository := range []string{"many", "many", "many", "few", "few"} {
		turn := &turn{slots: s, party: party{"ci", repository}, state: waiting}
		s.pending["ci"]++
		s.enqueue(turn)
		waits = append(waits, turn)
	}
	var order []*turn
	for s.total < len(waits) {
		s.total++
		s.dispatch()
		for _, w := range waits {
			if (w.state == working || w.state == claiming) && !slices.Contains(order, w) {
				order = append(order, w)
			}
		}
	}
	if want := []*turn{waits[1], waits[4], waits[2], waits[5], waits[3], waits[0]}; !slices.Equal(order, want) {
		var got []string
		for _, turn := range order {
			got = append(got, turn.repository)
		}
		t.Errorf("got the order %v, want many, few, many, few, many, and then the one without a job", got)
	}
}

// Who gives up is out of the queue, and a slot that came at that moment is not
// lost.
func TestGivingUp(t *testing.T) {
	t.Parallel()
	s := newSlots(1, Quotas{})
	held, _ := s.take(t.Context(), "ci")
	why := errors.New("because")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(why)
	if _, ok := s.take(ctx, "ci"); ok || len(s.queue) != 0 {
		t.Errorf("got a slot, or %d still in the queue", len(s.queue))
	}
	late := &turn{slots: s, party: party{provider: "ci"}}
	s.enqueue(late)
	held.leave() // grants it
	if err := late.wait(ctx); !errors.Is(err, why) || s.busy != 1 {
		t.Errorf("got %v with %d slots held, want the cause, and the slot until it leaves", err, s.busy)
	}
	late.leave()
	late.leave()
	if s.busy != 0 || s.pending["ci"] != 0 {
		t.Errorf("%d slots held and %d pending, want none", s.busy, s.pending["ci"])
	}
}
