package login_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/sandbox/netns/netnstest"
	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/postgrestest"
)

// placeholder is what these tests have of the administrator's password.
const placeholder = "placeholder-of-tests"

// A link is a box's network whose gateway logs in at a real server.
type link struct {
	tb     testing.TB
	net    *netnstest.Net
	gw     *gateway.Gateway
	server *postgrestest.Server
	mu     sync.Mutex
	lines  []egress.Line
	fail   error // of the ledger
}

func newLink(ctx context.Context, t *testing.T, c gateway.Config) *link {
	t.Helper()
	server, ca := database(ctx, t)
	g, err := gateway.New(c)
	agenttest.Must(t, err)
	l := &link{tb: t, net: netnstest.New(t), gw: g, server: server}
	agenttest.Must(t, g.Open(ctx, "job", egress.Opening{Ledger: l.ledger, Rules: egress.Rules{Allow: []egress.Rule{{
		ID: "policy:1", Name: "db.corp", Port: uint16(server.Port()), Protocol: egress.Postgres, CA: ca, Resolve: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")},
		Inject: &egress.Injection{
			Lease: "db", As: egress.Password, User: postgrestest.User, Name: "app", Value: creds.NewSecret(server.Password()), Placeholder: placeholder,
		},
	}}}}))
	agenttest.Must(t, g.Attach(ctx, "job", l.net.Sockets()))
	t.Cleanup(func() { agenttest.Must(t, l.close()) })
	return l
}

func (l *link) close() error {
	ctx, cancel := context.WithTimeout(context.Background(), bound)
	defer cancel()
	return l.gw.Close(ctx, "job")
}

func (l *link) ledger(line egress.Line) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, line)
	return l.fail
}

// await waits for a line that matches.
func (l *link) await(what string, match func(egress.Line) bool) {
	l.tb.Helper()
	agenttest.Eventually(l.tb, bound, what, func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return slices.ContainsFunc(l.lines, match)
	})
}

