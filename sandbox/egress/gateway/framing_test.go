package gateway_test

import (
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// A message is what a job sends, or what it is answered.
type message struct {
	name, text string
	line       string // in the ledger; "": an answer that passes
}

// badRequests are those that can be read in two ways, after a first that is good.
// H is the host.
func badRequests() []message {
	const post, chunked = "POST /bad HTTP/1.1\nHost: H\n", "Transfer-Encoding: chunked\n\n0\n\n"
	return []message{
		{"length and chunks", post + "Content-Length: 5\n" + chunked, "Content-Length stands beside"},
		{"chunks and length", post + "Transfer-Encoding: chunked\nContent-Length: 5\n\n0\n\n", "Content-Length stands beside"},
		{"the same length twice", post + "Content-Length: 3\nContent-Length: 3\n\nabc", "Content-Length is given twice"},
		{"two lengths", post + "Content-Length: 1\nContent-Length: 3\n\nabc", "Content-Length is given twice"},
		{"two lengths in one", post + "Content-Length: 3, 3\n\nabc", "Content-Length is"},
		{"a signed length", post + "Content-Length: +3\n\nabc", "Content-Length is"},
		{"a length in hexadecimal", post + "Content-Length: 0x3\n\nabc", "Content-Length is"},
		{"a length too long", post + "Content-Length: 99999999999999999999\n\nabc", "Content-Length is"},
		{"an empty length", post + "Content-Length:\n\nabc", "Content-Length is"},
		{"a length by another name", post + "Content_Length: 3\n\nabc", "Content_Length is"},
		{"an unknown encoding", post + "Transfer-Encoding: xchunked\n\n0\n\n", "Transfer-Encoding is"},
		{"two encodings", post + "Transfer-Encoding: gzip, chunked\n\n0\n\n", "Transfer-Encoding is"},
		{"an encoding twice", post + "Transfer-Encoding: chunked\nTransfer-Encoding: identity\n\n0\n\n", "Transfer-Encoding is"},
		{"the same encoding twice", post + "Transfer-Encoding: chunked\n" + chunked, "Transfer-Encoding is given twice"},
		{"an encoding with a vertical tab", post + "Transfer-Encoding: \x0bchunked\n\n0\n\n", "control character"},
		{"an encoding by another name", post + "Transfer_Encoding: chunked\n\n0\n\n", "Transfer_Encoding is"},
		{"an encoding in HTTP/1.0", "POST /bad HTTP/1.0\nHost: H\n" + chunked, "stands in HTTP/1.0"},
		{"space before the colon", post + "Content-Length : 3\n\nabc", "a field is called"},
		{"an encoding on a folded line", post + "Transfer-Encoding:\n chunked\n\n0\n\n", "Transfer-Encoding is"},
		{"a folded field", post + "X: a\n b\n\n", "folded"},
		{"a folded first field", "GET /bad HTTP/1.1\n Host: H\n\n", "folded"},
		{"no colon", post + "Content-Length 3\n\n", "a field is called"},
		{"no name", post + ": x\n\n", "a field is called"},
		{"NUL in a field", post + "X: a\x00b\n\n", "control character"},
		{"NUL in a name", post + "X\x00: b\n\n", "a field is called"},
		{"NUL in the target", "GET /bad\x00 HTTP/1.1\nHost: H\n\n", "control character"},
		{"a bare CR in a field", post + "X: y\rGET /b HTTP/1.1\n\n", "control character"},
		{"bare LF", "GET /bad HTTP/1.1\vHost: H\v\v", "does not end in CR LF"},
		{"one bare LF", "GET /bad HTTP/1.1\nHost: H\vX: y\n\n", "does not end in CR LF"},
		{"two hosts", "GET /bad HTTP/1.1\nHost: H\nHost: H\n\n", "Host is given twice"},
		{"another host", "GET /bad HTTP/1.1\nHost: other.example\n\n", "the request is for host"},
		{"a final dot", "GET /bad HTTP/1.1\nHost: web.example.\n\n", "the request is for host"},
		{"a whole URL of another scheme", "GET https://H/bad HTTP/1.1\nHost: H\n\n", "target is not one"},
		{"a whole URL and another host", "GET http://H/bad HTTP/1.1\nHost: other.example\n\n", "another host than Host"},
		{"a whole URL of another host", "GET http://other.example/bad HTTP/1.1\nHost: H\n\n", "another host than Host"},
		{"a whole URL of another port", "GET http://H:81/bad HTTP/1.1\nHost: H:80\n\n", "another host than Host"},
		{"CONNECT", "CONNECT H:80 HTTP/1.1\nHost: H\n\n", "CONNECT"},
		{"h2c", "GET /bad HTTP/1.1\nHost: H\nConnection: Upgrade, HTTP2-Settings\nUpgrade: h2c\nHTTP2-Settings: AAMAAABkAAQAAP__\n\n", "upgrade"},
		{"two blanks", "GET  /bad HTTP/1.1\nHost: H\n\n", "first line"},
		{"an empty line before", "\nGET /bad HTTP/1.1\nHost: H\n\n", "first line"},
		{"no version", "GET /bad\nHost: H\n\n", "first line"},
		{"a chunk without a size", post + "Transfer-Encoding: chunked\n\n;x\nabc\n0\n\n", "a chunk has the size"},
		{"a chunk longer than its size", post + "Transfer-Encoding: chunked\n\n1\nabc\n0\n\n", "a chunk is longer than its size"},
		{"a size with a sign", post + "Transfer-Encoding: chunked\n\n+1\na\n0\n\n", "a chunk has the size"},
		{"a size that ends in LF", post + "Transfer-Encoding: chunked\n\n1\va\n0\n\n", "a chunk has no size"},
		{"a chunk that ends in LF", post + "Transfer-Encoding: chunked\n\n1\na\v0\n\n", "a chunk is longer than its size"},
		{"a trailer that frames", post + "Transfer-Encoding: chunked\n\n1\na\n0\nContent-Length: 4\n\n", "its trailer frames it"},
		{"a trailer with a host", post + "Transfer-Encoding: chunked\n\n1\na\n0\nHost: H\n\n", "its trailer frames it"},
	}
}

// wire writes "\n" as CR LF and "\v" as LF, but where a row needs a tab.
func wire(text string) string {
	text = strings.NewReplacer(": \x0b", ": \x0b", "\n", "\r\n", "\v", "\n").Replace(text)
	return strings.ReplaceAll(text, "Host: H", "Host: web.example")
}

// TestOneFraming: what could be read in two ways is refused, and said in the
// ledger; what cannot arrives in one.
func TestOneFraming(t *testing.T) {
	t.Parallel()
	for _, tt := range badRequests() {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			first := wire("POST /good HTTP/1.1\nHost: H\nContent-Length: 3\n\nabc")
			lines, requests, _ := exchange(t, first+strings.ReplaceAll(wire(tt.text), "://H", "://web.example"), ok)
			for _, r := range requests {
				if body, _ := io.ReadAll(r.Body); r.URL.Path == "/bad" || string(body) != "abc" {
					t.Errorf("%s %s arrived with %q", r.Method, r.URL, body)
				}
			}
			reasons := ""
			for _, l := range lines {
				reasons += string(l.Verdict) + " " + l.Reason + "\n"
			}
			if tt.line != "" && !strings.Contains(reasons, tt.line) || strings.Count(reasons, "ended") == 0 {
				t.Errorf("the ledger says\n%swant %q", reasons, tt.line)
			}
		})
	}
	for _, tt := range []struct{ name, sent, body string }{
		{"chunks with extensions", "POST /a HTTP/1.1\nHost: H\nConnection: close\nTransfer-Encoding: Chunked\n\n3;x=y\nabc\n0\nX: y\n\n", "abc"},
		{"a length", "POST /a HTTP/1.1\nhost:H\nConnection: close\ncontent-length:\t3 \n\nabc", "abc"},
		{"HTTP/1.0", "GET /a HTTP/1.0\nHost: H\n\n", ""},
		{"two at once", "POST /a HTTP/1.1\nHost: H\nTransfer-Encoding: chunked\n\n1\na\n0\n\nPOST /a HTTP/1.1\nHost: H\nConnection: close\nContent-Length: 1\n\na", "a"},
	} {
		lines, requests, _ := exchange(t, strings.ReplaceAll(wire(tt.sent), "host:H", "host:web.example"), ok)
		if len(requests) != 1+strings.Count(tt.name, "two") || slices.ContainsFunc(lines, func(l egress.Line) bool { return l.Verdict == egress.Refused }) {
			t.Errorf("%s: %d requests arrived, lines %+v", tt.name, len(requests), lines)
		}
		for _, r := range requests {
			if body, _ := io.ReadAll(r.Body); string(body) != tt.body || r.Host != "web.example" || r.ContentLength > 0 && len(r.TransferEncoding) > 0 {
				t.Errorf("%s: the destination got %+v with body %q, want body %q", tt.name, r, body, tt.body)
			}
		}
	}
}

