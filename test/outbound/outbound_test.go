// Package outbound_test holds the agent's own way out against a real squid, which
// wants a password and stands in a network that is reached through it alone.
package outbound_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/runner/outbound"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/squidtest"
)

func TestMain(m *testing.M) { agenttest.Main(m) }

// hosts is what squid knows; far is behind it.
const (
	far   = "127.0.0.2:8080"
	hosts = "127.0.0.2 far.corp\n"
)

// A record keeps the events, and may be told to fail.
type record struct {
	mu     sync.Mutex
	events []audit.Event
	broken error
}

func (r *record) Append(_ context.Context, e audit.Event) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.broken != nil {
		return r.broken
	}
	r.events = append(r.events, e)
	return nil
}

func (r *record) of(action string) (found []audit.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.events {
		if e.Action == action {
			found = append(found, e)
		}
	}
	return found
}

// text is all of it, to look for what must not be there.
func (r *record) text() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return fmt.Sprintf("%+v", r.events)
}

func newWay(t *testing.T, c outbound.Config) (*outbound.Way, *record) {
	t.Helper()
	r := &record{}
	c.Audit, c.Forbidden, c.Shape = r, gateway.Forbidden, gateway.Shape
	w, err := outbound.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.mu.Lock()
		r.broken = nil
		r.mu.Unlock()
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	return w, r
}

func through(s *squidtest.Squid, password string) outbound.Config {
	return outbound.Config{
		Proxy: "http://" + s.Address, User: squidtest.User,
		Password: func() (creds.Secret, error) { return creds.NewSecret(password), nil },
	}
}

// serve answers on a listener until the test is over.
func serve(t *testing.T, l net.Listener, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, "hello")
	})}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(l) })
	t.Cleanup(func() {
		_ = server.Close()
		serving.Wait()
	})
}

