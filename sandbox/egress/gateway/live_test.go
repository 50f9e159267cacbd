package gateway_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/sandbox/netns/netnstest"
)

// patience bounds each wait in these tests.
const patience = 2 * time.Minute

// A box is a job's network with its gateway; what is outside is on loopback.
type box struct {
	tb    testing.TB
	net   *netnstest.Net
	gw    *gateway.Gateway
	mu    sync.Mutex
	lines []egress.Line
	block chan struct{} // if not nil, the ledger waits for it
}

// newBox makes one that may reach loopback under the rules' names.
func newBox(tb testing.TB, c gateway.Config, rules ...egress.Rule) *box {
	tb.Helper()
	g, err := gateway.New(c)
	if err != nil {
		tb.Fatal(err)
	}
	b := &box{tb: tb, net: netnstest.New(tb), gw: g}
	for i := range rules {
		rules[i].ID = fmt.Sprintf("policy:%d", i)
		rules[i].Resolve = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	}
	ctx := context.Background()
	if err := g.Open(ctx, "job", egress.Opening{Rules: egress.Rules{Allow: rules}, Ledger: b.ledger}); err != nil {
		tb.Fatal(err)
	}
	if err := g.Attach(ctx, "job", b.net.Sockets()); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(b.close)
	return b
}

func (b *box) close() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := b.gw.Close(ctx, "job"); err != nil {
		b.tb.Errorf("Close: %v", err)
	}
}

func (b *box) ledger(l egress.Line) error {
	b.mu.Lock()
	block := b.block
	b.mu.Unlock()
	if block != nil {
		<-block
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lines = append(b.lines, l)
	return nil
}

// await polls until ok says so of the lines.
func (b *box) await(what string, ok func([]egress.Line) bool) []egress.Line {
	b.tb.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(patience); ; <-tick.C {
		b.mu.Lock()
		lines := slices.Clone(b.lines)
		b.mu.Unlock()
		if ok(lines) {
			return lines
		}
		if time.Now().After(end) {
			b.tb.Fatalf("no ledger %s; got %d lines, the last %+v", what, len(lines), lines[max(0, len(lines)-3):])
		}
	}
}

// has reports a line that matches.
func has(match func(egress.Line) bool) func([]egress.Line) bool {
	return func(all []egress.Line) bool { return slices.ContainsFunc(all, match) }
}

func refusedWith(reason string) func([]egress.Line) bool {
	return has(func(l egress.Line) bool {
		return l.Verdict == egress.Refused && strings.Contains(l.Reason, reason)
	})
}

// connect resolves a name in the box and connects.
func (b *box) connect(name string, port uint16) (net.Conn, error) {
	addr, err := b.lookup(name)
	if err != nil {
		return nil, err
	}
	conn, err := b.net.Dial("tcp", netip.AddrPortFrom(addr, port).String())
	if err != nil {
		return nil, err
	}
	return conn, conn.SetDeadline(time.Now().Add(patience))
}

func (b *box) lookup(name string) (netip.Addr, error) {
	conn, err := b.net.Dial("udp", netip.AddrPortFrom(egress.Resolver, 53).String())
	if err != nil {
		return netip.Addr{}, err
	}
	defer conn.Close()
	q := dnsmessage.Message{Questions: []dnsmessage.Question{{
		Name: dnsmessage.MustNewName(name + "."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET,
	}}}
	packet, err := q.Pack()
	if err != nil {
		return netip.Addr{}, err
	}
	buf := make([]byte, 512)
	if _, err := conn.Write(packet); err != nil {
		return netip.Addr{}, err
	}
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return netip.Addr{}, err
	}
	n, err := conn.Read(buf)
	if err != nil {
		return netip.Addr{}, err
	}
	var m dnsmessage.Message
	if err := m.Unpack(buf[:n]); err != nil || len(m.Answers) != 1 {
		return netip.Addr{}, fmt.Errorf("answer %+v: %w", m, errors.Join(err, os.ErrNotExist))
	}
	return netip.AddrFrom4(m.Answers[0].Body.(*dnsmessage.AResource).A), nil
}

// server listens on loopback and gives the port that names have there.
func server(tb testing.TB, handle func(net.Conn)) uint16 {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				handle(conn)
			})
		}
	})
	tb.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

