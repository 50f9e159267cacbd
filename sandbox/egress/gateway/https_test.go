package gateway_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/websocket"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
)

// A secured is a box that reaches web.example, where a handler of the test
// serves, with TLS that ends at the gateway.
type secured struct {
	*box
	port uint16
	pool *x509.CertPool // what the box trusts
	out  *httptest.Server
	ca   string // of the destination, as PEM
}

// newSecured makes one. The destination speaks HTTP/2 if h2 says so.
func newSecured(tb testing.TB, h2 bool, handler http.Handler, requests ...egress.Request) *secured {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	c := &x509.Certificate{
		DNSNames: []string{"web.example"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		tb.Fatal(err)
	}
	out := httptest.NewUnstartedServer(handler)
	out.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	out.EnableHTTP2 = h2
	out.StartTLS()
	tb.Cleanup(out.Close)
	s := &secured{port: portOf(out), pool: x509.NewCertPool(), out: out, ca: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))}
	s.box = newBox(tb, gateway.Config{}, egress.Rule{
		Name: "web.example", Port: s.port, Protocol: egress.HTTPS, Requests: requests,
		CA: s.ca,
	})
	ca, err := s.gw.Authority("job")
	if err != nil || !s.pool.AppendCertsFromPEM(ca) {
		tb.Fatalf("Authority: %q %v", ca, err)
	}
	return s
}

// dial connects from the box and begins TLS.
func (s *secured) dial(protocols ...string) (*tls.Conn, error) {
	conn, err := s.connect("web.example", s.port)
	if err != nil {
		return nil, err
	}
	t := tls.Client(conn, &tls.Config{RootCAs: s.pool, ServerName: "web.example", NextProtos: protocols})
	s.tb.Cleanup(func() { t.Close() })
	return t, t.Handshake()
}

// client is a program of the job's.
func (s *secured) client(h2 bool) *http.Client {
	t := &http.Transport{
		DialContext:     func(context.Context, string, string) (net.Conn, error) { return s.forever() },
		TLSClientConfig: &tls.Config{RootCAs: s.pool, ServerName: "web.example"}, ForceAttemptHTTP2: h2,
	}
	s.tb.Cleanup(t.CloseIdleConnections)
	return &http.Client{Transport: t}
}

// forever connects without a deadline.
func (s *secured) forever() (net.Conn, error) {
	conn, err := s.connect("web.example", s.port)
	if err != nil {
		return nil, err
	}
	return conn, conn.SetDeadline(time.Time{})
}

func (s *secured) url(path string) string {
	return fmt.Sprintf("https://web.example:%d%s", s.port, path)
}

// TestTerminatedFraming: what can be read in two ways does not arrive.
func TestTerminatedFraming(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var arrived []string
	s := newSecured(t, true, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body) // broken ones are looked at by their path
		mu.Lock()
		defer mu.Unlock()
		arrived = append(arrived, r.URL.Path+" "+string(body))
	}))
	host := fmt.Sprintf("web.example:%d", s.port)
	for _, tt := range []struct{ name, sent string }{
		{"another host", "GET /bad HTTP/1.1\r\nHost: other.example\r\n\r\n"},
		{"another port", "GET /bad HTTP/1.1\r\nHost: web.example:1\r\n\r\n"},
		{"a final dot", "GET /bad HTTP/1.1\r\nHost: web.example.\r\n\r\n"},
		{"no host", "GET /bad HTTP/1.1\r\n\r\n"},
		{"two hosts", "GET /bad HTTP/1.1\r\nHost: " + host + "\r\nHost: " + host + "\r\n\r\n"},
		{"a user before the host", "GET /bad HTTP/1.1\r\nHost: x@" + host + "\r\n\r\n"},
		{"NUL in the host", "GET /bad HTTP/1.1\r\nHost: web.example\x00.other.example\r\n\r\n"},
		{"an IDN look-alike", "GET /bad HTTP/1.1\r\nHost: web.ex\u0430mple\r\n\r\n"},
		{"another target", "GET https://other.example/bad HTTP/1.1\r\nHost: " + host + "\r\n\r\n"},
		{"another scheme", "GET http://" + host + "/bad HTTP/1.1\r\nHost: " + host + "\r\n\r\n"},
		{"CONNECT", "CONNECT " + host + " HTTP/1.1\r\nHost: " + host + "\r\n\r\n"},
		{"two lengths", "POST /bad HTTP/1.1\r\nHost: " + host + "\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"},
		{"a signed length", "POST /bad HTTP/1.1\r\nHost: " + host + "\r\nContent-Length: +1\r\n\r\na"},
		{"an unknown encoding", "POST /bad HTTP/1.1\r\nHost: " + host + "\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"},
		{"an encoding twice", "POST /bad HTTP/1.1\r\nHost: " + host + "\r\nTransfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"},
		{"space before the colon", "POST /bad HTTP/1.1\r\nHost : " + host + "\r\n\r\n"},
		{"a folded field", "GET /bad HTTP/1.1\r\nHost: " + host + "\r\nX: a\r\n b\rGET /bad HTTP/1.1\r\n\r\n"},
		{"a bare CR", "GET /bad HTTP/1.1\r\nHost: " + host + "\rX: y\r\n\r\n"},
		{"NUL in a field", "GET /bad HTTP/1.1\r\nHost: " + host + "\r\nX: a\x00b\r\n\r\n"},
		{"NUL in the target", "GET /bad\x00 HTTP/1.1\r\nHost: " + host + "\r\n\r\n"},
		{"h2c", "GET /bad HTTP/1.1\r\nHost: " + host + "\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"},
		{"a WebSocket", "GET /bad HTTP/1.1\r\nHost: " + host + "\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"},
		{"HTTP/2 where HTTP/1 was agreed", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"},
		{"DNS over HTTPS", "GET /dns-query?dns=AAABAAABAAAAAAAA HTTP/1.1\r\nHost: " + host + "\r\nAccept: application/dns-message\r\n\r\n"},
		{"no HTTP", "\x00\x01\x02\x03\r\n\r\n"},
	} {
		conn, err := s.dial("http/1.1")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(conn, tt.sent); err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err == nil && resp.StatusCode < 400 {
			t.Errorf("%s: got %s", tt.name, resp.Status)
		}
		conn.Close()
	}
	conn, err := s.dial("http/1.1")
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "POST /good HTTP/1.1\r\nHost: %s\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\nPOST /bad HTTP/1.1\r\nHost: %s\r\nContent-Length: 40\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", host, host)
	_, _ = io.ReadAll(conn)
	s.close()
	mu.Lock()
	defer mu.Unlock()
	if len(arrived) != 1 || arrived[0] != "/good a" {
		t.Errorf("arrived: %q, want only /good", arrived)
	}
	for _, l := range s.lines {
		if l.Verdict == egress.Allowed && l.Request.Path != "/good" {
			t.Errorf("allowed: %+v", l)
		}
	}
}

