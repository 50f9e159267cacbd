package runner

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner/internal/journal"
	"github.com/mayfly-ci/mayfly/runner/policy"
)

// A lease that ends before its job, or before its step, is renewed if the gateway
// alone has it: another one is minted under a name of its own, the gateway adds
// that one from then on, and the first is revoked and seen refused. The job has
// the same placeholder all the time. What a job holds itself, in a variable or a
// file, is not renewed: nobody can take a value out of a program.

const (
	// renewSlack is how much sooner than its job a lease may end and need no
	// renewal: issuers round down, and no job needs its last seconds.
	renewSlack = 10 * time.Second

	// renewLeast is what a lease must have left to be of use: in less there is no
	// time to ask for another.
	renewLeast = time.Second

	// turnsMax is how often a lease is renewed, so that its name stays short
	// enough for every issuer (two digits of turned): in a job of six hours, each
	// 17 seconds.
	turnsMax = 36*36 - 1
)

// holdings are the leases that a job has now, by the names of the policy.
type holdings struct {
	mu    sync.Mutex
	of    map[string]holding
	stops map[string][]func() // of their renewals, by step
}

func (h *holdings) get(name string) (holding, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	held, ok := h.of[name]
	return held, ok
}

func (h *holdings) set(name string, held holding) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.of == nil {
		h.of = map[string]holding{}
	}
	h.of[name] = held
}

func (h *holdings) drop(name string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.of, name)
}

func (h *holdings) clear() {
	h.mu.Lock()
	defer h.mu.Unlock()
	clear(h.of)
}

// tend runs what renews a lease of a step until rest.
func (h *holdings) tend(ctx context.Context, step string, renew func(context.Context)) {
	// The steps that run after a cancellation have it too.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan struct{})
	go func() {
		defer close(done)
		renew(ctx)
	}()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stops == nil {
		h.stops = map[string][]func(){}
	}
	h.stops[step] = append(h.stops[step], func() { cancel(); <-done })
}

// rest ends the renewals of a step, and with "" all that there are. After it the
// scope may be released.
func (h *holdings) rest(step string) {
	h.mu.Lock()
	var stops []func()
	for of, list := range h.stops {
		if of == step || step == "" {
			stops = append(stops, list...)
			delete(h.stops, of)
		}
	}
	h.mu.Unlock()
	for _, stop := range stops {
		stop()
	}
}

// A renewal is one lease of a job, as long as it is renewed.
type renewal struct {
	*steps
	policy.Lease
	now  creds.Lease // that the gateway uses
	name string      // its own
	turn int         // of the last name that was used up
	rule string      // the name of its rules
	due  time.Time   // when it is to be renewed; zero is never
	wait time.Duration
	old  []retired
}

// A retired lease is no longer given to new requests.
type retired struct {
	names []string // of its rules, and its own
	at    time.Time
	wait  time.Duration
}

// keepAlive renews a lease that was just issued, if it must and can be.
func (s *steps) keepAlive(ctx context.Context, l policy.Lease, lease creds.Lease, asked time.Time) {
	job := s.log.Job
	r := &renewal{steps: s, Lease: l, now: lease, wait: retryFirst, name: leaseName(job, l, 0), rule: brokerName(job, l, 0)}
	// Uses are counted by the rules of a lease: another one would have as many again.
	// A tool was told when its key ends.
	if len(l.Broker) == 0 || l.Uses > 0 || l.Serves() || s.handedOut(l, lease) {
		return
	}
	if r.plan(asked); !r.due.IsZero() {
		s.leases.tend(ctx, l.Step, r.run)
	}
}

// handedOut says whether the job itself has a value of the lease.
func (s *steps) handedOut(l policy.Lease, lease creds.Lease) bool {
	return slices.ContainsFunc(l.InClear(), func(field string) bool {
		_, secret := lease.Values[field]
		return secret
	})
}

// plan sets when the lease is renewed next: after two thirds of its life, so that
// the clocks of agent and provider may differ by a third. Where a provider gives
// nothing shorter than some time, it is early enough for that.
func (r *renewal) plan(asked time.Time) {
	r.due = time.Time{}
	if !r.now.ExpiresAt.Before(r.deadline.Add(-renewSlack)) {
		return
	}
	if r.turn >= turnsMax {
		r.out.notice(-1, fmt.Sprintf("lease %s ends at %s, before the job must, and is not renewed again: it was %d times", r.Lease.Name, stamp(r.now.ExpiresAt), r.turn))
		return
	}
	life := r.now.ExpiresAt.Sub(asked)
	r.due = asked.Add(life * 2 / 3)
	i, ok := r.cfg.Issuers[r.Issuer].(creds.Minimum)
	if !ok {
		return
	}
	last := r.deadline.Add(-i.MinLife() - renewSlack)
	if r.due = earlier(r.due, last); last.Before(asked.Add(life / 3)) {
		r.due = time.Time{} // another one would be refused, or end little later
		r.out.notice(-1, fmt.Sprintf("lease %s ends at %s, before the job must, and its issuer gives none for less than %v", r.Lease.Name, stamp(r.now.ExpiresAt), i.MinLife()))
	}
}

