package wall

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"
)

const (
	// hearing is how long the canary waits for what a connection has to say, and
	// how long a look waits for the canary if something took its token.
	hearing = time.Second
	// ears bounds how many connections are heard at once. More are closed.
	ears = 16
	// kept bounds how many tokens are remembered.
	kept = 64
)

// A Canary listens on the loopback of the host, where no box reaches it. Nobody
// is told its address but boxes that are looked at.
type Canary struct {
	listener net.Listener
	done     sync.WaitGroup
	ears     chan struct{}

	mu    sync.Mutex
	heard []string
	more  chan struct{} // closed and replaced when something is heard
}

// Listen starts a canary. Close it.
func Listen(ctx context.Context) (*Canary, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("canary: %w", err)
	}
	c := &Canary{listener: l, ears: make(chan struct{}, ears), more: make(chan struct{})}
	c.done.Go(c.accept)
	return c, nil
}

// Address is where it listens; of a nil Canary, nowhere.
func (c *Canary) Address() netip.AddrPort {
	if c == nil {
		return netip.AddrPort{}
	}
	return c.listener.Addr().(*net.TCPAddr).AddrPort()
}

// Close stops listening, and returns when nothing of it runs.
func (c *Canary) Close() error {
	err := c.listener.Close()
	c.done.Wait()
	return err
}

func (c *Canary) accept() {
	for {
		conn, err := c.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			<-time.After(hearing) // no descriptors left: what connects, waits
			continue
		}
		select {
		case c.ears <- struct{}{}:
			c.done.Go(func() { c.hear(conn); <-c.ears })
		default:
			_ = conn.Close() // somebody on the host plays with it
		}
	}
}

func (c *Canary) hear(conn net.Conn) {
	_ = conn.SetDeadline(time.Now().Add(hearing)) // fails on a closed one only
	b, _ := io.ReadAll(io.LimitReader(conn, 64))  // what was read before an error counts
	_ = conn.Close()
	if !strings.HasPrefix(string(b), "mayfly-") {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.heard = append(c.heard[max(0, len(c.heard)-kept+1):], string(b))
	close(c.more)
	c.more = make(chan struct{})
}

// Heard says whether a token arrived. If something took it, it is waited for.
func (c *Canary) Heard(token string, taken bool) bool {
	if c == nil {
		return false
	}
	timer := time.NewTimer(2 * hearing)
	defer timer.Stop()
	for {
		c.mu.Lock()
		more := c.more
		for _, h := range c.heard {
			if h == token {
				c.mu.Unlock()
				return true
			}
		}
		c.mu.Unlock()
		if !taken {
			return false
		}
		select {
		case <-more:
		case <-timer.C:
			return false
		}
	}
}
