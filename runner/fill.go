package runner

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/runner/internal/failpoint"
	"github.com/mayfly-ci/mayfly/runner/internal/journal"
	"github.com/mayfly-ci/mayfly/sandbox"
)

// run keeps boxes ready until work ends. It returns when those that no job took
// are gone, or are left to the next life because kill has ended.
func (p *pool) run(work, kill context.Context, left *errorList) {
	if p.size == 0 {
		return
	}
	var wg sync.WaitGroup
	for name := range p.wake {
		wg.Go(func() { p.tend(work, kill, name, left) })
	}
	wg.Wait()
}

// tend keeps the boxes of one runtime, so that one that hangs keeps no other
// from having its own. It makes one at a time, when no job is in a hurry.
func (p *pool) tend(work, kill context.Context, runtime string, left *errorList) {
	var leaving sync.WaitGroup
	defer leaving.Wait()
	resting := map[string]setback{} // by class
	for {
		p.calm(work)
		p.inspect(work, runtime)
		for _, b := range p.unfit(work, runtime) {
			leaving.Go(func() {
				if err := p.drop(kill, b); err != nil {
					left.add(fmt.Errorf("warm box %s: %w", b.name, err))
				}
			})
		}
		if work.Err() != nil && !p.lent(runtime) {
			return
		}
		if c, ok := p.missing(runtime, resting); ok && work.Err() == nil {
			if err := p.make(work, c); err != nil {
				s := resting[c.key].again()
				resting[c.key] = s
				p.agent.cfg.Log.Warn().Err(err).Str("runtime", runtime).Dur("retry_in", s.wait).Msg("warm box")
			} else {
				delete(resting, c.key)
			}
			continue // another class may be missing one too
		}
		next := poolLook
		for _, s := range resting {
			if left := time.Until(s.until); left > 0 {
				next = min(next, left)
			}
		}
		p.rest(work, runtime, next)
	}
}

// A setback is that a class could not be made, which rests for longer each time.
type setback struct {
	until time.Time
	wait  time.Duration
}

func (s setback) again() setback {
	wait := retryFirst
	if s.wait > 0 {
		wait = backoff(s.wait)
	}
	return setback{time.Now().Add(wait), wait}
}

// calm waits until no job begins or ends, but not for long.
func (p *pool) calm(ctx context.Context) {
	for end := time.Now().Add(poolPatience); time.Now().Before(end); {
		p.mu.Lock()
		left := poolCalm - time.Since(p.stirred)
		if p.creating > 0 {
			left = poolCalm
		}
		p.mu.Unlock()
		if left <= 0 || !pause(ctx, left) {
			return
		}
	}
}

// inspect finds boxes that died.
func (p *pool) inspect(ctx context.Context, runtime string) {
	p.mu.Lock()
	boxes := slices.DeleteFunc(slices.Clone(p.boxes), func(b *warmBox) bool { return b.runtime != runtime || b.state != warmReady })
	p.mu.Unlock()
	for _, b := range boxes {
		if err := b.answers(ctx); err != nil && ctx.Err() == nil {
			p.mu.Lock()
			if b.state == warmReady {
				b.state, b.why = warmUnfit, err.Error()
			}
			p.mu.Unlock()
		}
	}
}

// unfit takes out of the pool what no job should get any more. When work has
// ended that is all.
func (p *pool) unfit(work context.Context, runtime string) []*warmBox {
	classes := classesOf(p.agent.rules.Load(), p.agent.outlives)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.shut = work.Err() != nil
	var out []*warmBox
	for _, b := range p.boxes {
		if b.runtime != runtime {
			continue
		}
		if b.state == warmReady {
			i := slices.IndexFunc(classes, func(c class) bool { return c.key == b.key })
			switch {
			case p.shut:
				b.state, b.why = warmUnfit, "the agent stops"
			case i < 0:
				b.state, b.why = warmUnfit, "no rule of the policy wants it any more"
			case b.expires.Before(time.Now().Add(classes[i].life)):
				b.state, b.why = warmUnfit, "it is too old"
			}
		}
		if b.state == warmUnfit {
			b.state = warmLeaving
			out = append(out, b)
		}
	}
	return out
}