// TestOneFramingOfAnswers: the same of what the destination says. The job gets a
// reset, or the answer whole.
func TestOneFramingOfAnswers(t *testing.T) {
	t.Parallel()
	for _, tt := range []message{
		{"a length", "HTTP/1.1 200 OK\nContent-Length: 4\n\ngood", ""},
		{"chunks", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n4;x\ngood\n0\n\n", ""},
		{"lines that end in LF", "HTTP/1.1 200 OK\vContent-Length: 4\v\vgood", ""},
		{"an early answer", "HTTP/1.1 103 Early Hints\nLink: </x>\n\nHTTP/1.1 200\nContent-Length: 4\n\ngood", ""},
		{"the rest of the connection", "HTTP/1.0 200 OK\n\ngood", ""},
		{"length and chunks", "HTTP/1.1 200 OK\nContent-Length: 4\nTransfer-Encoding: chunked\n\n3\nbad\n0\n\n", "Content-Length stands beside"},
		{"two lengths", "HTTP/1.1 200 OK\nContent-Length: 3\nContent-Length: 4\n\nbad!", "Content-Length is given twice"},
		{"the same length twice", "HTTP/1.1 200 OK\nContent-Length: 3\nContent-Length: 3\n\nbad", "Content-Length is given twice"},
		{"an unknown encoding", "HTTP/1.1 200 OK\nTransfer-Encoding: xchunked\n\n3\nbad\n0\n\n", "Transfer-Encoding is"},
		{"an encoding in HTTP/1.0", "HTTP/1.0 200 OK\nTransfer-Encoding: chunked\n\n3\nbad\n0\n\n", "stands in HTTP/1.0"},
		{"a folded field", "HTTP/1.1 200 OK\nX: a\n b\nContent-Length: 3\n\nbad", "folded"},
		{"NUL", "HTTP/1.1 200 OK\nX: a\x00\nContent-Length: 3\n\nbad", "control character"},
		{"no status", "HTTP/1.1 OK\nContent-Length: 3\n\nbad", "first line"},
		{"a chunk longer than its size", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n1\nbad\n0\n\n", "longer than its size"},
		{"a trailer that frames", "HTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n3\nbad\n0\nContent-Length: 9\n\n", "its trailer frames it"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			lines, requests, _ := exchange(t, wire("GET / HTTP/1.1\nHost: H\nConnection: close\n\n"), func(conn net.Conn, _ *http.Request) {
				_, _ = io.WriteString(conn, wire(tt.text)) // the gateway may have hung up
				if strings.Contains(tt.text, "1.0") {
					conn.Close()
				}
			})
			last := lines[len(lines)-1]
			if len(requests) == 0 || last.Verdict != egress.Ended || !strings.Contains(last.Reason, tt.line) || (last.Reason == "") != (tt.line == "") || tt.line == "" && last.Received != 4 {
				t.Errorf("got %+v, want %q", last, tt.line)
			}
		})
	}
}

// TestFramingOfHead: what an answer to HEAD says of a body is of none, and what
// comes next is judged as an answer.
func TestFramingOfHead(t *testing.T) {
	t.Parallel()
	for _, says := range []string{"Content-Length: 5", "Transfer-Encoding: chunked"} {
		for _, next := range []message{
			{"good", "HTTP/1.1 200 OK\nContent-Length: 4\n\ngood", ""},
			{"bad", "HTTP/1.1 200 OK\nContent-Length: 3\nContent-Length: 4\n\nbad!", "Content-Length is given twice"},
		} {
			conns := map[net.Conn]bool{}
			lines, requests, _ := exchange(t, wire("HEAD /a HTTP/1.1\nHost: H\n\nGET /b HTTP/1.1\nHost: H\nConnection: close\n\n"), func(conn net.Conn, r *http.Request) {
				conns[conn] = true
				text := next.text
				if r.Method == http.MethodHead {
					text = "HTTP/1.1 200 OK\n" + says + "\n\n"
				}
				_, _ = io.WriteString(conn, wire(text)) // the gateway may have hung up
			})
			last := lines[len(lines)-1]
			if len(requests) != 2 || len(conns) != 1 || last.Verdict != egress.Ended || (last.Reason == "") != (next.line == "") || !strings.Contains(last.Reason, next.line) || next.line == "" && last.Received != 4 {
				t.Errorf("%s, and then a %s one: %d requests on %d connections, %+v", says, next.name, len(requests), len(conns), last)
			}
		}
	}
}
