package gitea

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
)

const (
	// heartbeat is how often the server hears of a task, and we of a
	// cancellation: a job should stop within two seconds.
	heartbeat = time.Second

	// beatTimeout bounds one heartbeat, so that one that hangs does not hide a
	// cancellation for long.
	beatTimeout = 10 * time.Second

	// Gitea's limits of an output, in bytes; it drops what is beyond them.
	maxOutputKey   = 255
	maxOutputValue = 1 << 20

	// outputsAtOnce is how many bytes of outputs go into one request.
	outputsAtOnce = 4 << 20

	// outputRounds bounds how often outputs are sent that the server does not
	// store: a job must end.
	outputRounds = 10

	// sealPatience bounds how long the report waits for a log that the server
	// does not take, though it answers otherwise.
	sealPatience = 15 * time.Second
)

// Watch beats until ctx ends. It returns ErrCancelled once: when the server
// wants the task to end, has ended it, or does not know it any more.
func (p *Provider) Watch(ctx context.Context, name string, ref []byte) error {
	c, err := p.find(name, ref)
	if err != nil {
		return err
	}
	next := jitter(heartbeat)
	if c.restored {
		next = 0 // who knows how long it has heard nothing
	}
	for failing := retryFirst; ; {
		t := time.NewTimer(next)
		select {
		case <-t.C:
		case <-c.undecided():
		case <-ctx.Done():
		}
		t.Stop()
		if ctx.Err() != nil {
			return nil
		}
		if c.news() {
			return providers.ErrCancelled
		}
		beat, cancel := context.WithTimeout(ctx, beatTimeout)
		err := p.report(beat, c, "", nil, nil)
		cancel()
		next = jitter(heartbeat)
		if e, ok := errors.AsType[*callError](err); ok && !e.final {
			next, failing = max(failing, e.after), min(2*failing, retryLast)
		} else {
			failing = retryFirst
		}
	}
}

// undecided is closed by the decision that Watch has not told yet.
func (c *claim) undecided() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.told {
		return nil
	}
	return c.decided
}

// report makes one UpdateTask: a heartbeat if r is "", and else the end. Nothing
// follows the end, and nothing is told of a task that the server does not know.
// It adds the outputs that the server has to sent.
func (p *Provider) report(ctx context.Context, c *claim, r result, outputs map[string]string, sent map[string]bool) error {
	c.reporting.Lock()
	defer c.reporting.Unlock()
	if c.reported || c.lost {
		c.log.states() // are no news any more
		return nil
	}
	in := updateTaskRequest{State: taskState{ID: c.task, Result: r, Steps: c.log.states()}, Outputs: outputs}
	if r != "" {
		in.State.StoppedAt = time.Now().UTC()
		in.State.Steps = c.finalSteps(in.State)
	}
	var out updateTaskResponse
	_, err := p.client.call(ctx, methodUpdateTask, c.id, in, &out)
	c.log.told(err)
	if gone(err) {
		c.lost = true
		c.log.drop()
		c.decide()
		return nil
	}
	if err != nil {
		return err
	}
	for _, k := range out.SentOutputs {
		if sent != nil {
			sent[k] = true
		}
	}
	c.reported = r != ""
	if out.State.Result != "" && r == "" {
		c.decide()
	}
	return nil
}

// gone says that nothing can be told any more: the task is another's, or was
// deleted with its repository, or its runner was.
func gone(err error) bool { return errors.Is(err, errUnregistered) || errors.Is(err, errNoTask) }

// finalSteps gives every step an end, those too that were not reached: a step
// without one looks as if it still ran.
func (c *claim) finalSteps(s taskState) []stepState {
	rest := resultSkipped
	switch {
	case s.Result == resultCancelled, c.restored && s.Result == resultFailure:
		rest = resultCancelled
	case c.restored:
		rest = s.Result
	}
	steps := s.Steps
	for i := range c.steps {
		at := slices.IndexFunc(steps, func(st stepState) bool { return st.ID == integer(i) })
		switch {
		case at < 0:
			steps = append(steps, stepState{ID: integer(i), Result: rest})
		case steps[at].Result == "": // it was stopped with the job
			steps[at].Result, steps[at].StoppedAt = resultOr(s.Result, resultSuccess, resultFailure), s.StoppedAt
		}
	}
	return steps
}

