package gateway

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
)

// A meter counts bytes and stops at its limit.
type meter struct {
	n     atomic.Int64
	limit int64 // 0: none
}

// add counts n more bytes, or says that they are too many.
func (m *meter) add(n int) error {
	if sum := m.n.Add(int64(n)); m.limit > 0 && sum > m.limit {
		return &refusal{reason: fmt.Sprintf("more than the %d bytes that the rule allows", m.limit)}
	}
	return nil
}

// counted counts the bytes of a request's body.
type counted struct {
	io.ReadCloser
	meter
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.ReadCloser.Read(b)
	if over := c.add(n); over != nil {
		return 0, over
	}
	return n, err
}

// answered counts the bytes of an answer's body.
type answered struct {
	http.ResponseWriter
	meter
	sent   *counted // of a connection that has become something else
	status int
	err    error  // why there is no answer
	scrub  *scrub // nil: nothing is to be hidden
	opaque bool   // the body is not for the scrub
	whole  bool
}

func (a *answered) Write(b []byte) (int, error) {
	if err := a.add(len(b)); err != nil {
		a.err = err
		return 0, err
	}
	if a.scrub != nil && !a.opaque {
		return a.scrub.body.Write(b)
	}
	return a.ResponseWriter.Write(b)
}

// Unwrap is for http.ResponseController.
func (a *answered) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// Hijack implements http.Hijacker.
func (a *answered) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(a.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	if f, ok := conn.(*framed); ok {
		f.release()
	}
	return &tunnel{Conn: conn, sent: &a.sent.meter, received: &a.meter}, rw, nil
}

// A tunnel is a connection that has become a WebSocket.
type tunnel struct {
	net.Conn
	sent, received *meter
}

func (t *tunnel) Read(b []byte) (int, error) {
	n, err := t.Conn.Read(b)
	if over := t.sent.add(n); over != nil {
		return 0, over
	}
	return n, err
}

func (t *tunnel) Write(b []byte) (int, error) {
	if err := t.received.add(len(b)); err != nil {
		return 0, err
	}
	return t.Conn.Write(b)
}

// bufferSize is what is moved at once: four TLS records.
const bufferSize = 64 << 10

// buffers are the memory through which bodies pass.
type buffers struct{ pool sync.Pool }

func newBuffers() *buffers {
	return &buffers{sync.Pool{New: func() any { return new([bufferSize]byte) }}}
}

// Get implements httputil.BufferPool.
func (p *buffers) Get() []byte {
	b, ok := p.pool.Get().(*[bufferSize]byte)
	if !ok {
		return make([]byte, bufferSize)
	}
	return b[:]
}

// Put implements httputil.BufferPool.
func (p *buffers) Put(b []byte) {
	if len(b) == bufferSize {
		p.pool.Put((*[bufferSize]byte)(b))
	}
}
