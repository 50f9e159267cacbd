package gateway_test

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"
)

// BenchmarkTerminated is one download over TLS that ends at the gateway and
// begins anew, over TLS that does not, and how long a request takes on a
// connection of its own.
func BenchmarkTerminated(b *testing.B) {
	const size = 128 << 20
	block := make([]byte, 256<<10)
	s := newSecured(b, true, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/byte" {
			_, _ = w.Write(block[:1])
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(size)) // as files have it
		for range size / len(block) {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	}))
	for _, h2 := range []bool{false, true} {
		for _, way := range []struct {
			name string
			dial func() (net.Conn, error)
		}{
			{"gateway", s.forever},
			{"direct", func() (net.Conn, error) { return net.Dial("tcp", s.out.Listener.Addr().String()) }},
		} {
			client := func() *http.Client {
				t := &http.Transport{
					DialContext:       func(context.Context, string, string) (net.Conn, error) { return way.dial() },
					TLSClientConfig:   &tls.Config{InsecureSkipVerify: true}, // two authorities, and the figure is about neither
					ForceAttemptHTTP2: h2, DisableKeepAlives: true,
				}
				return &http.Client{Transport: t, Timeout: time.Minute}
			}
			for path, want := range map[string]int64{"/byte": 1, "/all": size} {
				b.Run(fmt.Sprintf("%s/h2=%v%s", way.name, h2, path), func(b *testing.B) {
					b.SetBytes(want)
					c := client()
					for b.Loop() {
						resp, err := c.Get(s.url(path))
						if err != nil {
							b.Fatal(err)
						}
						if n, err := io.Copy(io.Discard, resp.Body); err != nil || n != want {
							b.Fatalf("got %d bytes, %v", n, err)
						}
						resp.Body.Close()
					}
				})
			}
		}
	}
}