// TestStreams: bodies pass both ways at once, with trailers, over HTTP/2, to
// destinations of both versions, and ninety at a time.
func TestStreams(t *testing.T) {
	t.Parallel()
	for _, h2 := range []bool{true, false} {
		s := newSecured(t, h2, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Trailer", "X-Sum")
			if !h2 {
				_ = http.NewResponseController(w).EnableFullDuplex() // HTTP/1 can, and Go's server by default does not
			}
			n, err := io.Copy(flushing{w}, r.Body)
			if err != nil {
				return
			}
			w.Header().Set("X-Sum", fmt.Sprint(n, r.Trailer.Get("X-Sent")))
		}))
		client := s.client(true)
		if err := converse(client, s.url("/"), "-"); err != nil { // so that there is a connection for all
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		for i := range 90 {
			wg.Go(func() {
				if err := converse(client, s.url("/"), fmt.Sprint("-", i)); err != nil {
					t.Errorf("HTTP/2 outside: %v: stream %d: %v", h2, i, err)
				}
			})
		}
		wg.Wait()
	}
}

type flushing struct{ http.ResponseWriter }

func (f flushing) Write(b []byte) (int, error) {
	n, err := f.ResponseWriter.Write(b)
	return n, errors.Join(err, http.NewResponseController(f.ResponseWriter).Flush())
}

// converse sends a word, waits for it to come back, and sends the next.
func converse(client *http.Client, url, trailer string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 3*patience)
	defer cancel()
	body, sent := io.Pipe()
	defer sent.Close()
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, body)
	if err != nil {
		return err
	}
	r.Trailer = http.Header{"X-Sent": nil}
	go func() { _, _ = sent.Write([]byte("first")) }() // ends with the request
	resp, err := client.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	got := make([]byte, 5)
	for _, word := range []string{"first", "again", "third"} {
		if word != "first" {
			if _, err := sent.Write([]byte(word)); err != nil {
				return err
			}
		}
		if _, err := io.ReadFull(resp.Body, got); err != nil || string(got) != word {
			return fmt.Errorf("got %q, want %q: %w", got, word, err)
		}
	}
	r.Trailer.Set("X-Sent", trailer)
	sent.Close()
	if rest, err := io.ReadAll(resp.Body); err != nil || len(rest) > 0 {
		return fmt.Errorf("at the end: got %q %w", rest, err)
	}
	if got := resp.Trailer.Get("X-Sum"); got != "15"+trailer {
		return fmt.Errorf("trailer %q, want %q", got, "15"+trailer)
	}
	return nil
}

