package gateway_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/sandbox/netns/netnstest"
)

// long bounds what takes seconds on a quiet machine.
const long = 3 * time.Minute

// beside makes another box of the same gateway, under the same kind of rules.
func (b *box) beside(name string, rules ...egress.Rule) *box {
	b.tb.Helper()
	other := &box{tb: b.tb, net: netnstest.New(b.tb), gw: b.gw}
	for i := range rules {
		rules[i].ID = name
		rules[i].Resolve = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
	}
	ctx := context.Background()
	if err := b.gw.Open(ctx, name, egress.Opening{Rules: egress.Rules{Allow: rules}, Ledger: other.ledger}); err != nil {
		b.tb.Fatal(err)
	}
	if err := b.gw.Attach(ctx, name, other.net.Sockets()); err != nil {
		b.tb.Fatal(err)
	}
	b.tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), long)
		defer cancel()
		if err := b.gw.Close(ctx, name); err != nil {
			b.tb.Errorf("Close: %v", err)
		}
	})
	return other
}

// descriptors are how many files the process has open.
func descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// TestTenThousandConnections: one job asks for far more connections than it may
// have. It gets those and no others, each refusal is written down, no descriptor
// stays with it, and another job notices nothing.
func TestTenThousandConnections(t *testing.T) {
	const all, limit = 10_000, 64
	port := server(t, echo)
	b := newBox(t, gateway.Config{Conns: limit}, tcpRule("echo.example", port))
	other := b.beside("other", tcpRule("echo.example", port))
	var held []net.Conn
	for i := range limit {
		conn, err := b.connect("echo.example", port)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := errors.Join(conn.SetDeadline(time.Now().Add(long)), roundTrip(conn)); err != nil {
			t.Fatalf("connection %d of %d: %v", i, limit, err)
		}
		held = append(held, conn)
	}
	to := held[0].RemoteAddr().String()
	before := descriptors(t)
	const batch = (all - limit) / 9
	for i := range 9 {
		err := b.net.Do(func() error { // not once for each: it takes a thread
			for n := range batch {
				if err := refusedAt(to); err != nil {
					return fmt.Errorf("connection %d beyond the limit of %d: %w", i*batch+n, limit, err)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		conn, err := other.connect("echo.example", port)
		if err != nil {
			t.Fatalf("another job, meanwhile: %v", err)
		}
		if err := errors.Join(roundTrip(conn), conn.Close()); err != nil {
			t.Fatalf("another job, meanwhile: %v", err)
		}
	}
	if after := descriptors(t); after > before+limit {
		t.Errorf("%d descriptors before the refused connections and %d after them, want as many", before, after)
	}
	b.await("line for each refused connection", func(lines []egress.Line) bool {
		n := 0
		for _, l := range lines {
			if l.Verdict == egress.Refused && strings.Contains(l.Reason, "connections open") {
				n++
			}
		}
		return n == 9*batch
	})
	for i, conn := range held {
		if err := roundTrip(conn); err != nil {
			t.Errorf("held connection %d, afterwards: %v", i, err)
		}
	}
}

// refusedAt connects, and wants a reset.
func refusedAt(to string) error {
	conn, err := net.DialTimeout("tcp", to, long)
	if err == nil {
		err = errors.Join(conn.SetDeadline(time.Now().Add(long)), roundTrip(conn))
		conn.Close()
	}
	switch {
	case err == nil:
		return errors.New("got an answer, want a reset")
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return nil
	}
	return err
}

// TestSlowLoris: clients that send their header byte by byte are cut off when its
// time is over, and no other client waits for them.
func TestSlowLoris(t *testing.T) {
	const slow = 30
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "hello") }))
	defer web.Close()
	port := portOf(web)
	secure := server(t, echo)
	b := newBox(t, gateway.Config{Hello: 3 * time.Second}, egress.Rule{Name: "web.example", Port: port, Protocol: egress.HTTP},
		egress.Rule{Name: "tls.example", Port: secure, Protocol: egress.TLS})
	var wg sync.WaitGroup
	defer wg.Wait()
	drip := func(name string, port uint16, text func(int) byte) {
		conn, err := b.connect(name, port)
		if err != nil {
			t.Error(err)
			return
		}
		wg.Go(func() {
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(long)) // the write fails without
			tick := time.NewTicker(20 * time.Millisecond)
			defer tick.Stop()
			for i := 0; ; i++ {
				if _, err := conn.Write([]byte{text(i)}); errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("a slow client of %s is connected after %v, want it cut off", name, long)
					return
				} else if err != nil {
					return
				}
				<-tick.C
			}
		})
	}
	head := "GET / HTTP/1.1\r\nHost: web.example:" + strconv.Itoa(int(port)) + "\r\nX-Slow: "
	hello := []byte{22, 3, 1, 0x20, 0, 1, 0, 0x1f, 0xfc, 3, 3}
	for range slow {
		drip("web.example", port, func(i int) byte { return append([]byte(head), 'x')[min(i, len(head))] })
		drip("tls.example", secure, func(i int) byte { return append(hello, 0)[min(i, len(hello))] })
	}
	// Meanwhile.
	for i := range 20 {
		conn, err := b.connect("web.example", port)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(long)) // the read fails without
		if _, err := fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: web.example:%d\r\nConnection: close\r\n\r\n", port); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Errorf("request %d beside slow ones: got %+v %v, want an answer", i, resp, err)
		}
		conn.Close()
	}
	wg.Wait()
	b.await("line for each slow client", func(lines []egress.Line) bool {
		web, tls := 0, 0
		for _, l := range lines {
			web += one(l.Verdict == egress.Refused && l.Name == "web.example" && strings.Contains(l.Reason, "not a whole HTTP request"))
			tls += one(l.Verdict != egress.Allowed && l.Name == "tls.example")
		}
		return web == slow && tls == slow
	})
}

