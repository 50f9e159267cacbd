package wall

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"
)

// A key is what a line of the ledger says of an attempt.
type key struct {
	network, where string
	port           uint16
}

func (k key) String() string {
	if k.port == 0 {
		return k.network + " " + k.where
	}
	return fmt.Sprintf("%s %s port %d", k.network, k.where, k.port)
}

// lines are those that a look expects of the ledger.
type lines struct {
	mu      sync.Mutex
	pending []key
	done    chan struct{} // closed when none is pending
}

func (l *lines) expect(k key) {
	if l.done == nil {
		l.done = make(chan struct{})
	}
	l.pending = append(l.pending, k)
}

func (l *lines) take(k key) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, p := range l.pending {
		if p == k {
			if l.pending = append(l.pending[:i:i], l.pending[i+1:]...); len(l.pending) == 0 {
				close(l.done)
			}
			return true
		}
	}
	return false
}

// wait returns what has no line after a time.
func (l *lines) wait(ctx context.Context, most time.Duration) string {
	timer := time.NewTimer(most)
	defer timer.Stop()
	select {
	case <-l.done:
		return ""
	case <-ctx.Done():
	case <-timer.C:
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var left []string
	for _, k := range l.pending {
		left = append(left, k.String())
	}
	return strings.Join(left, ", ")
}