// get asks for a URL by one exit, as a client of the agent's does.
func get(t *testing.T, e *outbound.Exit, url string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(audit.WithJob(t.Context(), "job-1"), time.Minute)
	defer cancel()
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := (&http.Client{Transport: e.HTTP(transport)}).Do(req)
	if err != nil {
		return "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return string(b), err
}

// TestProxy: what only the proxy reaches is reached with it and not without, it
// sees the name, and its password is nowhere else.
func TestProxy(t *testing.T) {
	s := squidtest.Start(t, hosts)
	l, err := s.Net.Listen("tcp", far)
	serve(t, l, err)
	const url = "http://far.corp:8080/v1/tokens/s3cr3t0123456789?token=s3cr3t"

	w, r := newWay(t, outbound.Config{})
	if got, err := get(t, w.For("issuer vault"), url); err == nil {
		t.Errorf("without a proxy: got %q, want that nothing is there", got)
	}
	if c := r.of("agent.connect"); len(c) != 1 || c[0].Result == "ok" {
		t.Errorf("without a proxy: %+v, want one line that says it failed", c)
	}

	w, r = newWay(t, through(s, s.Password))
	if got, err := get(t, w.For("issuer vault"), url); got != "hello" || err != nil {
		t.Fatalf("through the proxy: %q, %v", got, err)
	}
	s.Await(t, "CONNECT far.corp:8080 agent 200")
	c, q := r.of("agent.connect"), r.of("agent.request")
	if len(c) != 1 || c[0].Job != "job-1" || c[0].Object != "issuer vault" || c[0].Detail["via"] != s.Address || c[0].Detail["name"] != "far.corp" || c[0].Detail["port"] != "8080" {
		t.Errorf("connections: %+v", c)
	}
	if len(q) != 1 || q[0].Detail["path"] != "/v1/tokens/*" || q[0].Detail["status"] != "200" || q[0].Detail["received"] != "5" || q[0].Job != "job-1" {
		t.Errorf("requests: %+v", q)
	}
	for _, secret := range []string{"s3cr3t", s.Password} {
		if strings.Contains(r.text(), secret) {
			t.Errorf("the audit holds %q: %s", secret, r.text())
		}
	}

	w, r = newWay(t, through(s, "wrong-password"))
	_, err = get(t, w.For("issuer vault"), url)
	if err == nil || !strings.Contains(err.Error(), "407") || strings.Contains(err.Error()+r.text(), "wrong-password") {
		t.Errorf("with a wrong password: %v, want 407 without it", err)
	}
}

// TestProxyAway: with the proxy gone nothing is dialled directly, though it could
// be.
func TestProxyAway(t *testing.T) {
	s := squidtest.Start(t, hosts)
	const own = "198.51.100.7" // of this namespace alone
	if out, err := exec.Command("ip", "addr", "add", own+"/32", "dev", "lo").CombinedOutput(); err != nil {
		t.Fatalf("ip: %v: %s", err, out)
	}
	l, err := net.Listen("tcp", own+":0")
	serve(t, l, err)
	url := "http://" + l.Addr().String() + "/"

	w, _ := newWay(t, outbound.Config{})
	if got, err := get(t, w.For("x"), url); got != "hello" || err != nil {
		t.Fatalf("the canary: %q, %v", got, err)
	}
	s.Stop()
	c := through(s, s.Password)
	w, r := newWay(t, c)
	if got, err := get(t, w.For("x"), url); err == nil || !strings.Contains(err.Error(), "proxy ") {
		t.Errorf("with the proxy gone: %q, %v; want an error of the proxy", got, err)
	}
	if q := r.of("agent.request"); len(q) != 1 || !strings.Contains(q[0].Result, "proxy ") {
		t.Errorf("requests: %+v, want the failure", q)
	}
	c.NoProxy = []string{"198.51.100.0/24"}
	w, _ = newWay(t, c)
	if got, err := get(t, w.For("x"), url); got != "hello" || err != nil {
		t.Errorf("with an exception: %q, %v", got, err)
	}
}

// TestMetadata: what hands out credentials of the machine is not dialled.
func TestMetadata(t *testing.T) {
	const metadata = "169.254.169.254"
	if out, err := exec.Command("ip", "addr", "add", metadata+"/32", "dev", "lo").CombinedOutput(); err != nil {
		t.Fatalf("ip: %v: %s", err, out)
	}
	l, err := net.Listen("tcp", metadata+":0")
	serve(t, l, err)
	url := "http://" + l.Addr().String() + "/"
	w, r := newWay(t, outbound.Config{})
	if got, err := get(t, w.For("x"), url); err == nil {
		t.Errorf("metadata address: got %q", got)
	}
	if c := r.of("agent.connect"); len(c) != 1 || !strings.Contains(c[0].Result, "cloud metadata address") {
		t.Errorf("connections: %+v", c)
	}
	w, _ = newWay(t, outbound.Config{Metadata: []netip.Addr{netip.MustParseAddr(metadata)}})
	if got, err := get(t, w.For("x"), url); got != "hello" || err != nil {
		t.Errorf("metadata address that is configured: %q, %v", got, err)
	}
}

// TestUnwritten: what cannot be written down is not done.
func TestUnwritten(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	serve(t, l, err)
	w, r := newWay(t, outbound.Config{})
	broken := errors.New("disk full")
	r.broken = broken
	if got, err := get(t, w.For("x"), "http://"+l.Addr().String()); !errors.Is(err, broken) {
		t.Errorf("got %q, %v; want the audit's error", got, err)
	}
	if conn, err := w.For("x").DialContext(t.Context(), "tcp", l.Addr().String()); !errors.Is(err, broken) || conn != nil {
		t.Errorf("got a connection, %v; want the audit's error", err)
	}
}

// TestFolded: calls that repeat are counted, and none is lost.
func TestFolded(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	serve(t, l, err)
	w, r := newWay(t, outbound.Config{Fold: time.Hour})
	e := w.ForPoller("provider forge")
	const calls = 20
	for range calls {
		if _, err := get(t, e, "http://"+l.Addr().String()+"/ask"); err != nil {
			t.Fatal(err)
		}
	}
	if q := r.of("agent.request"); len(q) != 1 {
		t.Fatalf("%d lines before it is time, want the first", len(q))
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	for _, action := range []string{"agent.connect", "agent.connect.end", "agent.request"} {
		q := r.of(action)
		if len(q) != 2 || q[1].Detail["count"] != fmt.Sprint(calls-1) || q[1].Detail["first"] == "" || q[1].Time.IsZero() {
			t.Errorf("%s: %+v, want the first and a sum of %d", action, q, calls-1)
		}
	}
}
