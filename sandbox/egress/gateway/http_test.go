package gateway_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
)

// exchange sends bytes to a name with an http rule, and returns how the job saw
// the connection end and what the destination got.
func exchange(t *testing.T, sent string, answer func(net.Conn, *http.Request)) (lines []egress.Line, requests []*http.Request, end error) {
	t.Helper()
	seen := make(chan *http.Request, 10)
	port := server(t, func(conn net.Conn) {
		r := bufio.NewReader(conn)
		for {
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			body, err := io.ReadAll(req.Body)
			if err != nil {
				return
			}
			req.Body = io.NopCloser(strings.NewReader(string(body)))
			seen <- req
			answer(conn, req)
		}
	})
	b := newBox(t, gateway.Config{}, egress.Rule{Name: "web.example", Port: port, Protocol: egress.HTTP})
	conn, err := b.connect("web.example", port)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, sent); err != nil {
		t.Fatal(err)
	}
	_, end = io.ReadAll(conn)
	conn.Close()
	b.close()
	close(seen)
	for r := range seen {
		requests = append(requests, r)
	}
	return b.lines, requests, end
}

func ok(conn net.Conn, _ *http.Request) {
	_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
}

// TestBrokenAnswer: an answer that breaks off ends in a reset, so that it is not
// taken for whole, and the ledger says so.
func TestBrokenAnswer(t *testing.T) {
	t.Parallel()
	lines, _, end := exchange(t, "GET / HTTP/1.0\r\nHost: web.example\r\n\r\n", func(conn net.Conn, _ *http.Request) {
		// Without a length the end of the connection is the end of the answer.
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhalf")
		_ = conn.(*net.TCPConn).SetLinger(0)
		conn.Close()
	})
	last := lines[len(lines)-1]
	if !errors.Is(end, syscall.ECONNRESET) || last.Reason == "" || len(lines) > 2 {
		t.Errorf("got end %v and lines %+v, want a reset and a reason", end, lines)
	}
}

// TestNoSockets: Attach without them is an error.
func TestNoSockets(t *testing.T) {
	t.Parallel()
	g, err := gateway.New(gateway.Config{})
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	if err := g.Open(ctx, "job", egress.Opening{Ledger: func(egress.Line) error { return nil }}); err != nil {
		t.Fatal(err)
	}
	if err := g.Attach(ctx, "job", egress.Sockets{}); err == nil {
		t.Error("Attach without sockets succeeded")
	}
	if err := g.Close(ctx, "job"); err != nil {
		t.Error(err)
	}
}