func one(is bool) int {
	if is {
		return 1
	}
	return 0
}

// TestManyJobsAtOnce: the connections of a hundred jobs go through one gateway,
// and each ledger has its own and nothing else.
func TestManyJobsAtOnce(t *testing.T) {
	const jobs, each = 100, 10
	port := server(t, echo)
	first := newBox(t, gateway.Config{}, tcpRule("echo.example", port))
	boxes := make([]*box, jobs)
	for i := range boxes {
		boxes[i] = first.beside(fmt.Sprint("job-", i), tcpRule(fmt.Sprintf("echo-%d.example", i), port))
	}
	var wg sync.WaitGroup
	for i, b := range boxes {
		wg.Go(func() {
			for range each {
				conn, err := b.connect(fmt.Sprintf("echo-%d.example", i), port)
				if err != nil {
					t.Errorf("job %d: %v", i, err)
					return
				}
				err = errors.Join(conn.SetDeadline(time.Now().Add(long)), roundTrip(conn), conn.Close())
				if err != nil {
					t.Errorf("job %d: %v", i, err)
				}
			}
		})
	}
	wg.Wait()
	for i, b := range boxes {
		lines := b.await("end of each connection", func(all []egress.Line) bool { return len(all) >= 2*each })
		for _, l := range lines {
			if l.Gateway != fmt.Sprint("job-", i) || l.Name != fmt.Sprintf("echo-%d.example", i) || l.Verdict != egress.Allowed && l.Verdict != egress.Ended {
				t.Fatalf("ledger of job %d: %+v", i, l)
			}
		}
		if len(lines) != 2*each {
			t.Errorf("ledger of job %d has %d lines, want %d", i, len(lines), 2*each)
		}
	}
}

// TestLargeUpload: what goes the other way does so without being kept.
func TestLargeUpload(t *testing.T) {
	const size = 256 << 20
	port := server(t, func(conn net.Conn) { _, _ = io.Copy(struct{ io.Writer }{io.Discard}, conn) })
	b := newBox(t, gateway.Config{}, tcpRule("big.example", port))
	conn, err := b.connect("big.example", port)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(long)); err != nil {
		t.Fatal(err)
	}
	before := allocated()
	if n, err := io.CopyN(struct{ io.Writer }{conn}, zeros{}, size); n != size {
		t.Fatalf("sent %d bytes of %d: %v", n, size, err)
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	b.await("line with the bytes", has(func(l egress.Line) bool { return l.Verdict == egress.Ended && l.Sent == size }))
	if grown := allocated() - before; grown > 8<<20 {
		t.Errorf("%d bytes were allocated while %d passed, want less than 8 MiB", grown, size)
	}
}

// TestLargeBodies: what passes through TLS that ends at the gateway is not kept
// either, in neither direction.
func TestLargeBodies(t *testing.T) {
	const size = 64 << 20
	kept := make(chan uint64, 2)
	s := newSecured(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if n, err := io.Copy(io.Discard, r.Body); err != nil || r.Method == http.MethodPost && n != size {
			http.Error(w, fmt.Sprint(n, err), http.StatusInternalServerError)
			return
		}
		if r.Method == http.MethodGet {
			_, _ = io.Copy(w, &weighed{left: size, weigh: size / 4, kept: kept}) // the client counts
		}
	}))
	c := s.client(false)
	before := held()
	for method, body := range map[string]io.Reader{http.MethodGet: nil, http.MethodPost: &weighed{left: size, weigh: size / 4, kept: kept}} {
		r, err := http.NewRequestWithContext(t.Context(), method, s.url("/"), body)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := c.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK || method == http.MethodGet && n != size {
			t.Fatalf("%s: got %s, %d bytes and %v", method, resp.Status, n, err)
		}
		if now := <-kept; now > before+size/4 {
			t.Errorf("%s: %d bytes are held when %d have passed, and %d were before, want no more of them", method, now, size/4*3, before)
		}
	}
}

// A weighed is a body that looks at the heap when weigh bytes are left of it.
type weighed struct {
	left, weigh int
	kept        chan<- uint64
}

func (r *weighed) Read(b []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	n := min(len(b), r.left)
	if r.left > r.weigh && r.left-n <= r.weigh {
		r.kept <- held()
	}
	r.left -= n
	return n, nil
}

// held is what is alive on the heap.
func held() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// allocated is what this process has taken from its heap so far.
func allocated() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.TotalAlloc
}
