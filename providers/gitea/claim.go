package gitea

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
)

// A reference is Job.Ref: what a later life of the agent needs of a claim. The
// journal seals it, so it may hold the identity that the task was given to.
type reference struct {
	Task  integer `json:"task"`
	Steps int     `json:"steps"`
	UUID  string  `json:"uuid"`
	Token string  `json:"token"`
}

// A claim is a task that was assigned to us and whose end was not reported.
type claim struct {
	name     string
	task     integer
	id       identity
	steps    int  // how many the job has
	restored bool // from a reference: the states of the steps are not known
	job      providers.Job
	bad      error // beside the job: it cannot be run
	log      *jobLog

	// reporting is held during an UpdateTask, so that an older state of the
	// steps does not follow a newer one.
	reporting sync.Mutex
	reported  bool // the final state
	lost      bool // the server does not know the task as ours

	mu      sync.Mutex
	decided chan struct{} // closed when the server wants the task to end
	told    bool          // Watch has said so
}

func newClaim(name string, task integer, id identity, steps int) *claim {
	return &claim{name: name, task: task, id: id, steps: steps, log: newJobLog(), decided: make(chan struct{})}
}

func (c *claim) reference() ([]byte, error) {
	return json.Marshal(reference{Task: c.task, Steps: c.steps, UUID: c.id.UUID, Token: c.id.token.Reveal()})
}

// decide notes that the server wants the task to end, or has ended it.
func (c *claim) decide() {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.decided:
	default:
		close(c.decided)
	}
}

// news says once that the server has decided.
func (c *claim) news() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.decided:
		first := !c.told
		c.told = true
		return first
	default:
		return false
	}
}

// Claim asks for a task. An ask that finds nothing is ErrGone, and so is one
// that fails, because nothing is known to be owed then: Poll tells the failure
// and waits.
func (p *Provider) Claim(ctx context.Context, name string, _ providers.Offer) (providers.Job, error) {
	if err := checkName(name); err != nil {
		return providers.Job{}, err
	}
	p.asking.Lock()
	defer p.asking.Unlock()
	p.mu.Lock()
	c := p.claims[name]
	p.mu.Unlock()
	if c != nil {
		return c.job, c.bad
	}
	if err := p.ready(ctx); err != nil {
		return p.nothing(err)
	}
	t, id, broken, err := p.fetch(ctx)
	if err != nil || t == nil {
		return p.nothing(err)
	}
	p.config.Trace("gitea.fetched")
	if t.ID <= 0 {
		return p.nothing(&callError{method: "FetchTask", err: errors.New("the server assigned a task without a number")})
	}
	if !p.remember(t.ID) {
		return p.nothing(&callError{method: "FetchTask", err: fmt.Errorf("the server assigned task %d again, which was claimed before: it is not run twice", t.ID)})
	}
	p.busy(0)
	c = newClaim(name, t.ID, id, 0)
	if broken != nil {
		c.bad = bad("task %d: %v", t.ID, broken)
	} else {
		c.job, c.bad = p.job(t)
	}
	c.steps = len(c.job.Steps)
	if c.job.Ref, err = c.reference(); err != nil {
		return p.nothing(err)
	}
	p.mu.Lock()
	p.claims[name] = c
	p.mu.Unlock()
	return c.job, c.bad
}

// nothing is the answer of Claim when there is nothing to bind.
func (p *Provider) nothing(err error) (providers.Job, error) {
	p.rest(err)
	if err != nil {
		return providers.Job{}, fmt.Errorf("ask: %w: %w", providers.ErrGone, err)
	}
	return providers.Job{}, fmt.Errorf("ask: %w", providers.ErrGone)
}

// fetch asks. Of an answer that cannot be used (broken says why) the task has
// at least its number.
func (p *Provider) fetch(ctx context.Context) (t *task, id identity, broken, err error) {
	id = p.current.identity()
	var out fetchResponse
	partial, err := p.client.call(ctx, methodFetchTask, id, fetchRequest{TasksVersion: p.tasksVersion}, &out)
	if err != nil {
		p.tasksVersion = 0 // look again, whatever that answer was about
		if n := taskNumber(partial); n > 0 {
			t, broken = &task{ID: n}, err
		} else {
			return nil, id, nil, p.disowned(err)
		}
	} else {
		t, p.tasksVersion = out.Task, out.TasksVersion
	}
	if t != nil {
		p.tasksVersion = 0 // there may be more
		if p.config.Ephemeral {
			p.refused, p.current = id.UUID, nil // it gets no second one
		}
	}
	return t, id, broken, nil
}

// taskNumber reads the number of the task from the beginning of an answer.
func taskNumber(partial []byte) integer {
	d := json.NewDecoder(bytes.NewReader(partial))
	d.UseNumber()
	for _, want := range []any{json.Delim('{'), "task", json.Delim('{'), "id"} {
		if got, err := d.Token(); err != nil || got != want {
			return 0
		}
	}
	var n integer
	if got, err := d.Token(); err != nil || n.UnmarshalJSON([]byte(fmt.Sprint(got))) != nil {
		return 0
	}
	return n
}

// remember notes a task, and returns false if it is known already.
func (p *Provider) remember(task integer) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if slices.Contains(p.seen, task) {
		return false
	}
	if len(p.seen) == maxSeen {
		p.seen = slices.Delete(p.seen, 0, 1)
	}
	p.seen = append(p.seen, task)
	return true
}

// find returns the claim, from its reference if an earlier life made it, and
// ErrGone if there is none.
func (p *Provider) find(name string, ref []byte) (*claim, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.claims[name]; c != nil {
		return c, nil
	}
	if len(ref) == 0 {
		return nil, fmt.Errorf("claim %s: %w", name, providers.ErrGone)
	}
	var r reference
	if err := json.Unmarshal(ref, &r); err != nil || r.Task <= 0 {
		return nil, fmt.Errorf("claim %s: its reference is damaged: %w", name, providers.ErrGone)
	}
	c := newClaim(name, r.Task, identity{UUID: r.UUID, token: creds.NewSecret(r.Token)}, r.Steps)
	c.restored = true
	c.log.restore()
	p.claims[name] = c
	if !slices.Contains(p.seen, c.task) {
		p.seen = append(p.seen, c.task)
	}
	return c, nil
}