// lent reports whether a job is about to get one of the runtime's boxes, or not
// to.
func (p *pool) lent(runtime string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.ContainsFunc(p.boxes, func(b *warmBox) bool {
		return b.runtime == runtime && (b.state == warmTaken || b.state == warmUnfit)
	})
}

// missing is a class that has too few boxes, those that are being destroyed
// included, and does not rest after a failure.
func (p *pool) missing(runtime string, resting map[string]setback) (class, bool) {
	classes := classesOf(p.agent.rules.Load(), p.agent.outlives)
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range classes {
		n := 0
		if c.runtime != runtime {
			continue
		}
		for _, b := range p.boxes {
			if b.key == c.key {
				n++
			}
		}
		if n < p.size && !time.Now().Before(resting[c.key].until) {
			return c, true
		}
	}
	return class{}, false
}

// rest waits for d, or until something changes.
func (p *pool) rest(work context.Context, runtime string, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	done := work.Done()
	if work.Err() != nil {
		done = nil
	}
	select {
	case <-timer.C:
	case <-p.wake[runtime]:
	case <-done:
	}
}

// make makes one box, and writes it down first. It is anonymous, and expires as
// late as that of a job that gets it just in time.
func (p *pool) make(work context.Context, c class) error {
	ctx, cancel := context.WithTimeout(work, poolMake)
	defer cancel()
	a, job := p.agent, newPoolName()
	spec, err := p.pull(ctx, c)
	if err != nil {
		return err
	}
	spec.Expires = time.Now().Add(p.age + c.life)
	spec.Labels = sandbox.Labels{Owner: a.state.Owner, Generation: a.state.Generation}
	b := &warmBox{class: c, name: boxName(job), made: classKey(c.runtime, spec), expires: spec.Expires}
	b.unlist = a.enlist(job) // before there is anything that the reaper could find
	if b.log, err = a.state.journal.Begin(job, journal.Debt{Kind: kindBox, Name: b.name, By: c.runtime}); err != nil {
		b.unlist()
		return err
	}
	p.mu.Lock()
	p.boxes = append(p.boxes, b)
	p.mu.Unlock()
	if err = b.log.Try(b.name); err == nil {
		b.box, err = a.cfg.Runtimes[c.runtime].Create(ctx, b.name, spec)
		failpoint.Here("pool.made")
		err = errors.Join(err, a.audit(ctx, "", "box.warm", b.name, err, "runtime", c.runtime, "image", spec.Image, "expires", stamp(b.expires)))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if b.state = warmReady; err != nil {
		b.state, b.why = warmUnfit, "it could not be made"
		return fmt.Errorf("%s: %w", b.name, err)
	}
	return nil
}

// pull is the spec of a class, with what its image is now. Nobody's job asks for
// it, so it is anonymous.
func (p *pool) pull(ctx context.Context, c class) (sandbox.Spec, error) {
	spec := c.spec
	puller, ok := p.agent.cfg.Runtimes[c.runtime].(sandbox.Puller)
	if !ok {
		return spec, nil
	}
	image, err := puller.Pull(ctx, sandbox.Pull{Image: spec.Image})
	spec.Image = image.Ref
	return spec, err
}

// drop destroys a box that no job had, however long it takes.
func (p *pool) drop(kill context.Context, b *warmBox) error {
	if err := p.agent.audit(kill, "", "box.drop", b.name, nil, "why", b.why); err != nil {
		p.agent.cfg.Log.Error().Err(err).Str("box", b.name).Msg("warm box") // it goes all the same
	}
	err := p.agent.settle(kill, b.log, nil)
	b.unlist()
	p.forget(b)
	return err
}
