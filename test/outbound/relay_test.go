package outbound_test

import (
	"io"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner/outbound"
	"github.com/mayfly-ci/mayfly/test/squidtest"
)

// TestRelay: a child of the agent gets to one address, by the agent's own way
// and under its lines, and only with the relay's password.
func TestRelay(t *testing.T) {
	s := squidtest.Start(t, hosts)
	l, err := s.Net.Listen("tcp", far)
	serve(t, l, err)
	w, r := newWay(t, through(s, s.Password))
	secret, end, err := w.For("git cache").Relay(t.Context(), "far.corp:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer end()
	proxy, err := url.Parse(secret.Reveal())
	if err != nil {
		t.Fatal(err)
	}
	ask := func(proxy *url.URL, to string) int {
		t.Helper()
		c := http.Client{Transport: &http.Transport{Proxy: http.ProxyURL(proxy), DisableKeepAlives: true}}
		res, err := c.Get(to)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		return res.StatusCode
	}
	stranger := *proxy
	stranger.User = url.UserPassword("mayfly", "guessed")
	for _, c := range []struct {
		proxy *url.URL
		to    string
		want  int
	}{
		{proxy, "http://far.corp:8080/", http.StatusOK},
		{proxy, "http://far.corp:8081/", http.StatusForbidden},
		{proxy, "http://other.corp:8080/", http.StatusForbidden},
		{&stranger, "http://far.corp:8080/", http.StatusProxyAuthRequired},
	} {
		if got := ask(c.proxy, c.to); got != c.want {
			t.Errorf("%s: %d, want %d", c.to, got, c.want)
		}
	}
	// A tunnel, which is what git has for https.
	password, _ := proxy.User.Password()
	inner, err := outbound.New(outbound.Config{Proxy: "http://" + proxy.Host})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := inner.Tunnel(t.Context(), "far.corp:8080"); err == nil || !strings.Contains(err.Error(), "407") {
		t.Errorf("a tunnel without a password: %v", err)
	}
	inner, err = outbound.New(outbound.Config{
		Proxy: "http://" + proxy.Host, User: proxy.User.Username(),
		Password: func() (creds.Secret, error) { return creds.NewSecret(password), nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	tunnel, err := inner.Tunnel(t.Context(), "far.corp:8080")
	if err != nil {
		t.Fatal(err)
	}
	defer tunnel.Close()
	if _, err := io.WriteString(tunnel, "GET / HTTP/1.0\r\nHost: far.corp\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(tunnel); err != nil || !strings.HasSuffix(string(b), "hello") {
		t.Errorf("in the tunnel: %q, %v", b, err)
	}
	if strings.Contains(r.text(), password) || strings.Contains(r.text(), s.Password) {
		t.Error("a password is in the audit")
	}
	if c := r.of("agent.connect"); len(c) != 2 || c[0].Object != "git cache" || c[0].Detail["via"] != s.Address {
		t.Errorf("connections: %+v, want two by the proxy", c)
	}
}