// resultOr is r, or other if r is not what it may be.
func resultOr(r, not, other result) result {
	if r == not {
		return other
	}
	return r
}

// Complete sends what is left of the log and seals it, then the outputs, and the
// end last. It is done if the server does not know the task, or ended it itself.
func (p *Provider) Complete(ctx context.Context, name string, ref []byte, r providers.Result) error {
	c, err := p.find(name, ref)
	if errors.Is(err, providers.ErrGone) {
		return nil
	}
	if err != nil {
		return err
	}
	outputs := c.fit(r.Outputs)
	patient, cancel := context.WithTimeout(ctx, sealPatience)
	err = p.seal(patient, c)
	cancel()
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("gitea: log of task %d: %w", c.task, err)
	}
	p.config.Trace("gitea.sealed")
	if err := p.sendOutputs(ctx, c, outputs); err != nil {
		return fmt.Errorf("gitea: outputs of task %d: %w", c.task, err)
	}
	if err := p.end(ctx, c, resultOf(r.Conclusion)); err != nil {
		return fmt.Errorf("gitea: task %d: %w", c.task, err)
	}
	p.config.Trace("gitea.reported")
	c.log.stop()
	p.mu.Lock()
	delete(p.claims, name)
	p.mu.Unlock()
	p.busy(quick) // another job may have waited for this one
	return nil
}

func resultOf(c providers.Conclusion) result {
	switch c {
	case providers.Success:
		return resultSuccess
	case providers.Cancelled:
		return resultCancelled
	case providers.Skipped:
		return resultSkipped
	default: // failure, timed-out, refused, lost: the log says which
		return resultFailure
	}
}

// end reports until it is through, or ctx ends.
func (p *Provider) end(ctx context.Context, c *claim, r result) error {
	return p.persist(ctx, func() error { return p.report(ctx, c, r, nil, nil) })
}

// persist calls f until the server answers, or ctx ends.
func (p *Provider) persist(ctx context.Context, f func() error) error {
	for wait := retryFirst; ; wait = min(2*wait, retryLast) {
		err := f()
		e, failed := errors.AsType[*callError](err)
		if !failed || e.final {
			return err
		}
		if !pause(ctx, max(jitter(wait), e.after)) {
			return err
		}
	}
}

// fit keeps the outputs that Gitea stores, and says in the log which it does
// not.
func (c *claim) fit(outputs map[string]string) map[string]string {
	keep := map[string]string{}
	for _, k := range slices.Sorted(maps.Keys(outputs)) {
		key, v := strings.ToValidUTF8(k, "\ufffd"), strings.ToValidUTF8(outputs[k], "\ufffd")
		switch {
		case len(key) > maxOutputKey:
			c.log.say(fmt.Sprintf("mayfly: output %.40q… is not kept: its name has %d bytes, Gitea stores %d", key, len(key), maxOutputKey))
		case len(v) > maxOutputValue:
			c.log.say(fmt.Sprintf("mayfly: output %q is not kept: it has %d bytes, Gitea stores %d", key, len(v), maxOutputValue))
		default:
			keep[key] = v
		}
	}
	return keep
}

// sendOutputs sends outputs until the server says that it has them, before the
// end of the task sets the jobs going that need them.
func (p *Provider) sendOutputs(ctx context.Context, c *claim, outputs map[string]string) error {
	sent := map[string]bool{}
	for range outputRounds + len(outputs) {
		batch, size := map[string]string{}, 0
		for _, k := range slices.Sorted(maps.Keys(outputs)) {
			if !sent[k] && (size == 0 || size+len(k)+len(outputs[k]) <= outputsAtOnce) {
				batch[k] = outputs[k]
				size += len(k) + len(outputs[k])
			}
		}
		if len(batch) == 0 {
			return nil
		}
		before := len(sent)
		if err := p.persist(ctx, func() error { return p.report(ctx, c, "", batch, sent) }); err != nil {
			return err
		}
		p.config.Trace("gitea.outputs")
		c.reporting.Lock()
		over := c.lost || c.reported
		c.reporting.Unlock()
		if over {
			return nil
		}
		if len(sent) == before && !pause(ctx, quick) {
			return ctx.Err()
		}
	}
	return nil
}
