package gateway_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/sandbox/netns/netnstest"
)

// zone resolves names to what the test says.
type zone map[string]string

func (z zone) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	if a, ok := z[strings.TrimSuffix(host, ".")]; ok {
		return []netip.Addr{netip.MustParseAddr(a)}, nil
	}
	return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
}

// learner makes a box that learns, or one that does not.
func learner(t *testing.T, c gateway.Config, learn *egress.Learning, rules ...egress.Rule) *box {
	t.Helper()
	g, err := gateway.New(c)
	if err != nil {
		t.Fatal(err)
	}
	b := &box{tb: t, net: netnstest.New(t), gw: g}
	o := egress.Opening{Rules: egress.Rules{Allow: rules}, Ledger: b.ledger, Learn: learn}
	if err := g.Open(t.Context(), "job", o); err != nil {
		t.Fatal(err)
	}
	if err := g.Attach(t.Context(), "job", b.net.Sockets()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.close)
	return b
}

// TestLearn: what no rule allows is reached while the gateway learns, is written
// as such, and is not reached otherwise.
func TestLearn(t *testing.T) {
	t.Parallel()
	echoes := server(t, echo)
	speaks := server(t, func(conn net.Conn) { fmt.Fprint(conn, "220 ready\n"); _, _ = io.Copy(io.Discard, conn) })
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "hello ", r.URL.Path) }))
	t.Cleanup(web.Close)
	webPort := netip.MustParseAddrPort(web.Listener.Addr().String()).Port()
	public := map[string]uint16{"11.0.0.1": echoes, "11.0.0.2": speaks, "11.0.0.3": webPort}
	c := gateway.Config{
		Resolver: zone{"echo.example": "11.0.0.1", "first.example": "11.0.0.2", "web.example": "11.0.0.3"},
		Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			to := netip.MustParseAddrPort(address)
			return new(net.Dialer).DialContext(ctx, network, fmt.Sprintf("127.0.0.1:%d", public[to.Addr().String()]))
		},
	}
	talk := func(b *box, name string, port uint16, say, want string) error {
		conn, err := b.connect(name, port)
		if err != nil {
			return err
		}
		defer conn.Close()
		if _, err := io.WriteString(conn, say); err != nil {
			return err
		}
		line, err := bufio.NewReader(conn).ReadString('\n')
		if err == nil && strings.TrimSpace(line) != want {
			err = fmt.Errorf("got %q, want %q", line, want)
		}
		return err
	}
	all := []struct {
		name      string
		port      uint16
		say, want string
		protocol  egress.Protocol
		path      string
	}{
		{"echo.example", 7, "ping\n", "ping", egress.TCP, ""},
		{"first.example", 25, "", "220 ready", egress.TCP, ""},
		{"echo.example", 443, "\x16\x03\x01 hello\n", "\x16\x03\x01 hello", egress.TLS, ""},
		{"web.example", 8080, "GET /acme/app HTTP/1.1\r\nHost: web.example:8080\r\n\r\n", "HTTP/1.1 200 OK", egress.HTTP, "/acme/app"},
	}
	b := learner(t, c, &egress.Learning{})
	for _, tt := range all {
		if err := talk(b, tt.name, tt.port, tt.say, tt.want); err != nil {
			t.Errorf("%s:%d while it learns: %v", tt.name, tt.port, err)
		}
		for _, v := range []egress.Verdict{egress.Learned, egress.Ended} {
			b.await(fmt.Sprintf("%s line of %s:%d", v, tt.name, tt.port), has(func(l egress.Line) bool {
				return l.Name == tt.name && l.Port == tt.port && l.Protocol == tt.protocol && l.Verdict == v &&
					l.Mode == egress.ModeAudit && l.Rule == "" && l.Request.Path == tt.path
			}))
		}
	}
	b.await("line of the name", has(func(l egress.Line) bool {
		return l.Network == "dns" && l.Name == "web.example" && l.Verdict == egress.Learned && l.Mode == egress.ModeAudit
	}))
	if n := count(b.await("lines", func([]egress.Line) bool { return true }), egress.Allowed); n > 0 {
		t.Errorf("%d lines say allowed, and no rule does", n)
	}

	strict := learner(t, c, nil)
	for _, tt := range all {
		if err := talk(strict, tt.name, tt.port, tt.say, tt.want); err == nil {
			t.Errorf("%s:%d is reached without learning", tt.name, tt.port)
		}
	}
	strict.await("refusals without a mode", func(lines []egress.Line) bool {
		return count(lines, egress.Refused) == len(all) && !has(func(l egress.Line) bool { return l.Mode != "" })(lines)
	})
}

