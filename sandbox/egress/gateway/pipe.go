package gateway

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// chunk is what is moved between two looks at the clock. A peer that takes less
// than this in the idle time counts as idle: a kilobyte a second by default.
const chunk = 1 << 20

// A pipe passes bytes between the job and the destination, both ways. The
// kernel moves them (splice) if both are TCP connections.
type pipe struct {
	job, up        net.Conn
	idle           time.Duration
	moved          atomic.Int64 // when bytes last moved, in Unix nanoseconds
	sent, received int64        // after run
	once           sync.Once
	err            error // why it was aborted
}

func newPipe(job, up net.Conn, idle time.Duration) *pipe {
	p := &pipe{job: job, up: up, idle: idle}
	p.moved.Store(time.Now().UnixNano())
	return p
}

// abort resets both ends. The first reason counts.
func (p *pipe) abort(why error) {
	p.once.Do(func() {
		p.err = why
		reset(p.job)
		reset(p.up)
	})
}

// run returns when both directions have ended, each with its half-close passed
// on, or when one has failed, which resets both. first is sent before all else.
func (p *pipe) run(first []byte) error {
	var wg sync.WaitGroup
	wg.Go(func() { p.received = p.half(p.job, p.up) })
	if len(first) > 0 {
		if _, err := p.up.Write(first); err != nil {
			p.abort(cause(err))
		}
	}
	p.sent = int64(len(first)) + p.half(p.up, p.job)
	wg.Wait()
	p.once.Do(func() {}) // from here on nothing is aborted, and err is settled
	return p.err
}

// half passes one direction until it ends.
func (p *pipe) half(dst, src net.Conn) (total int64) {
	for {
		start := time.Now()
		// Setting a deadline fails only on a closed connection, as the copy
		// then does.
		_ = src.SetReadDeadline(start.Add(p.idle / 3))
		_ = dst.SetWriteDeadline(start.Add(p.idle))
		n, err := io.CopyN(dst, src, chunk)
		total += n
		if n > 0 {
			p.moved.Store(time.Now().UnixNano())
		}
		switch {
		case err == nil:
		case errors.Is(err, io.EOF):
			w, ok := dst.(interface{ CloseWrite() error })
			if !ok {
				p.abort(errors.New("the destination's connection cannot be half-closed"))
			} else if err := w.CloseWrite(); err != nil {
				p.abort(cause(err))
			}
			return total
		case !errors.Is(err, os.ErrDeadlineExceeded):
			p.abort(cause(err))
			return total
		case time.Since(start) >= p.idle, time.Since(time.Unix(0, p.moved.Load())) >= p.idle:
			// A write that stalled, whose bytes are lost, or quiet both ways.
			p.abort(errors.New("no byte moved for " + p.idle.String()))
			return total
		}
	}
}

// cause is what the ledger says of a broken connection. Which side broke it is
// not known when the kernel moves the bytes.
func cause(err error) error {
	if errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ENOTCONN) {
		return errors.New("reset by the job or the destination")
	}
	return err
}
