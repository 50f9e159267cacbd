package egresstest

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

func narrowed(b *bench) error {
	r, _, err := b.secured()
	if err != nil {
		return err
	}
	r.Requests = []egress.Request{
		{Methods: []string{"GET"}, Path: "/acme/*/info/refs", Query: []string{"service"}},
		{Methods: []string{"GET", "POST"}, Path: "/open/**", ContentTypes: []string{"application/json", "text/*"}},
	}
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	good, bad := 0, 0
	for _, h2 := range []bool{false, true} {
		c, err := j.client("web.example", "web.example", h2)
		if err != nil {
			return err
		}
		for _, tt := range requests() {
			body := io.Reader(nil)
			if tt.body != "" {
				body = strings.NewReader(tt.body)
			}
			_, text, err := c.do(tt.method, "https://web.example"+tt.target, "", body, "Content-Type", tt.media)
			arrived := err == nil && strings.HasPrefix(text, "host ")
			if arrived != tt.good {
				return fmt.Errorf("%s %s with %q %q: arrived %v (%q, %v), want %v", tt.method, tt.target, tt.media, tt.body, arrived, text, err, tt.good)
			}
			if tt.good {
				good++
			} else {
				bad++
			}
		}
	}
	if err := j.close("job-1"); err != nil {
		return err
	}
	if a, f := j.ledger.count(is(egress.Allowed)), j.ledger.count(on("tcp", egress.Refused)); a != good || f != bad {
		return fmt.Errorf("got %d lines of allowed and %d of refused requests, want %d and %d", a, f, good, bad)
	}
	return nil
}

type request struct {
	method, target, media, body string
	good                        bool
}

func requests() []request {
	return []request{
		{"GET", "/acme/app/info/refs?service=git-upload-pack", "", "", true},
		{"GET", "/acme/app/info/refs", "", "", true},
		{"GET", "/%61cme/app/info/refs", "", "", true},
		{"HEAD", "/acme/app/info/refs", "", "", false},
		{"DELETE", "/open/a", "", "", false},
		{"GET", "/acme/app/info/refs?service=a&other=b", "", "", false},
		{"GET", "/acme/app/info/refs?%73ervice=a;b", "", "", false},
		{"GET", "/acme/a/b/info/refs", "", "", false},
		{"GET", "/acme//info/refs", "", "", false},
		{"GET", "/acme/a%2fb/info/refs", "", "", false},
		{"GET", "/acme/app/info/refs/", "", "", false},
		{"GET", "/evil/app/info/refs", "", "", false},
		{"GET", "/open/../evil/app", "", "", false},
		{"GET", "/open/%2e%2e/evil/app", "", "", false},
		{"GET", "/open/..%2fevil", "", "", false},
		{"GET", "/open/..;/evil", "", "", false},
		{"GET", "/open/%252e%252e/evil", "", "", false},
		{"GET", "/open/..%5cevil", "", "", false},
		{"GET", "/open/a%00b", "", "", false},
		{"GET", "/open/a%c0%aeb", "", "", false},
		{"GET", "/open/@scope%2fname", "", "", true},
		{"GET", "/open/a/b?any=1", "", "", true},
		{"POST", "/open/a", "application/json; charset=utf-8", "{}", true},
		{"POST", "/open/a", "text/plain", "x", true},
		{"POST", "/open/a", "application/xml", "<a/>", false},
		{"POST", "/open/a", "", "x", false},
	}
}

func childRequests(b *bench) error {
	r, _, err := b.secured()
	if err != nil {
		return err
	}
	step := r
	step.ID = "policy:step"
	r.Requests = []egress.Request{{Methods: []string{"GET"}, Path: "/**"}}
	step.Requests = []egress.Request{{Methods: []string{"POST"}, Path: "/publish"}}
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	c, err := j.client("web.example", "web.example", true)
	if err != nil {
		return err
	}
	try := func(method string, want int) error {
		status, text, err := c.do(method, "https://web.example/publish", "", nil)
		if err != nil || status != want {
			return fmt.Errorf("%s: got %d %q %v, want %d", method, status, text, err, want)
		}
		return nil
	}
	if err := errors.Join(try("GET", 200), try("POST", 403)); err != nil {
		return fmt.Errorf("before the step: %w", err)
	}
	if err := j.open("job-1-step-1", "job-1", step); err != nil {
		return err
	}
	if err := errors.Join(try("GET", 200), try("POST", 200)); err != nil {
		return fmt.Errorf("in the step: %w", err)
	}
	if err := j.close("job-1-step-1"); err != nil {
		return err
	}
	of := func(l egress.Line) bool { return l.Gateway == "job-1-step-1" && l.Rule == "policy:step" }
	if n := j.ledger.count(of); n != 2 {
		return fmt.Errorf("when Close returned there were %d lines of the step's request, want 2", n)
	}
	if err := errors.Join(try("GET", 200), try("POST", 403)); err != nil {
		return fmt.Errorf("after the step, on the same connection: %w", err)
	}
	return nil
}

