// Package egresstest holds gateways to their contract.
//
// [Run] checks an egress.Gateway against each clause of the contract, with
// clients inside the network of a box and a world outside that the suite makes:
// names, addresses and servers. Nothing leaves the machine: what a gateway
// dials goes through [Outside], which connects to servers on loopback.
package egresstest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// patience bounds each wait for something that should happen at once, on a
// machine that may be busy.
const patience = time.Minute

// A Net is the network of a box, seen from inside.
type Net interface {
	// Sockets are those for the gateway.
	Sockets() egress.Sockets
	// Dial connects to a literal address from inside.
	Dial(network, address string) (net.Conn, error)
	// Listen listens at a literal address inside.
	Listen(network, address string) (net.Listener, error)
}

// A Subject is what is tested.
type Subject struct {
	// Gateway makes a gateway that looks up and dials through o alone and
	// knows Own as an address where the agent listens.
	Gateway func(tb testing.TB, o *Outside) egress.Gateway
	// Net makes the network of a fresh box.
	Net func(tb testing.TB) Net
}

// Own is where the agent of the suite is said to listen.
func Own() netip.AddrPort { return netip.MustParseAddrPort("127.0.0.1:9000") }

// Run checks every clause, each with a gateway and boxes of its own.
func Run(t *testing.T, s Subject) {
	for _, c := range clauses() {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if err := c.check(newBench(t, s)); err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
		})
	}
}

// A clause is one sentence of the contract. check returns how it is broken.
type clause struct {
	name  string
	check func(*bench) error
}

// Outside is the world beyond the gateway.
type Outside struct {
	mu      sync.Mutex
	names   map[string][]netip.Addr
	servers map[string]string // address that a gateway dials: where a server of the suite listens
	lookups []string
	dialled []string
}

// LookupNetIP answers for the names that the suite made.
func (o *Outside) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.lookups = append(o.lookups, host)
	name := host
	if n := len(host); n > 0 && host[n-1] == '.' {
		name = host[:n-1]
	}
	if addrs, ok := o.names[name]; ok {
		return slices.Clone(addrs), nil
	}
	return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
}

// Dial connects to the server that stands for address. Others refuse.
func (o *Outside) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	o.mu.Lock()
	o.dialled = append(o.dialled, address)
	real, ok := o.servers[address]
	o.mu.Unlock()
	if !ok {
		return nil, &net.OpError{Op: "dial", Net: network, Err: syscall.ECONNREFUSED}
	}
	return (&net.Dialer{}).DialContext(ctx, network, real)
}

// name says what a name resolves to.
func (o *Outside) name(name string, addrs ...string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.names[name] = nil
	for _, a := range addrs {
		o.names[name] = append(o.names[name], netip.MustParseAddr(a))
	}
}

// seen returns what was dialled and looked up.
func (o *Outside) seen() (dialled, lookups []string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.dialled), slices.Clone(o.lookups)
}

// A ledger records lines.
type ledger struct {
	mu    sync.Mutex
	lines []egress.Line
	more  chan struct{} // closed when a line comes
	wait  time.Duration // how long await waits
	fail  error         // what write returns
	gate  chan struct{} // if not nil, write waits for it
}

func (b *bench) newLedger() *ledger {
	return &ledger{more: make(chan struct{}), wait: b.patience}
}

func (l *ledger) write(line egress.Line) error {
	l.mu.Lock()
	gate := l.gate
	l.mu.Unlock()
	if gate != nil {
		<-gate
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, line)
	close(l.more)
	l.more = make(chan struct{})
	return l.fail
}

// await waits for a line that matches.
func (l *ledger) await(what string, match func(egress.Line) bool) (egress.Line, error) {
	timeout := time.NewTimer(l.wait)
	defer timeout.Stop()
	for {
		l.mu.Lock()
		i := slices.IndexFunc(l.lines, match)
		more, lines := l.more, slices.Clone(l.lines)
		l.mu.Unlock()
		if i >= 0 {
			return lines[i], nil
		}
		select {
		case <-more:
		case <-timeout.C:
			return egress.Line{}, fmt.Errorf("no ledger line %s; got %+v", what, lines)
		}
	}
}