func echo(conn net.Conn) { _, _ = io.Copy(conn, conn) }

func tcpRule(name string, port uint16) egress.Rule {
	return egress.Rule{Name: name, Port: port, Protocol: egress.TCP}
}

// roundTrip sends a word and expects it back.
func roundTrip(conn net.Conn) error {
	if _, err := conn.Write([]byte("ping")); err != nil {
		return err
	}
	got := make([]byte, 4)
	if _, err := io.ReadFull(conn, got); err != nil {
		return err
	}
	if string(got) != "ping" {
		return fmt.Errorf("echo: got %q", got)
	}
	return nil
}

// TestNotThroughTheGate: a connection to the listener itself is refused.
func TestNotThroughTheGate(t *testing.T) {
	t.Parallel()
	b := newBox(t, gateway.Config{})
	conn, err := b.net.Dial("tcp", egress.Self.String()+":65353")
	if err == nil {
		_, err = conn.Read(make([]byte, 1))
		conn.Close()
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("connect to the gateway's own socket: got %v, want a reset", err)
	}
	b.await("line of a connection past the gate", refusedWith("not made to a virtual address"))
}

// TestLoad: connections one after the other and all at once.
func TestLoad(t *testing.T) {
	port := server(t, echo)
	b := newBox(t, gateway.Config{}, tcpRule("echo.example", port))
	addr, err := b.lookup("echo.example")
	if err != nil {
		t.Fatal(err)
	}
	to := netip.AddrPortFrom(addr, port).String()
	one := func() error {
		conn, err := b.net.Dial("tcp", to)
		if err != nil {
			return err
		}
		defer conn.Close()
		return roundTrip(conn)
	}
	const sequential, concurrent = 2000, 200
	start := time.Now()
	for i := range sequential {
		if err := one(); err != nil {
			t.Fatalf("connection %d: %v", i, err)
		}
	}
	t.Logf("%d connections one after the other: %v each", sequential, time.Since(start)/sequential)

	start = time.Now()
	conns := make([]net.Conn, concurrent)
	for i := range conns {
		if conns[i], err = b.net.Dial("tcp", to); err != nil {
			t.Fatalf("connection %d at once: %v", i, err)
		}
		defer conns[i].Close()
	}
	var wg sync.WaitGroup
	for i, conn := range conns {
		wg.Go(func() {
			if err := roundTrip(conn); err != nil {
				t.Errorf("connection %d at once: %v", i, err)
			}
		})
	}
	wg.Wait()
	t.Logf("%d connections at once: %v", concurrent, time.Since(start))
	for _, conn := range conns {
		conn.Close()
	}
	b.await("two lines each", func(all []egress.Line) bool { return len(all) == 2*(sequential+concurrent) })
}

