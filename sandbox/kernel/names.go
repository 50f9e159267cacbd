package kernel

import (
	"context"
	"fmt"
	"regexp"
	"sync"
)

// Names keeps calls for the same box apart. The zero value is ready.
type Names struct {
	mu   sync.Mutex
	busy map[string]chan struct{} // closed when free
}

// Hold refuses a name that the contract does not allow, path tricks included,
// and keeps other calls off it until the returned function is called.
func (n *Names) Hold(ctx context.Context, name string) (release func(), err error) {
	if !regexp.MustCompile(`^[a-z0-9-]{1,40}$`).MatchString(name) {
		return nil, fmt.Errorf("box name %q is not 1 to 40 bytes of a-z, 0-9 and -", name)
	}
	for {
		n.mu.Lock()
		other, taken := n.busy[name]
		if !taken {
			mine := make(chan struct{})
			if n.busy == nil {
				n.busy = map[string]chan struct{}{}
			}
			n.busy[name] = mine
			n.mu.Unlock()
			return func() {
				n.mu.Lock()
				defer n.mu.Unlock()
				delete(n.busy, name)
				close(mine)
			}, nil
		}
		n.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, fmt.Errorf("box %s is in work: %w", name, context.Cause(ctx))
		}
	}
}
