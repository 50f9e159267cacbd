package runner

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"
)

// Quotas say how many jobs of one repository run at once on this agent. The
// zero value limits nothing.
type Quotas struct {
	// Jobs is how many jobs of a repository of a provider may run at once; nil,
	// and 0, are no limit but the slots. It is called with a lock held.
	Jobs func(provider, repository string) int
	// Waiting bounds how many jobs of one provider are claimed and do not run
	// yet: whose a job is, some services tell only with the claim. 0 is
	// DefaultWaiting.
	Waiting int
	// Patience bounds how long one of them waits; then it fails and says so. 0
	// is DefaultPatience.
	Patience time.Duration
}

const (
	// DefaultWaiting lets a service with a long queue of one repository show
	// what stands behind it, and keeps little from other agents.
	DefaultWaiting = 4
	// DefaultPatience is as long as most jobs may run.
	DefaultPatience = time.Hour
)

// slots decide who may work, and who is next.
//
// A slot is taken before a job is claimed, since claiming is a promise to run
// it. If the claim then shows that the job's repository has its quota running,
// the job gives the slot back and waits, claimed, until one of them ends.
//
// When a slot gets free, a job that waits goes before one that is not claimed
// yet; among the like, the repository or provider that was served longest ago
// does. So nobody is passed twice by the same one: every provider is asked in
// turn, however much the others have.
type slots struct {
	total  int
	quotas Quotas

	mu      sync.Mutex
	busy    int            // slots that are held
	jammed  int            // boxes that will not die: no new claims while there is one
	running map[party]int  // jobs that work, by repository
	pending map[string]int // jobs that are claimed and do not work yet, by provider
	queue   []*turn        // asking or waiting, in the order of arrival
	served  map[party]uint64
	clock   uint64
}

// A party is what is served in turn: a repository, or for the repository "" the
// provider that asks for jobs.
type party struct{ provider, repository string }

type turnState int

const (
	asking   turnState = iota // in the queue, for a claim; holds nothing
	claiming                  // holds a slot; the repository is not known yet
	waiting                   // in the queue, claimed; holds no slot
	working                   // holds a slot and counts for its repository
	left
)

// A turn is one job's place among the slots.
type turn struct {
	*slots
	party
	state turnState
	ready chan struct{} // closed when it gets what it is in the queue for
}

func newSlots(total int, q Quotas) *slots {
	q.Waiting = cmp.Or(q.Waiting, DefaultWaiting)
	q.Patience = cmp.Or(q.Patience, DefaultPatience)
	return &slots{total: total, quotas: q, running: map[party]int{}, pending: map[string]int{}, served: map[party]uint64{}}
}

// take waits for a slot in which a job of the provider may be claimed. It
// returns false when ctx ends. Call leave when the job is over.
func (s *slots) take(ctx context.Context, provider string) (*turn, bool) {
	t := &turn{slots: s, party: party{provider: provider}}
	s.mu.Lock()
	s.enqueue(t)
	s.mu.Unlock()
	if err := t.wait(ctx); err != nil {
		t.leave()
		return nil, false
	}
	return t, true
}

// room waits until there is a slot for a job of the provider, and does not take
// it: who only asks for jobs must not keep others from running theirs.
func (s *slots) room(ctx context.Context, provider string) bool {
	t, ok := s.take(ctx, provider)
	if ok {
		t.leave()
	}
	return ok
}

// jam stops new claims until the function that it returns is called.
func (s *slots) jam() func() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.jammed++
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.jammed--
		s.dispatch()
	}
}

// begin makes the turn that of a repository. It returns false if the job has to
// wait: then its slot is free for others, and wait gets it another.
func (t *turn) begin(repository string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.repository = repository
	t.busy--
	t.state = waiting
	if t.eligible(t) {
		t.grant(t)
		t.dispatch() // one less is pending
		return true
	}
	t.enqueue(t)
	return false
}

// wait returns when the turn has come, or the cause of ctx when that ends; then
// the job is out of the queue and stays pending until it leaves.
func (t *turn) wait(ctx context.Context) error {
	select {
	case <-t.ready:
		if ctx.Err() == nil {
			return nil
		}
	case <-ctx.Done():
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dequeue(t)
	return context.Cause(ctx)
}

// leave gives back what the job holds of the slots. A second call does nothing.
func (t *turn) leave() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dequeue(t)
	switch t.state {
	case claiming:
		t.busy--
		t.pending[t.provider]--
	case waiting:
		t.pending[t.provider]--
	case working:
		t.busy--
		if t.running[t.party]--; t.running[t.party] == 0 {
			delete(t.running, t.party)
		}
	}
	t.state = left
	t.forget(t.party)
	t.dispatch()
}

// forget drops the memory of a repository that has no job here any more.
func (s *slots) forget(p party) {
	same := func(t *turn) bool { return t.party == p }
	if p.repository != "" && s.running[p] == 0 && !slices.ContainsFunc(s.queue, same) {
		delete(s.served, p)
	}
}

func (s *slots) enqueue(t *turn) {
	t.ready = make(chan struct{})
	s.queue = append(s.queue, t)
	s.dispatch()
}

func (s *slots) dequeue(t *turn) {
	s.queue = slices.DeleteFunc(s.queue, func(other *turn) bool { return other == t })
}

// dispatch lets everybody go on who can, in the order of the type's comment.
func (s *slots) dispatch() {
	for {
		var next *turn
		for _, t := range s.queue {
			if s.eligible(t) && (next == nil || s.before(t, next)) {
				next = t
			}
		}
		if next == nil {
			return
		}
		s.dequeue(next)
		s.grant(next)
		close(next.ready)
	}
}

func (s *slots) eligible(t *turn) bool {
	if s.busy >= s.total {
		return false
	}
	if t.state == waiting {
		quota := s.quota(t.party)
		return quota == 0 || s.running[t.party] < quota
	}
	return s.jammed == 0 && (s.quotas.Jobs == nil || s.pending[t.provider] < s.quotas.Waiting)
}

func (s *slots) quota(p party) int {
	if s.quotas.Jobs == nil {
		return 0
	}
	return s.quotas.Jobs(p.provider, p.repository)
}

// before compares two in the queue, of which t came later.
func (s *slots) before(t, other *turn) bool {
	if t.state != other.state {
		return t.state == waiting
	}
	return s.served[t.party] < s.served[other.party]
}

func (s *slots) grant(t *turn) {
	s.busy++
	s.clock++
	s.served[t.party] = s.clock
	if t.state == asking {
		t.state = claiming
		s.pending[t.provider]++
		return
	}
	t.state = working
	s.pending[t.provider]--
	s.running[t.party]++
}

// count says how many slots are held and how many boxes will not die, and adds
// to each provider where its jobs are.
func (s *slots) count(of map[string]ProviderStatus) (busy, jammed int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, p := range of {
		p.Claimed = s.pending[name]
		for _, t := range s.queue {
			if t.state == waiting && t.provider == name {
				p.Waiting++
				p.Claimed--
			}
		}
		for party, n := range s.running {
			if party.provider == name {
				p.Working += n
			}
		}
		of[name] = p
	}
	return s.busy, s.jammed
}