// TestLargeStream: a gigabyte passes without being kept.
func TestLargeStream(t *testing.T) {
	const size = 1 << 30
	port := server(t, func(conn net.Conn) { _, _ = io.CopyN(conn, zeros{}, size) })
	b := newBox(t, gateway.Config{}, tcpRule("big.example", port))
	conn, err := b.connect("big.example", port)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	start := time.Now()
	n, err := io.Copy(io.Discard, conn)
	if err != nil || n != size {
		t.Fatalf("got %d bytes and %v, want %d", n, err, size)
	}
	took := time.Since(start)
	runtime.ReadMemStats(&after)
	grown := int64(after.TotalAlloc - before.TotalAlloc)
	t.Logf("1 GiB in %v, %.0f MB/s; %d KiB allocated on the way", took, size/1e6/took.Seconds(), grown>>10)
	if grown > 8<<20 {
		t.Errorf("%d bytes were allocated while 1 GiB passed, want less than 8 MiB", grown)
	}
	conn.Close()
	b.await("line with the bytes", has(func(l egress.Line) bool { return l.Verdict == egress.Ended && l.Received == size }))
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

// TestConnectionCap: one more connection than the cap is refused, and there is
// room again when one has ended.
func TestConnectionCap(t *testing.T) {
	t.Parallel()
	port := server(t, echo)
	b := newBox(t, gateway.Config{Conns: 2}, tcpRule("echo.example", port))
	var conns []net.Conn
	for range 2 {
		conn, err := b.connect("echo.example", port)
		if err == nil {
			err = roundTrip(conn)
		}
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	conn, err := b.connect("echo.example", port)
	if err == nil {
		err = roundTrip(conn)
	}
	if err == nil {
		t.Error("a third connection was served, want a refusal")
	}
	lines := b.await("line of the third", refusedWith("2 connections open"))
	if l := lines[len(lines)-1]; l.Name != "echo.example" || l.Rule == "" {
		t.Errorf("line of the third connection: got %+v, want its name and rule", l)
	}
	conns[0].Close()
	b.await("line of the first's end", has(func(l egress.Line) bool { return l.Verdict == egress.Ended }))
	served := func([]egress.Line) bool {
		conn, err := b.connect("echo.example", port)
		if err != nil {
			return false
		}
		defer conn.Close()
		return roundTrip(conn) == nil
	}
	b.await("room after the end of one", served)
	conns[1].Close()
}

// TestSlowClients: who sends nothing is ended, with the reason.
func TestSlowClients(t *testing.T) {
	t.Parallel()
	const idle = 2 * time.Second // longer than a busy machine stops for
	port := server(t, echo)
	b := newBox(t, gateway.Config{Hello: time.Second, Idle: idle},
		tcpRule("echo.example", port),
		egress.Rule{Name: "tls.example", Port: port, Protocol: egress.TLS},
		egress.Rule{Name: "http.example", Port: port, Protocol: egress.HTTP})
	for name, reason := range map[string]string{
		"tls.example": "no ClientHello came in time", "http.example": "not a whole HTTP request",
	} {
		conn, err := b.connect(name, port)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write([]byte{22}[:1]); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadAll(conn); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%s: the connection of a client that sends one byte was kept", name)
		}
		conn.Close()
		b.await(name, refusedWith(reason))
	}

	quiet, err := b.connect("echo.example", port)
	if err != nil {
		t.Fatal(err)
	}
	defer quiet.Close()
	start := time.Now()
	if err := roundTrip(quiet); err != nil {
		t.Fatal(err)
	}
	for time.Since(start) < idle*5/4 { // never idle for long, one way at a time
		if err := roundTrip(quiet); err != nil {
			t.Fatalf("a connection on which bytes move was ended: %v", err)
		}
	}
	if _, err := quiet.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("idle connection: got %v, want a reset", err)
	}
	b.await("idle line", has(func(l egress.Line) bool {
		return l.Verdict == egress.Ended && strings.Contains(l.Reason, "no byte moved")
	}))
}

// TestSlowHead: the header of a request has its time on a connection that had one
// before, too, and not that of a connection that is idle.
func TestSlowHead(t *testing.T) {
	t.Parallel()
	port := server(t, func(conn net.Conn) {
		if r, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
			ok(conn, r)
		}
		_, _ = io.Copy(io.Discard, conn)
	})
	b := newBox(t, gateway.Config{Hello: time.Second}, egress.Rule{Name: "http.example", Port: port, Protocol: egress.HTTP})
	conn, err := b.connect("http.example", port)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: http.example\r\n\r\nGET /"); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); !strings.HasPrefix(string(got), "HTTP/1.1 200") || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("got %q and %v, want an answer and an end", got, err)
	}
	conn.Close()
}

// TestOneWay: a long answer is not cut because the job says nothing meanwhile.
func TestOneWay(t *testing.T) {
	t.Parallel()
	const ticks, idle = 12, 2 * time.Second
	port := server(t, func(conn net.Conn) {
		tick := time.NewTicker(idle / 8)
		defer tick.Stop()
		for range ticks {
			<-tick.C
			if _, err := conn.Write([]byte(".")); err != nil {
				return
			}
		}
	})
	b := newBox(t, gateway.Config{Idle: idle}, tcpRule("slow.example", port))
	conn, err := b.connect("slow.example", port)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got, err := io.ReadAll(conn); err != nil || len(got) != ticks {
		t.Errorf("an answer of %d bytes over more than the idle time: got %q %v", ticks, got, err)
	}
}
