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
	"strings"
	"syscall"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/sandbox/netns/netnstest"
)

const servedName = "id-lease." + egress.Reserved

func served(local uint16, h http.HandlerFunc) egress.Served {
	return egress.Served{Rule: egress.Rule{ID: "policy:served", Name: servedName, Port: 80, Protocol: egress.HTTP}, Local: local, Handler: h}
}

// ask sends one request in a connection and returns the answer.
func ask(conn net.Conn, err error, host, header string) (int, string, error) {
	if err != nil {
		return 0, "", err
	}
	defer conn.Close()
	if _, err := fmt.Fprintf(conn, "GET /a?b=c HTTP/1.1\r\nHost: %s\r\n%sConnection: close\r\n\r\n", host, header); err != nil {
		return 0, "", err
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return res.StatusCode, string(body), err
}

// TestServed: a name of the agent's own answers in the box that it was opened for,
// while it is open, at its port and at the one of loopback; and nowhere else.
func TestServed(t *testing.T) {
	t.Parallel()
	b := newBox(t, gateway.Config{Dial: func(context.Context, string, string) (net.Conn, error) {
		t.Error("something was dialled")
		return nil, errors.New("not in this test")
	}})
	h := func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(http.StatusTeapot)
		_, _ = io.WriteString(w, r.Method+" "+r.URL.RequestURI()+" "+r.Header.Get("Authorization"))
	}
	open := func(name string, s ...egress.Served) error {
		return b.gw.Open(t.Context(), name, egress.Opening{Serve: s, Ledger: b.ledger, Parent: "job"})
	}
	const local = 18801
	if err := open("step", served(local, h)); err != nil {
		t.Fatal(err)
	}
	byName := func(host string) (int, string, error) {
		conn, err := b.connect(servedName, 80)
		return ask(conn, err, host, "Authorization: Bearer x\r\n")
	}
	at := fmt.Sprintf("127.0.0.1:%d", local)
	byPort := func(host string) (int, string, error) {
		conn, err := b.net.Dial("tcp", at)
		return ask(conn, err, host, "Authorization: Bearer x\r\n")
	}
	for what, got := range map[string]func() (int, string, error){
		"its name": func() (int, string, error) { return byName(servedName) },
		"loopback": func() (int, string, error) { return byPort(at) },
	} {
		if status, body, err := got(); status != http.StatusTeapot || body != "GET /a?b=c Bearer x" {
			t.Errorf("%s: got %d %q %v", what, status, body, err)
		}
	}
	lines := b.await("ended twice", func(all []egress.Line) bool {
		n := 0
		for _, l := range all {
			if l.Verdict == egress.Ended && l.Gateway == "step" && l.Rule == "policy:served" && l.Request.Status == http.StatusTeapot {
				n++
			}
		}
		return n == 2
	})
	for _, l := range lines {
		if l.Dialled != "" {
			t.Errorf("dialled: %+v", l)
		}
	}
	for what, got := range map[string]func() (int, string, error){
		"another host":                func() (int, string, error) { return byName("evil.example") },
		"another host, over loopback": func() (int, string, error) { return byPort("evil.example") }, // rebinding
		"another port":                func() (int, string, error) { return byPort("127.0.0.1:80") },
	} {
		if status, body, err := got(); err == nil {
			t.Errorf("%s: got %d %q, want a reset", what, status, body)
		}
	}
	other := netnstest.New(t)
	if conn, err := other.Dial("tcp", at); err == nil {
		conn.Close()
		t.Error("another network reaches the port")
	}
	if err := b.gw.Close(t.Context(), "step"); err != nil {
		t.Fatal(err)
	}
	if _, err := b.lookup(servedName); err == nil {
		t.Error("the name resolves after Close")
	}
	if _, _, err := byPort(at); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the port after Close: got %v, want it refused", err)
	}
}

