package runner

import (
	"maps"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
)

// A Status is what an operator wants to know of a living agent at one moment.
// What it did is in the audit.
type Status struct {
	Policy    string // digest of the policy in force for new jobs
	Slots     int    // jobs at once
	Busy      int    // slots that are held
	Jammed    int    // boxes that will not die; no jobs are claimed while there is one
	Warm      int    // boxes that are ready and that no job has
	Providers map[string]ProviderStatus
}

// A ProviderStatus is how the work for one provider goes.
type ProviderStatus struct {
	Claimed int // jobs between their claim and their slot, without those that wait
	Waiting int // jobs that are claimed and wait for their repository's turn
	Working int // jobs in a box, and until they are reported

	Polls   uint64 // answers, errors included
	Errors  uint64 // that Poll returned; what a provider retries inside is not seen
	Failing error  // of the last answer; nil if it was good
	Doing   Doing
	Since   time.Time // when it began to do that
}

// Doing is what the loop that asks a provider does.
type Doing string

// What the loop does.
const (
	pollSlot  Doing = "wait for a slot"
	pollAsk   Doing = "ask"
	pollClaim Doing = "claim"
	pollEnded Doing = "ended" // before the agent runs, and when it drains
)

// Claiming reports whether the loop waits for the answer to a claim.
func (d Doing) Claiming() bool { return d == pollClaim }

// Ended reports whether the provider is not asked: the agent does not run yet,
// or drains.
func (d Doing) Ended() bool { return d == pollEnded }

// Status looks at the agent. It may be called at any time.
func (a *Agent) Status() Status {
	s := Status{Policy: a.rules.Load().Digest(), Slots: a.slots.total, Providers: a.polls.all()}
	s.Busy, s.Jammed = a.slots.count(s.Providers)
	s.Warm = a.pool.ready()
	return s
}

// polls remembers how the asking goes.
type polls struct {
	mu sync.Mutex
	of map[string]ProviderStatus
}

func newPolls(of map[string]providers.Provider) *polls {
	p := &polls{of: map[string]ProviderStatus{}}
	for name := range of {
		p.of[name] = ProviderStatus{Doing: pollEnded, Since: time.Now()}
	}
	return p
}

func (p *polls) doing(provider string, what Doing) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.of[provider]
	s.Doing, s.Since = what, time.Now()
	p.of[provider] = s
}

func (p *polls) answered(provider string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.of[provider]
	s.Polls++
	if err != nil {
		s.Errors++
	}
	s.Failing = err
	p.of[provider] = s
}

func (p *polls) all() map[string]ProviderStatus {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.of)
}