// dial connects from inside to what the box's resolver says.
func (l *link) dial() (net.Conn, error) {
	conn, err := l.net.Dial("udp", netip.AddrPortFrom(egress.Resolver, 53).String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	q := dnsmessage.Message{Header: dnsmessage.Header{ID: 1}, Questions: []dnsmessage.Question{{
		Name: dnsmessage.MustNewName("db.corp."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET,
	}}}
	packet, err := q.Pack()
	if err != nil {
		return nil, err
	}
	if _, err := conn.Write(packet); err != nil {
		return nil, err
	}
	b := make([]byte, 512)
	_ = conn.SetReadDeadline(time.Now().Add(bound))
	n, err := conn.Read(b)
	if err != nil {
		return nil, err
	}
	var m dnsmessage.Message
	if err := m.Unpack(b[:n]); err != nil || len(m.Answers) != 1 {
		return nil, errors.Join(err, errors.New("no answer"))
	}
	a := m.Answers[0].Body.(*dnsmessage.AResource).A
	return l.net.Dial("tcp", netip.AddrPortFrom(netip.AddrFrom4(a), uint16(l.server.Port())).String())
}

// connect logs in with the placeholder.
func (l *link) connect(ctx context.Context, change func(*pgconn.Config)) (*pgconn.PgConn, error) {
	c, err := pgconn.ParseConfig("host=db.corp user=postgres dbname=app password=" + placeholder + " sslmode=disable")
	if err != nil {
		return nil, err
	}
	ca, err := l.gw.Authority("job")
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	c.TLSConfig = &tls.Config{RootCAs: pool, ServerName: "db.corp"}
	c.LookupFunc = func(context.Context, string) ([]string, error) { return []string{"192.0.2.1"}, nil }
	dialled := false
	c.DialFunc = func(context.Context, string, string) (net.Conn, error) {
		if dialled {
			return nil, errors.New("the driver cancels in the background, when the test may be over")
		}
		dialled = true
		return l.dial()
	}
	if change != nil {
		change(c)
	}
	conn, err := pgconn.ConnectConfig(ctx, c)
	if err == nil {
		l.tb.Cleanup(func() { conn.Close(context.Background()) })
	}
	return conn, err
}

// TestPostgresStream: a gigabyte passes without being kept.
func TestPostgresStream(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	defer cancel()
	l := newLink(ctx, t, gateway.Config{})
	conn, err := l.connect(ctx, nil)
	agenttest.Must(t, err)
	w := &watermark{}
	w.look()
	before := w.peak
	const rows, row = 16 << 10, 64 << 10 // a gigabyte in all
	if _, err := conn.CopyTo(ctx, w, "copy (select repeat('x', 65535) from generate_series(1, 16384)) to stdout"); err != nil || w.n != rows*row {
		t.Fatalf("got %d bytes and %v, want %d", w.n, err, rows*row)
	}
	if grown := w.peak - before; grown > 64<<20 {
		t.Errorf("%d MiB were held", grown>>20)
	}
	agenttest.Must(t, conn.Close(ctx))
	l.await("the bytes", func(line egress.Line) bool { return line.Verdict == egress.Ended && line.Received > rows*row })
}

// A watermark counts what is written, and looks at the memory now and then.
type watermark struct {
	n    int64
	peak uint64
}

func (w *watermark) Write(b []byte) (int, error) {
	if w.n>>24 != (w.n+int64(len(b)))>>24 {
		w.look()
	}
	w.n += int64(len(b))
	return len(b), nil
}

func (w *watermark) look() {
	runtime.GC() // what is held, and not what lies about
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	w.peak = max(w.peak, m.HeapAlloc)
}

// TestPostgresEnds: whoever ends a session, the other side hears of it, and the
// ledger.
func TestPostgresEnds(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	defer cancel()
	l := newLink(ctx, t, gateway.Config{Hello: 5 * time.Second})
	direct, err := l.connect(ctx, func(c *pgconn.Config) {
		c.SSLNegotiation, c.TLSConfig.NextProtos = "direct", []string{"postgresql"}
	})
	agenttest.Must(t, err)
	agenttest.Must(t, direct.Close(ctx))
	newer, err := l.connect(ctx, func(c *pgconn.Config) { c.MaxProtocolVersion = "3.2" })
	agenttest.Must(t, err)
	if _, err := newer.Exec(ctx, "select pg_terminate_backend(pg_backend_pid())").ReadAll(); err == nil || !strings.Contains(err.Error(), "57P01") {
		t.Errorf("ended by the server: got %v", err)
	}
	l.await("the end", func(line egress.Line) bool { return line.Verdict == egress.Ended && line.Request.Method == "login" })
	for _, text := range []string{"GET / HTTP/1.1\r\n\r\n", "\x00\x00\x00\x08\x04\xd2\x16\x30\x00\x00\x00\x08\x04\xd2\x16\x30\x00\x00\x00\x08\x04\xd2\x16\x30\x00", "\x00\x00\x00\x08\x04\xd2\x16\x2fplain", ""} {
		conn, err := l.dial()
		agenttest.Must(t, err)
		_, _ = io.WriteString(conn, text)
		_ = conn.SetReadDeadline(time.Now().Add(bound))
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%q: the connection is open still", text)
		}
		conn.Close()
	}
	if _, err := l.connect(ctx, func(c *pgconn.Config) { c.RuntimeParams["work_mem"] = "nonsense" }); err == nil || !strings.Contains(err.Error(), "work_mem") {
		t.Errorf("a setting that the server refuses: got %v", err)
	}
	last, err := l.connect(ctx, nil)
	agenttest.Must(t, err)
	agenttest.Must(t, l.close())
	if _, err := last.Exec(ctx, "select 1").ReadAll(); err == nil {
		t.Error("a session lives on behind Close")
	}
	l.await("the withdrawal", func(line egress.Line) bool { return line.Verdict == egress.Ended && line.Reason != "" })
}

// TestPostgresUnwritten: what cannot be written down does not happen.
func TestPostgresUnwritten(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	defer cancel()
	l := newLink(ctx, t, gateway.Config{})
	l.fail = errors.New("full")
	t.Cleanup(func() { _ = l.close() }) // says that a line is missing; the next one is silent
	if _, err := l.connect(ctx, nil); err == nil {
		t.Error("got a session")
	}
}