// count returns how many lines match.
func (l *ledger) count(match func(egress.Line) bool) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, line := range l.lines {
		if match(line) {
			n++
		}
	}
	return n
}

// is matches lines by verdict.
func is(v egress.Verdict) func(egress.Line) bool {
	return func(l egress.Line) bool { return l.Verdict == v }
}

// on matches lines by network and verdict.
func on(network string, v egress.Verdict) func(egress.Line) bool {
	return func(l egress.Line) bool { return l.Verdict == v && l.Network == network }
}

// A bench is what a clause works with.
type bench struct {
	tb      testing.TB
	subject Subject
	outside *Outside
	gateway egress.Gateway
	// patience is shorter where the clause is expected to break.
	patience time.Duration
}

func newBench(tb testing.TB, s Subject) *bench {
	tb.Helper()
	o := &Outside{names: make(map[string][]netip.Addr), servers: make(map[string]string)}
	return &bench{tb: tb, subject: s, outside: o, gateway: s.Gateway(tb, o), patience: patience}
}

// A job is an open and attached gateway and the inside of its box.
type job struct {
	*bench
	name   string
	net    Net
	ledger *ledger
}

// start opens a gateway for a fresh box. It is closed after the test.
func (b *bench) start(name string, rules ...egress.Rule) (*job, error) {
	j := &job{bench: b, name: name, net: b.subject.Net(b.tb), ledger: b.newLedger()}
	if err := j.open(name, "", rules...); err != nil {
		return nil, err
	}
	return j, j.attach()
}

// open opens name with the job's ledger.
func (j *job) open(name, parent string, rules ...egress.Rule) error {
	err := j.gateway.Open(context.Background(), name, egress.Opening{
		Rules: egress.Rules{Allow: rules}, Ledger: j.ledger.write, Parent: parent,
	})
	if err != nil {
		return fmt.Errorf("Open(%s): %w", name, err)
	}
	j.tb.Cleanup(func() { j.close(name) }) // the clause that tests Close looks at its error
	return nil
}

func (j *job) attach() error {
	if err := j.gateway.Attach(context.Background(), j.name, j.net.Sockets()); err != nil {
		return fmt.Errorf("Attach(%s): %w", j.name, err)
	}
	return nil
}

// close closes name within the suite's patience.
func (j *job) close(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), j.patience)
	defer cancel()
	if err := j.gateway.Close(ctx, name); err != nil {
		return fmt.Errorf("Close(%s): %w", name, err)
	}
	return nil
}

// connect resolves a name in the box and connects to it there.
func (j *job) connect(name string, port uint16) (net.Conn, error) {
	a, err := j.ask(name, typeA)
	if err != nil {
		return nil, err
	}
	if len(a.addrs) != 1 {
		return nil, fmt.Errorf("DNS question for %s: got %v, want one address", name, a)
	}
	return j.dial(netip.AddrPortFrom(a.addrs[0], port))
}

// dial connects from inside the box.
func (j *job) dial(to netip.AddrPort) (net.Conn, error) {
	conn, err := j.net.Dial("tcp", to.String())
	if err != nil {
		return nil, err
	}
	j.tb.Cleanup(func() { conn.Close() })
	return conn, conn.SetDeadline(time.Now().Add(j.patience))
}

// echo sends a word and expects it back.
func echo(conn net.Conn) error {
	const word = "ping"
	if _, err := conn.Write([]byte(word)); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	got := make([]byte, len(word))
	if _, err := readFull(conn, got); err != nil {
		return fmt.Errorf("read of the echo: %w", err)
	}
	if string(got) != word {
		return fmt.Errorf("echo: got %q, want %q", got, word)
	}
	return nil
}

// isReset expects that a connection has been or is being reset. It may happen
// before connect has returned.
func isReset(conn net.Conn, err error) error {
	if errors.Is(err, syscall.ECONNRESET) {
		return nil
	}
	if err != nil {
		return err
	}
	n, err := conn.Read(make([]byte, 1))
	if errors.Is(err, syscall.ECONNRESET) {
		return nil
	}
	return fmt.Errorf("read: got %d bytes and %v, want a reset", n, err)
}
