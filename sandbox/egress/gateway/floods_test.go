package gateway_test

import (
	"fmt"
	"io"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
)

// flooding opens a connection that has said its settings.
func (s *secured) flooding() *peer {
	s.tb.Helper()
	conn, err := s.dial("h2")
	if err != nil {
		s.tb.Fatal(err)
	}
	if _, err := io.WriteString(conn, http2.ClientPreface); err != nil {
		s.tb.Fatal(err)
	}
	p := &peer{Framer: http2.NewFramer(conn, conn), host: fmt.Sprintf("web.example:%d", s.port)}
	if err := p.WriteSettings(); err != nil {
		s.tb.Fatal(err)
	}
	return p
}

// TestWindow: a job that sends more than it may (6.9.1) is cut off. The ledger is
// held back, so that nobody reads what it sends.
func TestWindow(t *testing.T) {
	t.Parallel()
	s := newSecured(t, true, http.NotFoundHandler())
	free := make(chan struct{})
	s.mu.Lock()
	s.block = free
	s.mu.Unlock()
	defer close(free)
	p := s.flooding()
	said := make(chan http2.ErrCode, 1)
	go func() { // ends with the connection
		defer close(said)
		for {
			switch f, err := p.ReadFrame(); f := f.(type) {
			case *http2.GoAwayFrame:
				said <- f.ErrCode
				return
			case *http2.RSTStreamFrame:
				said <- f.ErrCode
				return
			default:
				if err != nil {
					return
				}
			}
		}
	}()
	err := p.open(1, false, p.good())
	for i := 0; err == nil && i < 1000; i++ { // 16 MB
		err = p.frame(http2.FrameData, 0, 1, make([]byte, 16<<10)...)
	}
	if got := <-said; got != http2.ErrCodeFlowControl {
		t.Errorf("got %s (sending ended with %v), want %s", got, err, http2.ErrCodeFlowControl)
	}
}

// TestResets: streams that are reset at once (10.5, rapid reset) leave nothing
// behind: a good request passes, and the box closes.
func TestResets(t *testing.T) {
	t.Parallel()
	var running atomic.Int64
	s := newSecured(t, true, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/bad" {
			running.Add(1)
			<-r.Context().Done()
			running.Add(-1)
		}
	}))
	p := s.flooding()
	go func() { // ends with the connection
		for {
			if _, err := p.ReadFrame(); err != nil {
				return
			}
		}
	}()
	for i := range uint32(3000) {
		if p.open(2*i+1, true, p.good()) != nil || p.WriteRSTStream(2*i+1, http2.ErrCodeCancel) != nil {
			break // the gateway has hung up, which it may
		}
	}
	resp, err := s.client(true).Get(s.url("/good"))
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	gone := func(when string) {
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for late := time.Now().Add(patience); running.Load() > 0; <-tick.C {
			if time.Now().After(late) {
				t.Fatalf("%d requests that were reset are at the destination %s", running.Load(), when)
			}
		}
	}
	gone("while the box lives")
	s.close()
	gone("after it")
}