// TestServedWithdrawn: what is being answered when the name is withdrawn ends.
func TestServedWithdrawn(t *testing.T) {
	t.Parallel()
	b := newBox(t, gateway.Config{})
	asked := make(chan struct{})
	s := served(18802, func(w http.ResponseWriter, r *http.Request) {
		close(asked)
		<-r.Context().Done()
	})
	if err := b.gw.Open(t.Context(), "step", egress.Opening{Serve: []egress.Served{s}, Ledger: b.ledger, Parent: "job"}); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		conn, err := b.connect(servedName, 80)
		_, _, err = ask(conn, err, servedName, "")
		ended <- err
	}()
	<-asked
	if err := b.gw.Close(t.Context(), "step"); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err == nil {
		t.Error("the request was answered after Close")
	}
}

// TestServedRefuses: names of the agent's own are nobody else's.
func TestServedRefuses(t *testing.T) {
	t.Parallel()
	b := newBox(t, gateway.Config{})
	h := func(http.ResponseWriter, *http.Request) {}
	open := func(name string, change func(*egress.Opening)) error {
		o := egress.Opening{Serve: []egress.Served{served(0, h)}, Ledger: b.ledger, Parent: "job"}
		change(&o)
		return b.gw.Open(t.Context(), name, o)
	}
	for what, change := range map[string]func(*egress.Opening){
		"a rule for it": func(o *egress.Opening) { o.Rules.Allow = []egress.Rule{o.Serve[0].Rule} },
		"a rule around it": func(o *egress.Opening) {
			o.Serve[0].Rule.Name = "*." + egress.Reserved
			o.Rules.Allow = []egress.Rule{o.Serve[0].Rule}
		},
		"another's name":   func(o *egress.Opening) { o.Serve[0].Rule.Name = "web.example" },
		"another protocol": func(o *egress.Opening) { o.Serve[0].Rule.Protocol = egress.HTTPS },
		"an address": func(o *egress.Opening) {
			o.Serve[0].Rule.Resolve = []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}
		},
		"no handler":     func(o *egress.Opening) { o.Serve[0].Handler = nil },
		"twice":          func(o *egress.Opening) { o.Serve = append(o.Serve, o.Serve[0]) },
		"before its box": func(o *egress.Opening) { o.Parent, o.Serve[0].Local = "", 18803 },
	} {
		if err := open("other", change); !errors.Is(err, egress.ErrBadRules) {
			t.Errorf("%s: got %v, want ErrBadRules", what, err)
		}
	}
	l, err := b.net.Listen("tcp", "127.0.0.1:18804")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	busy := func(o *egress.Opening) { o.Serve[0].Local = 18804 }
	if err := open("step", busy); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a port that is taken: got %v", err)
	}
	if _, err := b.lookup(servedName); err == nil {
		t.Error("what could not be opened is open")
	}
	if err := open("step", func(o *egress.Opening) {}); err != nil {
		t.Errorf("the same name with no port: %v", err)
	}
	if err := open("second", func(o *egress.Opening) {}); !errors.Is(err, egress.ErrBadRules) || !strings.Contains(err.Error(), "served already") {
		t.Errorf("a name that is served: got %v", err)
	}
	if err := b.gw.Close(t.Context(), "step"); err != nil {
		t.Fatal(err)
	}
}

// TestServedUnlearned: a box that learns does not look for such a name outside.
func TestServedUnlearned(t *testing.T) {
	t.Parallel()
	g, err := gateway.New(gateway.Config{})
	if err != nil {
		t.Fatal(err)
	}
	b := &box{tb: t, net: netnstest.New(t), gw: g}
	if err := g.Open(t.Context(), "job", egress.Opening{Ledger: b.ledger, Learn: &egress.Learning{}}); err != nil {
		t.Fatal(err)
	}
	if err := g.Attach(t.Context(), "job", b.net.Sockets()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.close)
	if _, err := b.lookup("other.example"); err != nil {
		t.Errorf("another name: %v", err)
	}
	if addr, err := b.lookup(servedName); err == nil {
		t.Errorf("the agent's own: got %v", addr)
	}
}
