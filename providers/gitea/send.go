package gitea

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
)

const (
	// gather is how long rows wait for more. Gitea's page asks every second.
	gather = 500 * time.Millisecond

	// A request has at most so many rows and, but for one row, bytes.
	batchRows  = 10000
	batchBytes = 1 << 20
)

// Log opens the log. After a restart it asks the server how many rows it has.
func (p *Provider) Log(ctx context.Context, name string, ref []byte) (providers.Log, error) {
	c, err := p.find(name, ref)
	if err == nil {
		err = p.open(ctx, c)
	}
	if err != nil {
		return nil, err
	}
	return c.log, nil
}

func (p *Provider) open(ctx context.Context, c *claim) error {
	if err := p.locate(ctx, c); err != nil {
		return err
	}
	l := c.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.start == nil {
		ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		l.cancel = cancel
		l.start = func() { go p.send(ctx, c) }
	}
	return nil
}

// locate finds out which index the next row has.
func (p *Provider) locate(ctx context.Context, c *claim) error {
	c.log.mu.Lock()
	known := c.log.known
	c.log.mu.Unlock()
	if known {
		return nil
	}
	var out updateLogResponse
	err := p.client.insist(ctx, methodUpdateLog, c.id, updateLogRequest{TaskID: c.task}, &out)
	if gone(err) {
		return fmt.Errorf("log of task %d: %w: %w", c.task, providers.ErrGone, err)
	}
	if err != nil {
		return fmt.Errorf("gitea: log of task %d: %w", c.task, err)
	}
	c.log.mu.Lock()
	defer c.log.mu.Unlock()
	if !c.log.known {
		c.log.known, c.log.first = true, max(out.AckIndex, 0)
	}
	return nil
}

// batch is the next request.
func (l *jobLog) batch(task integer) updateLogRequest {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, size := 0, 0
	for n < len(l.rows) && n < batchRows && (n == 0 || size+len(l.rows[n].Content) <= batchBytes) {
		size += len(l.rows[n].Content)
		n++
	}
	return updateLogRequest{TaskID: task, Index: l.first, Rows: l.rows[:n:n]}
}

// send tells the server rows, and then the states of steps, until there is
// nothing new.
func (p *Provider) send(ctx context.Context, c *claim) {
	l := c.log
	for wait := retryFirst; ; {
		if !p.waitForMore(ctx, l) {
			return
		}
		err := p.sendOnce(ctx, c)
		if err == nil {
			wait = retryFirst
			continue
		}
		e, _ := errors.AsType[*callError](err)
		if e != nil && e.final {
			l.drop()
			continue
		}
		after := jitter(wait)
		if e != nil {
			after = max(after, e.after)
		}
		wait = min(2*wait, retryLast)
		pause(ctx, after)
	}
}

// waitForMore gives rows time to gather. It returns false when there are none,
// and the sender ends.
func (p *Provider) waitForMore(ctx context.Context, l *jobLog) bool {
	l.mu.Lock()
	if l.dropped || len(l.rows) == 0 && !l.news || ctx.Err() != nil {
		l.sending, l.hurry = false, make(chan struct{})
		l.signal()
		l.mu.Unlock()
		return false
	}
	hurry, full := l.hurry, l.size >= batchBytes || len(l.rows) >= batchRows
	l.mu.Unlock()
	if full {
		return true
	}
	t := time.NewTimer(gather)
	defer t.Stop()
	select {
	case <-t.C:
	case <-hurry:
	case <-ctx.Done():
	}
	return true
}

func (p *Provider) sendOnce(ctx context.Context, c *claim) error {
	if in := c.log.batch(c.task); len(in.Rows) > 0 {
		var out updateLogResponse
		if _, err := p.client.call(ctx, methodUpdateLog, c.id, in, &out); err != nil {
			if gone(err) {
				c.decide()
			}
			return err
		}
		p.config.Trace("gitea.logged")
		if !c.log.acknowledge(in, out.AckIndex) {
			return &callError{method: "UpdateLog", err: errors.New("the server stored no row")}
		}
	}
	c.log.mu.Lock()
	tell := c.log.news && len(c.log.rows) == 0
	c.log.mu.Unlock()
	if !tell {
		return nil
	}
	return p.report(ctx, c, "", nil, nil)
}

// seal sends what is left and tells the server that the log is complete.
func (p *Provider) seal(ctx context.Context, c *claim) error {
	err := p.open(ctx, c)
	if errors.Is(err, providers.ErrGone) {
		return nil
	}
	if err = errors.Join(err, c.log.Close(ctx)); err != nil {
		return err
	}
	c.log.mu.Lock()
	in, dropped := updateLogRequest{TaskID: c.task, Index: c.log.first, NoMore: true}, c.log.dropped
	c.log.mu.Unlock()
	if dropped {
		return nil
	}
	var out updateLogResponse
	err = p.client.insist(ctx, methodUpdateLog, c.id, in, &out)
	if gone(err) || errors.Is(err, errSealed) {
		return nil
	}
	return err
}