func bounded(b *bench) error {
	r, _, err := b.secured()
	if err != nil {
		return err
	}
	r.Requests = []egress.Request{
		{Methods: []string{"GET"}, Path: "/count", Count: 2},
		{Methods: []string{"POST"}, Path: "/sent", Sent: 10},
		{Methods: []string{"GET"}, Path: "/received", Received: 3},
	}
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	c, err := j.client("web.example", "web.example", true)
	if err != nil {
		return err
	}
	unsized := func(s string) io.Reader { return struct{ io.Reader }{strings.NewReader(s)} }
	for i, tt := range []struct {
		method, path string
		body         io.Reader
		good         bool
	}{
		{"GET", "/count", nil, true},
		{"GET", "/count", nil, true},
		{"GET", "/count", nil, false},
		{"POST", "/sent", strings.NewReader("0123456789"), true},
		{"POST", "/sent", strings.NewReader("0123456789a"), false},
		{"POST", "/sent", unsized("0123456789"), true},
		{"POST", "/sent", unsized("0123456789a"), false},
		{"GET", "/received", nil, false},
	} {
		_, text, err := c.do(tt.method, "https://web.example"+tt.path, "", tt.body)
		if good := err == nil && strings.HasPrefix(text, "host "); good != tt.good {
			return fmt.Errorf("%d: %s %s: got %q %v, want it to pass: %v", i, tt.method, tt.path, text, err, tt.good)
		}
	}
	return nil
}

func upgraded(b *bench) error {
	b.outside.name("ws.example", public)
	err := b.serve(public+":80", func(conn net.Conn) {
		r := bufio.NewReader(conn)
		if _, err := http.ReadRequest(r); err == nil {
			_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n") // the client sees what is missing
			_, _ = io.Copy(conn, r)
		}
	})
	if err != nil {
		return err
	}
	r := rule("ws.example", 80, egress.HTTP)
	r.Requests = []egress.Request{{Methods: []string{"GET"}, Path: "/ws", WebSocket: true, Sent: 8}, {Methods: []string{"GET"}, Path: "/plain"}}
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	ask := func(path, upgrade string) (net.Conn, error) {
		conn, err := j.connect("ws.example", 80)
		if err != nil {
			return nil, err
		}
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: ws.example\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", path, upgrade)
		resp, err := http.ReadResponse(bufio.NewReaderSize(conn, 16), nil)
		if err == nil && resp.StatusCode != http.StatusSwitchingProtocols {
			err = errors.New(resp.Status)
		}
		return conn, err
	}
	for _, tt := range [][2]string{{"/plain", "websocket"}, {"/ws", "h2c"}, {"/ws", "websocket, h2c"}} {
		if _, err := ask(tt[0], tt[1]); err == nil {
			return fmt.Errorf("an upgrade of %s to %s passed", tt[0], tt[1])
		}
	}
	conn, err := ask("/ws", "websocket")
	if err != nil {
		return fmt.Errorf("WebSocket: %w", err)
	}
	if err := errors.Join(echo(conn), echo(conn)); err != nil {
		return err
	}
	if err := echo(conn); err == nil {
		return errors.New("more passed to the WebSocket than the rule allows")
	}
	_, err = j.ledger.await("of its end", func(l egress.Line) bool {
		return l.Verdict == egress.Ended && l.Received == 8 && l.Request.Status == http.StatusSwitchingProtocols
	})
	return err
}

func discreet(b *bench) error {
	r, _, err := b.secured()
	if err != nil {
		return err
	}
	narrow := r
	narrow.Requests = []egress.Request{{Methods: []string{"GET"}, Path: "/hooks/*"}}
	for i, rules := range []egress.Rule{r, narrow} {
		j, err := b.start(fmt.Sprintf("job-%d", i+1), rules)
		if err != nil {
			return err
		}
		c, err := j.client("web.example", "web.example", true)
		if err != nil {
			return err
		}
		for _, target := range []string{"/hooks/T0123456789SECRET?q=SECRET", "/other/T0123456789SECRET"} {
			_, _, _ = c.do("GET", "https://web.example"+target, "", nil) // one of them is refused
		}
		if err := j.close(j.name); err != nil {
			return err
		}
		if n := j.ledger.count(func(l egress.Line) bool { return l.Request.Path == "/hooks/*" && l.Request.Method == "GET" }); n != 2 {
			return fmt.Errorf("got %d lines about /hooks/*, want 2", n)
		}
		leaks := j.ledger.count(func(l egress.Line) bool {
			text, err := json.Marshal(l)
			return err != nil || strings.Contains(string(text), "SECRET")
		})
		if leaks > 0 {
			return fmt.Errorf("%d lines hold what only the destination may see", leaks)
		}
	}
	return nil
}

func oneLabel(b *bench) error {
	n, err := newNotary()
	if err != nil {
		return err
	}
	for _, name := range []string{"a.web.example", "b.web.example", "a.b.web.example", "web.example"} {
		b.outside.name(name, public)
	}
	if err := b.secure(n, public+":443", "a.web.example", "b.web.example"); err != nil {
		return err
	}
	r := rule("*.web.example", 443, egress.HTTPS)
	r.CA = n.pem
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	for _, name := range []string{"a.web.example", "b.web.example"} {
		c, err := j.client(name, name, true)
		if err != nil {
			return err
		}
		if _, text, err := c.do("GET", "https://"+name+"/", "", nil); err != nil || !strings.HasPrefix(text, "host "+name) {
			return fmt.Errorf("%s: got %q %v", name, text, err)
		}
		if _, text, err := c.do("GET", "https://"+name+"/", "c.web.example", nil); err == nil {
			return fmt.Errorf("host c.web.example on a connection to %s: got %q", name, text)
		}
	}
	for _, name := range []string{"web.example", "a.b.web.example"} {
		if a, err := j.ask(name, typeA); err != nil || len(a.addrs) > 0 {
			return fmt.Errorf("question for %s: got %+v %v, want NXDOMAIN", name, a, err)
		}
	}
	return nil
}
