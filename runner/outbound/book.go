package outbound

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"strconv"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/runner/audit"
)

// Actions of the audit.
const (
	actionConnect = "agent.connect"
	actionEnd     = "agent.connect.end"
	actionRequest = "agent.request"
)

// maxKinds bounds the kinds of calls that are counted at a time. What is beyond
// is written at once, each.
const maxKinds = 1024

// A line is what two calls have in common that are counted together.
type line struct {
	action, job, component string
	address                string // host:port, or the path of a socket
	via, dialled           string // proxy, or the address
	method, path           string
	status                 int
	result                 string // "" is ok
}

// moved is how one call differs from others like it.
type moved struct {
	sent, received int64
	took           time.Duration
}

// A sum is calls that were counted and not told yet.
type sum struct {
	count       int
	first, last time.Time
	moved
}

// A book writes lines into the audit.
type book struct {
	sink audit.Sink
	fold time.Duration

	mu     sync.Mutex
	kinds  map[line]*sum
	failed error // of the last sum that could not be told
	wake   *time.Timer
	closed bool
	wg     sync.WaitGroup // of the timer's function
}

func newBook(sink audit.Sink, fold time.Duration) *book {
	return &book{sink: sink, fold: fold, kinds: map[line]*sum{}}
}

// write appends a line, or counts it if there was one like it.
func (b *book) write(ctx context.Context, l line, m moved, folds bool) error {
	if b.sink == nil {
		return errors.New("outbound: there is no audit to write this down in")
	}
	if folds {
		counted, err := b.count(l, m)
		if counted || err != nil {
			return err
		}
	}
	now := time.Now()
	// A call that was cancelled was made all the same.
	err := b.sink.Append(context.WithoutCancel(ctx), event(l, sum{count: 1, first: now, last: now, moved: m}))
	if err != nil && folds {
		b.mu.Lock()
		delete(b.kinds, l)
		b.mu.Unlock()
	}
	return err
}

// count adds a call to those like it. If there are none yet it begins to count
// those that follow.
func (b *book) count(l line, m moved) (counted bool, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failed != nil {
		return false, b.failed
	}
	s := b.kinds[l]
	if s == nil {
		if !b.closed && len(b.kinds) < maxKinds {
			b.kinds[l] = &sum{}
			b.rouse()
		}
		return false, nil
	}
	now := time.Now()
	if s.count == 0 {
		s.first = now
	}
	s.count, s.last = s.count+1, now
	s.sent, s.received, s.took = s.sent+m.sent, s.received+m.received, s.took+m.took
	return true, nil
}

// rouse has the sums told when it is time. b.mu is held.
func (b *book) rouse() {
	if b.wake != nil || b.closed {
		return
	}
	b.wg.Add(1)
	b.wake = time.AfterFunc(b.fold, func() {
		defer b.wg.Done()
		b.mu.Lock()
		defer b.mu.Unlock()
		b.wake = nil
		b.tell()
		if len(b.kinds) > 0 {
			b.rouse()
		}
	})
}

// tell writes the sums, and forgets kinds that did not come again. A sum that
// cannot be written is kept, and until it is no call is made. b.mu is held.
func (b *book) tell() {
	b.failed = nil
	for l, s := range b.kinds {
		if s.count > 0 {
			if err := b.sink.Append(context.Background(), event(l, *s)); err != nil {
				b.failed = errors.Join(b.failed, err)
				continue
			}
		}
		if s.count == 0 {
			delete(b.kinds, l)
		} else {
			*s = sum{}
		}
	}
}

func (b *book) close() error {
	b.mu.Lock()
	b.closed = true
	if b.wake != nil && b.wake.Stop() {
		b.wg.Done()
	}
	b.mu.Unlock()
	b.wg.Wait()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.tell()
	clear(b.kinds)
	return b.failed
}

func event(l line, s sum) audit.Event {
	host, port, err := net.SplitHostPort(l.address)
	if err != nil {
		host = l.address
	}
	detail := map[string]string{
		"name": host, "port": port, "via": l.via, "dialled": l.dialled, "method": l.method, "path": l.path, "duration": s.took.String(),
		"status": number(int64(l.status)), "sent": number(s.sent), "received": number(s.received),
	}
	if s.count > 1 || !s.first.Equal(s.last) {
		detail["first"] = s.first.UTC().Format(time.RFC3339Nano)
	}
	if s.count > 1 {
		detail["count"] = strconv.Itoa(s.count)
	}
	maps.DeleteFunc(detail, func(_, v string) bool { return v == "" })
	e := audit.Event{Time: s.last, Job: l.job, Action: l.action, Object: l.component, Result: "ok", Detail: detail}
	if l.result != "" {
		e.Result = l.result
	}
	return e
}

func number(n int64) string {
	if n == 0 {
		return ""
	}
	return strconv.FormatInt(n, 10)
}

// reason is an error without what differs from one call to the next, and without
// words of the other side.
func reason(ctx context.Context, err error) string {
	if r := (*refusal)(nil); errors.As(err, &r) {
		return r.what
	}
	if away := (*proxyError)(nil); errors.As(err, &away) {
		return away.Error()
	}
	if d := (*net.DNSError)(nil); errors.As(err, &d) {
		return "lookup: " + d.Err
	}
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		return fmt.Sprintf("%s: %v", op.Op, op.Err)
	}
	if ctx.Err() != nil {
		return fmt.Sprint(context.Cause(ctx))
	}
	return err.Error()
}