// TestLearnNever: what no rule opens stays shut while the gateway learns, and
// private addresses do unless the operator says.
func TestLearnNever(t *testing.T) {
	t.Parallel()
	port := server(t, echo)
	own := server(t, echo)
	c := gateway.Config{
		Resolver: zone{"metadata.example": "169.254.169.254", "lan.example": "127.0.0.1"},
		Never:    []netip.AddrPort{netip.AddrPortFrom(netip.IPv4Unspecified(), own)},
	}
	reached := func(b *box, name string, port uint16) bool {
		conn, err := b.connect(name, port)
		if err != nil {
			return false
		}
		defer conn.Close()
		_, werr := conn.Write([]byte("12345678"))
		_, rerr := io.ReadFull(conn, make([]byte, 8))
		return werr == nil && rerr == nil
	}
	loopback := &egress.Learning{Private: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("169.254.0.0/16")}}
	for _, tt := range []struct {
		what  string
		learn *egress.Learning
		name  string
		port  uint16
		want  bool
	}{
		{"private", &egress.Learning{}, "lan.example", port, false},
		{"private that the operator opens", loopback, "lan.example", port, true},
		{"the agent's own", loopback, "lan.example", own, false},
		{"metadata", loopback, "metadata.example", 80, false},
		{"a name of nobody", loopback, "mayfly-attestation.invalid", port, false},
		{"a name that does not exist", loopback, "absent.example", port, false},
	} {
		b := learner(t, c, tt.learn)
		if got := reached(b, tt.name, tt.port); got != tt.want {
			t.Errorf("%s: reached is %v, want %v", tt.what, got, tt.want)
		}
		b.await("marked line", has(func(l egress.Line) bool {
			return l.Name == tt.name && l.Mode == egress.ModeAudit && (l.Verdict == egress.Ended) == tt.want && l.Verdict != egress.Learned
		}))
	}
}

// TestLearnRequests: a request that its rule does not allow passes under no rule,
// and what a rule allows passes under it.
func TestLearnRequests(t *testing.T) {
	t.Parallel()
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "hello") }))
	t.Cleanup(web.Close)
	port := netip.MustParseAddrPort(web.Listener.Addr().String()).Port()
	rule := egress.Rule{
		ID: "policy:7", Name: "web.example", Port: port, Protocol: egress.HTTP, Resolve: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")},
		Requests: []egress.Request{{Methods: []string{"GET"}, Path: "/ok"}},
	}
	for _, learn := range []*egress.Learning{nil, {}} {
		b := learner(t, gateway.Config{}, learn, rule)
		conn, err := b.connect("web.example", port)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		r := bufio.NewReader(conn)
		for _, tt := range []struct {
			request string
			want    int
			verdict egress.Verdict
			rule    string
		}{
			{"GET /ok", 200, egress.Allowed, "policy:7"},
			{"DELETE /other", 200, egress.Learned, ""},
		} {
			if learn == nil && tt.rule == "" {
				tt.want, tt.verdict, tt.rule = 403, egress.Refused, "policy:7"
			}
			fmt.Fprintf(conn, "%s HTTP/1.1\r\nHost: web.example:%d\r\n\r\n", tt.request, port)
			answer, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, answer.Body)
			if answer.StatusCode != tt.want {
				t.Errorf("%s, learning %v: status %d, want %d", tt.request, learn != nil, answer.StatusCode, tt.want)
			}
			b.await("line of "+tt.request, has(func(l egress.Line) bool {
				return l.Request.Method+" "+l.Request.Path == tt.request && l.Verdict == tt.verdict && l.Rule == tt.rule
			}))
		}
	}
}

// TestLearnOfAStep: only who has the box can have it learn.
func TestLearnOfAStep(t *testing.T) {
	t.Parallel()
	b := learner(t, gateway.Config{}, nil)
	err := b.gw.Open(t.Context(), "step", egress.Opening{Ledger: b.ledger, Parent: "job", Learn: &egress.Learning{}})
	if err == nil || !strings.Contains(err.Error(), "learning belongs to the gateway that has the box") {
		t.Errorf("got %v, want a refusal", err)
	}
}
