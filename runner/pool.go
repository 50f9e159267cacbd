package runner

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/runner/internal/failpoint"
	"github.com/mayfly-ci/mayfly/runner/internal/journal"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
)

// The warm pool holds boxes that are made and that no job has yet
// (docs/adr/0019). Each is a debt of a log of its own until a job intends it as
// one of its debts; then it is the job's, and nothing leads back. Warm only says
// how it came to be: its gateway, its sockets and its leases are the job's own.

// Warm says how many boxes are ready before there is a job. The zero value is
// none.
type Warm struct {
	Boxes int           // of each class, which is what rules of the policy make boxes with
	Age   time.Duration // after which one that no job took is replaced; 0 is DefaultWarmAge
}

// DefaultWarmAge bounds how far a box may be behind its image and the host.
const DefaultWarmAge = 10 * time.Minute

const (
	// poolLook is how often boxes are asked whether they live. One is asked
	// again before a job gets it, so this is only how soon it is replaced.
	poolLook = 10 * time.Second
	// poolAnswer is how long one may take to answer. It takes a tenth of a
	// millisecond; making a new one takes less than this.
	poolAnswer = time.Second
	// poolCalm is how long no job must have begun or ended before a box is
	// made: longer than either takes, so that they do not pay for it.
	poolCalm = 50 * time.Millisecond
	// poolPatience is how long the pool waits for that. Jobs that come at once
	// for longer need it more than the calm.
	poolPatience = time.Second
	// poolMake bounds the making of one box, the pull of a large image included.
	poolMake = 10 * time.Minute
)

type pool struct {
	agent *Agent
	size  int // of each class
	age   time.Duration
	wake  map[string]chan struct{} // by runtime: something has changed

	mu       sync.Mutex
	boxes    []*warmBox // all that no job has, oldest first
	shut     bool       // the agent stops
	stirred  time.Time  // when a job last began or ended
	creating int        // boxes that are made for jobs now
}

// A warmBox is one box of the pool. The pool's lock guards its state.
type warmBox struct {
	class
	name    string
	made    string          // key of what it was made with, when its image was known
	mounts  []sandbox.Mount // that the job had put into it
	log     *journal.Log    // owes it until a job does
	box     sandbox.Sandbox
	expires time.Time
	unlist  func() // lets the reaper have it

	state warmState
	why   string // it is unfit
}

type warmState int

const (
	warmMaking  warmState = iota
	warmReady             // a job may take it
	warmTaken             // a job is about to owe it
	warmUnfit             // to be destroyed
	warmLeaving           // being destroyed
)

func newPool(a *Agent) *pool {
	p := &pool{agent: a, size: a.cfg.Warm.Boxes, age: cmp.Or(a.cfg.Warm.Age, DefaultWarmAge), wake: map[string]chan struct{}{}}
	for name := range a.cfg.Runtimes {
		p.wake[name] = make(chan struct{}, 1)
	}
	return p
}

// A class is what the plans have in common that one box would do for.
type class struct {
	key     string
	runtime string
	spec    sandbox.Spec  // without labels and expiry, with the image as the policy names it
	life    time.Duration // that a job may need it for: the longest of the rules
}

// classKey has all that a runtime is told, whatever a Spec comes to have, but what
// may be put into a box later. What does not print as equal is not: then a box is
// made for the job.
func classKey(runtime string, s sandbox.Spec) string {
	s.Labels, s.Expires, s.Mounts = sandbox.Labels{}, time.Time{}, nil
	return fmt.Sprintf("%s %#v", runtime, s)
}

// classesOf are the classes of a policy, in the order of its rules.
func classesOf(p *policy.Policy, outlives func(policy.Plan) time.Duration) []class {
	var cs []class
	for _, plan := range p.Plans() {
		if plan.Pull != "" {
			continue // what its image is pulled with is minted for a job
		}
		spec, life := specOf(plan), plan.Timeout+outlives(plan)
		key := classKey(plan.Runtime, spec)
		if i := slices.IndexFunc(cs, func(c class) bool { return c.key == key }); i >= 0 {
			cs[i].life = max(cs[i].life, life)
		} else {
			cs = append(cs, class{key, plan.Runtime, spec, life})
		}
	}
	return cs
}

// Classes counts the classes of warm boxes that a policy has.
func Classes(p *policy.Policy) int {
	return len(classesOf(p, func(policy.Plan) time.Duration { return 0 }))
}

// take returns a box for a job that would otherwise make one of the spec and needs
// it until then, or nil. No other job gets it. Give it to the job or reject it.
func (p *pool) take(ctx context.Context, runtime string, s sandbox.Spec, until time.Time) *warmBox {
	p.stir()
	for key := classKey(runtime, s); ctx.Err() == nil; {
		b := p.pick(key, until, len(s.Mounts) > 0)
		if b == nil {
			break
		}
		err := b.answers(ctx)
		if err == nil {
			err = b.mount(ctx, s.Mounts)
		}
		if err == nil {
			return b
		}
		p.reject(b, err.Error())
	}
	return nil
}