// run renews the lease until ctx ends, and takes back those before.
func (r *renewal) run(ctx context.Context) {
	for {
		next := r.due
		for _, o := range r.old {
			if next.IsZero() || o.at.Before(next) {
				next = o.at
			}
		}
		if next.IsZero() || !pause(ctx, time.Until(next)) {
			return
		}
		r.retire(ctx)
		if !r.due.IsZero() && !time.Now().Before(r.due) {
			r.renew(ctx)
		}
	}
}

// renew puts another lease in the place of the one that is used now.
func (r *renewal) renew(ctx context.Context) {
	asked := time.Now()
	held, _ := r.leases.get(r.Lease.Name)
	r.turn++
	name, rule := leaseName(r.log.Job, r.Lease, r.turn), brokerName(r.log.Job, r.Lease, r.turn)
	lease, err := r.again(ctx, name, held.stand)
	if err != nil {
		r.old = append(r.old, retired{[]string{rule, name}, asked, retryFirst})
		r.later(ctx, err)
		return
	}
	// Requests under way have half of what is left to end in.
	gone := asked.Add(r.now.ExpiresAt.Sub(asked) / 2)
	r.old = append(r.old, retired{[]string{r.rule, r.name}, gone, retryFirst})
	r.now, r.name, r.rule, r.wait = lease, name, rule, retryFirst
	held.Lease = lease
	r.leases.set(r.Lease.Name, held)
	r.plan(asked)
}

// again mints under the next name, and has the gateway use it.
func (r *renewal) again(ctx context.Context, name string, stand map[string]string) (creds.Lease, error) {
	if r.Requires != nil && r.Requires.Approval != "" {
		if _, _, err := r.approved(r.Requires); err != nil {
			return creds.Lease{}, err
		}
	}
	if err := r.log.Intend(leaseDebts(r.log.Job, r.Lease, r.turn, r.deadline)...); err != nil {
		return creds.Lease{}, err
	}
	lease, err := r.mint(ctx, r.Lease, r.turn, r.name)
	if err == nil && time.Until(lease.ExpiresAt) < renewLeast {
		err = fmt.Errorf("%s ends at %s, too soon to be of use: are the clocks of agent and provider right?", name, stamp(lease.ExpiresAt))
	}
	if err == nil && slices.ContainsFunc(r.Broker, func(b policy.Broker) bool { return b.Certificate != "" }) {
		err = r.giveBack(ctx, r.rule) // whole connections have a certificate: one at a time
	}
	if err == nil {
		err = r.broker(ctx, r.Lease, &holding{Lease: lease, stand: stand}, r.turn)
	}
	if err == nil {
		err = r.audit(ctx, r.log.Job, "lease.renew", r.name, nil, "issuer", r.Issuer, "by", name)
	}
	if err == nil { // last: it is used on if anything failed, and no lease is renewed twice
		err = r.log.Turn(r.name, journal.Renewed, time.Time{}, "")
	}
	return lease, err
}

// later tries again, as long as the lease lives that is used now.
func (r *renewal) later(ctx context.Context, err error) {
	r.cfg.Log.Error().Err(err).Str("job", r.log.Job).Str("lease", r.Lease.Name).Dur("retry_in", r.wait).Msg("renew")
	left := time.Until(r.now.ExpiresAt)
	r.due = time.Now().Add(min(r.wait, left/4)) // more and more often towards its end
	r.wait = backoff(r.wait)
	if left < renewLeast || r.turn >= turnsMax {
		r.due = time.Time{}
		r.out.notice(-1, fmt.Sprintf("lease %s ends at %s and could not be renewed: %v", r.Lease.Name, stamp(r.now.ExpiresAt), err))
	}
}

// retire takes back what is due. What cannot be is stuck, and is tried again
// here, and at last with its scope.
func (r *renewal) retire(ctx context.Context) {
	var left []retired
	for _, o := range r.old {
		if time.Now().Before(o.at) {
			left = append(left, o)
			continue
		}
		if err := r.giveBack(ctx, o.names...); err != nil {
			r.cfg.Log.Error().Err(err).Str("job", r.log.Job).Dur("retry_in", o.wait).Msg("release of a lease that was renewed")
			left = append(left, retired{o.names, time.Now().Add(o.wait), backoff(o.wait)})
		}
	}
	r.old = left
}

// giveBack releases what has these names.
func (r *renewal) giveBack(ctx context.Context, names ...string) error {
	return r.pay(ctx, r.log, func(d journal.Debt) bool { return slices.Contains(names, d.Name) }, nil)
}