// TestContinue: a body is sent when the destination wants it, and not before.
func TestContinue(t *testing.T) {
	t.Parallel()
	s := newSecured(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			w.WriteHeader(http.StatusRequestEntityTooLarge)
			return
		}
		n, _ := io.Copy(io.Discard, r.Body) // what breaks off is not counted
		fmt.Fprint(w, n)
	}))
	for path, want := range map[string]string{"/no": "HTTP/1.1 413", "/yes": "HTTP/1.1 100"} {
		conn, err := s.dial("http/1.1")
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "PUT %s HTTP/1.1\r\nHost: web.example:%d\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n", path, s.port)
		line, err := bufio.NewReader(conn).ReadString('\n')
		if err != nil || !strings.HasPrefix(line, want) {
			t.Errorf("%s: got %q %v, want %s", path, line, err, want)
		}
	}
}

// TestWebSocket: a real client and a real server talk, where the rule says so.
func TestWebSocket(t *testing.T) {
	t.Parallel()
	s := newSecured(t, true, websocket.Handler(func(c *websocket.Conn) { _, _ = io.Copy(c, c) }),
		egress.Request{Methods: []string{"GET"}, Path: "/ws", WebSocket: true}, egress.Request{Methods: []string{"GET"}, Path: "/other"})
	for path, good := range map[string]bool{"/ws": true, "/other": false} {
		conn, err := s.dial("http/1.1")
		if err != nil {
			t.Fatal(err)
		}
		config, err := websocket.NewConfig(strings.Replace(s.url(path), "https", "wss", 1), "https://web.example")
		if err != nil {
			t.Fatal(err)
		}
		ws, err := websocket.NewClient(config, conn)
		if (err == nil) != good {
			t.Errorf("%s: got %v, want it to work: %v", path, err, good)
		}
		if !good || err != nil {
			continue
		}
		for _, text := range append(slices.Repeat([]string{strings.Repeat("x", 1000)}, 100), "last") {
			var got string
			if err := errors.Join(websocket.Message.Send(ws, text), websocket.Message.Receive(ws, &got)); err != nil || got != text {
				t.Errorf("message of %d bytes: got %d, %v", len(text), len(got), err)
			}
		}
		ws.Close()
	}
	s.await("of the WebSocket's end", has(func(l egress.Line) bool {
		return l.Verdict == egress.Ended && l.Request.Status == 101 && l.Sent > 100_000 && l.Received > 100_000
	}))
}

// TestUntrusting: a program that does not trust the authority leaves a line that
// says so; a job that ends takes the authority with it.
func TestUntrusting(t *testing.T) {
	t.Parallel()
	s := newSecured(t, true, http.NotFoundHandler())
	s.pool = x509.NewCertPool()
	if _, err := s.dial(); err == nil {
		t.Error("a client that trusts nobody was content")
	}
	s.await("about trust", has(func(l egress.Line) bool {
		return l.Verdict == egress.Failed && strings.Contains(l.Reason, "/run/mayfly/ca.pem")
	}))
	s.close()
	if ca, err := s.gw.Authority("job"); err == nil {
		t.Errorf("after Close: got %q, want an error", ca)
	}
}

// TestBroken: an answer that breaks off does not look whole, whatever the
// version of the job's HTTP.
func TestBroken(t *testing.T) {
	t.Parallel()
	s := newSecured(t, true, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(bytes.Repeat([]byte("x"), 100))
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}))
	for _, h2 := range []bool{false, true} {
		resp, err := s.client(h2).Get(s.url("/"))
		if err != nil {
			continue // it broke before the header was read
		}
		if got, err := io.ReadAll(resp.Body); err == nil {
			t.Errorf("HTTP/2 %v: got %d bytes as a whole answer", h2, len(got))
		}
		resp.Body.Close()
	}
	conn, err := s.dial("http/1.1")
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "GET / HTTP/1.0\r\nHost: web.example:%d\r\n\r\n", s.port)
	if got, err := io.ReadAll(conn); err == nil {
		t.Errorf("HTTP/1.0, where the end of the connection is the end of the answer: got %q and a clean end", got)
	}
	s.await("of the break", has(func(l egress.Line) bool { return l.Verdict == egress.Ended && l.Reason != "" }))
}

// TestRefusedMidway: an answer that is refused while the body of its request is
// still being read breaks the request off.
func TestRefusedMidway(t *testing.T) {
	t.Parallel()
	s := newSecured(t, false, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = http.NewResponseController(w).EnableFullDuplex()
		_, _ = io.CopyN(io.Discard, r.Body, 1<<20)
		w.Header().Set("Content-Encoding", "gzip") // the mask would not see the credential in it
		_, _ = io.WriteString(w, "early")
		_ = http.NewResponseController(w).Flush()
		_, _ = io.Copy(io.Discard, r.Body) // until it breaks off
	}))
	s.give("lease", egress.Injection{As: egress.Bearer})
	for range 5 {
		conn, err := s.dial("http/1.1")
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: web.example:%d\r\nContent-Length: 1099511627776\r\n\r\n", s.port)
		if _, err := io.Copy(conn, zeros{}); err == nil {
			t.Error("the upload goes on without an answer")
		}
		conn.Close()
	}
	s.await("of the answer", has(func(l egress.Line) bool { return l.Verdict == egress.Ended && l.Reason != "" }))
}