func (p *pool) pick(key string, until time.Time, mounts bool) *warmBox {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range p.boxes {
		if b.state == warmReady && !p.shut && b.key == key && !b.expires.Before(until) && (!mounts || b.mountable()) {
			b.state = warmTaken
			return b
		}
	}
	return nil
}

// answers asks the guest for a file that no idle box has.
func (b *warmBox) answers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, poolAnswer)
	defer cancel()
	_, err := b.box.Get(ctx, sandbox.Run+"/warm", 1)
	if err == nil {
		return errors.New("it has a file that no idle box has")
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("it does not answer: %w", err)
	}
	return nil
}

// mountable reports whether directories of the host may be put into the box.
func (b *warmBox) mountable() bool {
	m, ok := b.box.(sandbox.Mounter)
	return ok && m.Mount(context.Background(), nil) == nil
}

// mount shows the box what its job may see of the host: the job has taken it, and
// nobody else gets it any more.
func (b *warmBox) mount(ctx context.Context, mounts []sandbox.Mount) error {
	if len(mounts) == 0 {
		return nil
	}
	m, ok := b.box.(sandbox.Mounter)
	if !ok {
		return fmt.Errorf("mounts: %w", sandbox.ErrUnsupported)
	}
	b.mounts = mounts
	return m.Mount(ctx, mounts)
}

// reject has a box destroyed.
func (p *pool) reject(b *warmBox, why string) {
	p.mu.Lock()
	b.state, b.why = warmUnfit, why
	p.mu.Unlock()
	p.nudge(b.runtime)
}

// give makes a box that was taken that of a job, whose log owes it by now. If the
// pool's log stays, the next life destroys once more what is gone by then.
func (p *pool) give(b *warmBox, job string) {
	p.agent.enlistFor(job, b.log.Job)
	if err := errors.Join(b.log.Release(b.name), b.log.Close()); err != nil {
		p.agent.cfg.Log.Error().Err(err).Str("box", b.name).Msg("warm box: journal")
	}
	p.forget(b)
}

func (p *pool) forget(b *warmBox) {
	p.mu.Lock()
	p.boxes = slices.DeleteFunc(p.boxes, func(other *warmBox) bool { return other == b })
	p.mu.Unlock()
	p.nudge(b.runtime)
}

func (p *pool) nudge(runtime string) {
	select {
	case p.wake[runtime] <- struct{}{}:
	default: // it is awake
	}
}

// stir says that a job begins or ends now, and should not have to share the
// machine with the making of boxes for others.
func (p *pool) stir() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stirred = time.Now()
}

// making says that a box is made for a job, until the function that it returns is
// called.
func (p *pool) making() func() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.creating++
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.creating--
		p.stirred = time.Now()
	}
}

// ready counts the boxes that a job may take.
func (p *pool) ready() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, b := range p.boxes {
		if b.state == warmReady {
			n++
		}
	}
	return n
}

// fits reports whether the box is what the runtime would make of the spec. When
// it was taken, it was not known yet what the image of the plan is.
func (b *warmBox) fits(runtime string, s sandbox.Spec) bool {
	return b != nil && b.made == classKey(runtime, s) && slices.Equal(b.mounts, s.Mounts)
}

// take gives the job a warm box that will do, if there is one.
func (l *life) take(ctx context.Context, plan policy.Plan, deadline time.Time) {
	s := specOf(plan)
	s.Mounts = l.mounts // with some, only a box that they can be put into will do
	if l.warm = l.pool.take(ctx, plan.Runtime, s, l.expires(plan, deadline)); l.warm != nil {
		l.clock.mark("take")
	}
}

// intend writes down all that the plan will acquire. With that a warm box is
// the job's, and is destroyed with it, whether or not the job comes to use it.
func (l *life) intend(debts []journal.Debt) error {
	err := l.log.Intend(debts...)
	if l.warm == nil {
		return err
	}
	if err == nil {
		err = l.log.Try(l.warm.name)
	}
	if err != nil {
		l.pool.reject(l.warm, "the job that took it could not write that down")
		l.warm = nil
		return err
	}
	l.pool.give(l.warm, l.log.Job)
	failpoint.Here("pool.given")
	return nil
}

// makeBox is the warm box of the job, or one that is made for it.
func (l *life) makeBox(ctx context.Context, runtime string, spec sandbox.Spec) (sandbox.Sandbox, error) {
	if l.cold {
		defer l.pool.making()()
		return l.cfg.Runtimes[runtime].Create(ctx, l.box(), spec)
	}
	err := l.audit(ctx, l.log.Job, "box.adopt", l.box(), nil, "expires", stamp(l.warm.expires))
	if err == nil {
		err = l.log.Release(boxName(l.log.Job)) // which will never be
	}
	return l.warm.box, err
}

// stage is what the stopwatch calls the acquisition of name.
func (l *life) stage(name string) string {
	if isWarm(name) {
		return "adopt"
	}
	return name[len(l.log.Job):]
}
