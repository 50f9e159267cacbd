package gateway

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"testing"
)

// A text is a connection from which something comes, a few bytes at a time.
type text struct {
	net.Conn
	r    io.Reader
	most int
}

func (t text) Read(p []byte) (int, error) { return t.r.Read(p[:min(len(p), t.most)]) }

// heads reads a connection to its end and says where messages began.
func heads(sent []byte, most int, answers bool) (got []byte, starts map[int]bool) {
	f := newFramed(text{r: bytes.NewReader(sent), most: most}, answers)
	f.bodily.Store(true)
	starts = map[int]bool{}
	p := make([]byte, 1)
	for {
		if f.state == atBegin && len(f.out) == 0 {
			starts[len(got)] = true
		}
		n, err := f.Read(p)
		got = append(got, p[:n]...)
		if err != nil {
			return got, starts
		}
	}
}

// FuzzFraming: what passes is what was sent, however it came in, and net/http
// finds the ends of messages where the gateway does.
func FuzzFraming(f *testing.F) {
	for _, s := range []string{
		"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabcGET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n0\r\nX: y\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
		"GET / HTTP/1.0\r\nX:\n y\r\n\r\n", "HTTP/1.1 100\r\n\r\nHTTP/1.1 200 OK\nContent-Length: 1\n\nxHTTP/1.1 200 OK\r\n\r\nrest",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\nHTTP/1.1 204\r\n\r\n",
		"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nxHTTP/1.1 200 OK\r\n\r\n",
		"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nxHTTP/1.1 200 OK\r\n\r\n",
	} {
		f.Add([]byte(s), uint8(3))
	}
	f.Fuzz(func(t *testing.T, sent []byte, most uint8) {
		for _, answers := range []bool{false, true} {
			got, starts := heads(sent, 1<<20, answers)
			if again, _ := heads(sent, int(most)+1, answers); !bytes.Equal(got, again) || !bytes.HasPrefix(sent, got) {
				t.Fatalf("answers %v: got %q and %q of %q", answers, got, again, sent)
			}
			all := bytes.NewReader(got)
			r := bufio.NewReader(all)
			for {
				var b io.ReadCloser
				if answers {
					resp, err := http.ReadResponse(r, nil)
					if err != nil || resp.StatusCode == http.StatusSwitchingProtocols {
						break
					}
					b = resp.Body
				} else {
					req, err := http.ReadRequest(r)
					if err != nil || req.ProtoMajor != 1 { // the server refuses others
						break
					}
					b = req.Body
				}
				if _, err := io.Copy(io.Discard, b); err != nil {
					break
				}
				if at := len(got) - all.Len() - r.Buffered(); !starts[at] && at < len(got) {
					t.Fatalf("answers %v: net/http is at %d of %q, the gateway knows %v", answers, at, got, starts)
				}
			}
		}
	})
}

// TestRelease: what came before a connection became something else is not lost,
// and not told twice.
func TestRelease(t *testing.T) {
	t.Parallel()
	const head, rest = "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "\x81\x01early"
	f := newFramed(text{r: bytes.NewReader([]byte(head + rest)), most: 1000}, false)
	got := make([]byte, len(head)+1)
	if _, err := io.ReadFull(f, got); err != nil || string(got) != head+rest[:1] {
		t.Fatalf("got %q, %v", got, err)
	}
	f.release()
	if b, err := io.ReadAll(f); err != nil || string(b) != rest[1:] {
		t.Errorf("then got %q, %v", b, err)
	}
}
