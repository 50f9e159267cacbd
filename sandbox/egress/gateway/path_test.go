package gateway

import (
	"bufio"
	"context"
	"net/http"
	"net/url"
	"path"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

func TestMatches(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		pattern, path string
		want          bool
	}{
		{"/**", "/", true},
		{"/**", "/a/../b//%2e%2e/%00", true}, // nothing is compared
		{"/**", "*", false},
		{"/", "/", true},
		{"/", "/a", false},
		{"/a", "/a", true},
		{"/a", "/a/", false},
		{"/a", "/A", false},
		{"/a", "/%61", true},
		{"/a/", "/a/", true},
		{"/a/*", "/a/b", true},
		{"/a/*", "/a/", false},
		{"/a/*", "/a", false},
		{"/a/*", "/a/b/c", false},
		{"/a/*", "/a/b%2fc", false},
		{"/a/*/c", "/a/b/c", true},
		{"/a/**", "/a", false},
		{"/a/**", "/a/", true},
		{"/a/**", "/a/b/c/", true},
		{"/a/**", "/a/@b%2fc", true},
		{"/a/**", "/a/b%252fc", true},
		{"/a/**", "/a/100%25", true},
		{"/a/**", "/a/%zz", false},
		{"/a/**", "/a/../b", false},
		{"/a/**", "/a/%2e%2e/b", false},
		{"/a/**", "/a/..%2fb", false},
		{"/a/**", "/a/%252e%252e%252fb", false},
		{"/a/**", "/a/%25252525252e/b", false},
		{"/a/**", "/a/./b", false},
		{"/a/**", "/a//b", false},
		{"/a/**", "/a/..;x/b", false},
		{"/a/**", "/a/;x/b", false},
		{"/a/**", "/a/b;x/c", true},
		{"/a/**", `/a/..\b`, false},
		{"/a/**", "/a/%5c", false},
		{"/a/**", "/a/b%00", false},
		{"/a/**", "/a/%0a", false},
		{"/a/**", "/a/%c0%ae%c0%ae/b", false},
		{"/a/**", "/a%2fb", false},
		{"/a/b", "/a%2fb", false},
		{"/a/ä", "/a/ä", true}, // patterns are ASCII; this is only about the comparison
	} {
		if got := matches(tt.pattern, tt.path); got != tt.want {
			t.Errorf("%s and %s: got %v, want %v", tt.pattern, tt.path, got, tt.want)
		}
	}
}

// FuzzMatches: however a server decodes and cleans a path that matches, it stays
// below what the pattern names.
func FuzzMatches(f *testing.F) {
	for _, s := range []string{"/acme/app", "/acme/%2e%2e/evil", "/acme/..%2fevil", "/acme/a%252fb", "/acme/x;y", "/acme//b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := url.ParseRequestURI(s)
		if err != nil || !matches("/acme/**", u.EscapedPath()) {
			return
		}
		for text := u.EscapedPath(); ; {
			for _, read := range []string{text, strings.ReplaceAll(text, `\`, "/"), stripParameters(text)} {
				if clean := path.Clean(read); clean != "/acme" && !strings.HasPrefix(clean, "/acme/") {
					t.Fatalf("%q is %q for a server that reads %q", s, clean, read)
				}
			}
			next, err := url.PathUnescape(text)
			if err != nil || next == text {
				return
			}
			text = next
		}
	})
}

// stripParameters is what servlet containers do before they clean a path.
func stripParameters(p string) string {
	segments := strings.Split(p, "/")
	for i, s := range segments {
		segments[i], _, _ = strings.Cut(s, ";")
	}
	return strings.Join(segments, "/")
}

// FuzzShape: no long run of letters and digits together gets into the ledger.
func FuzzShape(f *testing.F) {
	f.Add("/hooks/T0123456789ABC/xyz")
	f.Fuzz(func(t *testing.T, s string) {
		got := shape(s)
		for segment := range strings.SplitSeq(got, "/") {
			if len(segment) > 40 || len(segment) > 8 && strings.ContainsAny(segment, "0123456789%?=&") {
				t.Fatalf("the shape of %q is %q", s, got)
			}
		}
	})
}

func TestQueryKeys(t *testing.T) {
	t.Parallel()
	for query, want := range map[string]string{
		"": "", "a": "a", "a=1&b=2": "a b", "a=1&a=2": "a a", "%61=1": "a", "a+b=1": "a b", "a;b": "!", "a=%zz": "!", "%zz=1": "!", "&": " ",
	} {
		keys, ok := queryKeys(query)
		got := strings.Join(keys, " ")
		if !ok {
			got = "!"
		}
		if got != want {
			t.Errorf("%q: got %q, want %q", query, got, want)
		}
	}
}

// TestRate: a minute's worth passes at once, what follows is spread, and a count
// is a count.
func TestRate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		n := &narrow{Request: egress.Request{Rate: 6, Count: 9}}
		start := time.Now()
		for i, want := range []time.Duration{0, 0, 0, 0, 0, 0, 10, 20, 30} {
			if err := n.pass(context.Background()); err != nil || time.Since(start) != want*time.Second {
				t.Errorf("request %d passed after %v with %v, want %ds", i, time.Since(start), err, want)
			}
		}
		if err := n.pass(context.Background()); err == nil {
			t.Error("one more than the count passed")
		}
		n = &narrow{Request: egress.Request{Rate: 1}}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := n.pass(ctx); err != nil {
			t.Error(err)
		}
		if err := n.pass(ctx); err == nil {
			t.Error("a request that nobody waits for any more passed")
		}
	})
}

// FuzzRequest: what passes the checks is for the name and port of the connection
// in the only form that the destination will see.
func FuzzRequest(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: web.example\r\n\r\n", "GET http://other/ HTTP/1.1\r\nHost: web.example\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: web.example:443\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
		"POST /a HTTP/1.1\r\nHost: web.example\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n0\r\n\r\n",
		"GET /dns-query?dns=AAAA HTTP/1.1\r\nHost: web.example\r\nAccept: application/dns-message\r\n\r\n",
	} {
		f.Add(s)
	}
	to := egress.Line{Name: "web.example", Port: 443, Protocol: egress.HTTPS}
	n := &narrow{Request: egress.Request{Methods: []string{"GET"}, Path: "/a/*", Query: []string{"q"}, ContentTypes: []string{"text/plain"}}}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(s)))
		if err != nil || checkRequest(r, to) != nil {
			return
		}
		host := strings.ToLower(r.Host)
		if host != "web.example" && host != "web.example:443" || r.Method == "CONNECT" || r.URL.User != nil || len(r.Header["Host"]) > 0 {
			t.Fatalf("%q passed: %+v", s, r)
		}
		if why, _ := n.judge(r); why == "" && (r.Method != "GET" || !strings.HasPrefix(r.URL.Path, "/a/") || strings.Contains(r.URL.Path, "..") && path.Clean(r.URL.Path) != r.URL.Path) {
			t.Fatalf("%q passed the rule: %+v", s, r)
		}
	})
}
