package gateway_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/sandbox/netns/netnstest"
)

// TestFlood: the ledger holds refused packets back, and what the kernel dropped
// meanwhile is counted.
func TestFlood(t *testing.T) {
	t.Parallel()
	b := newBox(t, gateway.Config{})
	const sent = 20_000
	b.flood(sent)
	// What is missing shows in the number of the next packet that is not.
	tries := 0
	lines := b.await("line of a later packet", func(all []egress.Line) bool {
		if conn, err := b.net.Dial("tcp", "203.0.113.10:443"); err == nil {
			conn.Close()
		}
		tries++
		return has(func(l egress.Line) bool { return l.Address == "203.0.113.10" })(all)
	})
	seen, missing, late := 0, 0, 0
	for _, l := range lines {
		var n int
		if _, err := fmt.Sscanf(l.Reason, "%d refused packets have no line", &n); err == nil {
			missing += n
		} else if l.Network == "udp" {
			seen++
		} else {
			late++
		}
	}
	t.Logf("%d of %d packets have lines, %d are counted as missing", seen, sent, missing)
	// The last tries may not be in lines yet.
	if total := seen + missing + late; missing == 0 || total < sent || total > sent+tries {
		t.Errorf("%d packets with lines and %d counted as missing, want %d together, and some missing", seen, missing, sent)
	}
}

// flood sends refused datagrams while the ledger blocks.
func (b *box) flood(n int) {
	b.tb.Helper()
	block := make(chan struct{})
	b.mu.Lock()
	b.block = block
	b.mu.Unlock()
	err := b.net.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for range n {
			if err := unix.Sendto(fd, []byte("x"), 0, &unix.SockaddrInet4{Port: 443, Addr: [4]byte{203, 0, 113, 9}}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		b.tb.Fatal(err)
	}
	b.mu.Lock()
	b.block = nil
	b.mu.Unlock()
	close(block)
}

// TestFloodAtTheEnd: if no packet follows the dropped ones, the end says so.
func TestFloodAtTheEnd(t *testing.T) {
	t.Parallel()
	b := newBox(t, gateway.Config{})
	b.flood(20_000)
	b.await("line of the first packet", has(func(l egress.Line) bool { return l.Address == "203.0.113.9" }))
	b.close()
	b.await("line of what is missing", refusedWith("last refused packets have no line"))
}

// TestLedgerThatBlocks: Close waits for it, and can be called again.
func TestLedgerThatBlocks(t *testing.T) {
	t.Parallel()
	port := server(t, echo)
	b := newBox(t, gateway.Config{}, tcpRule("echo.example", port))
	conn, err := b.connect("echo.example", port)
	if err == nil {
		err = roundTrip(conn)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	block := make(chan struct{})
	b.mu.Lock()
	b.block = block
	b.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := b.gw.Close(ctx, "job"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Close while the ledger blocks: got %v, want the deadline", err)
	}
	close(block)
	b.close()
	if got := b.await("last line", has(func(l egress.Line) bool { return l.Verdict == egress.Ended })); len(got) != 2 {
		t.Errorf("got %d lines, want 2", len(got))
	}
}

// TestLedgerThatFails: Close says that lines are missing, once.
func TestLedgerThatFails(t *testing.T) {
	t.Parallel()
	g, err := gateway.New(gateway.Config{})
	if err != nil {
		t.Fatal(err)
	}
	n := netnstest.New(t)
	full := errors.New("disk full")
	ctx := context.Background()
	if err := g.Open(ctx, "job", egress.Opening{Ledger: func(egress.Line) error { return full }}); err != nil {
		t.Fatal(err)
	}
	if err := g.Attach(ctx, "job", n.Sockets()); err != nil {
		t.Fatal(err)
	}
	if conn, err := n.Dial("tcp", "198.18.0.9:1"); err == nil {
		_, _ = conn.Read(make([]byte, 1)) // until it is reset, after the line
		conn.Close()
	}
	if err := g.Close(ctx, "job"); !errors.Is(err, full) {
		t.Errorf("Close after a line was lost: got %v, want the ledger's error", err)
	}
	if err := g.Close(ctx, "job"); err != nil {
		t.Errorf("Close again: got %v, want success", err)
	}
}
