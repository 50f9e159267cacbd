package outbound

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mayfly-ci/mayfly/runner/audit"
)

// A counted connection is written down when it ends.
type counted struct {
	net.Conn
	exit           *Exit
	line           line
	began          time.Time
	sent, received atomic.Int64
	once           sync.Once
}

// RemoteAddr is the server's, or the name that the proxy was told.
func (c *counted) RemoteAddr() net.Addr {
	if c.line.via != "" {
		return Named(c.line.address)
	}
	return c.Conn.RemoteAddr()
}

// Named is the address of what a proxy was asked for: HOST:PORT.
type Named string

// Network implements net.Addr.
func (Named) Network() string { return "proxied" }

// String implements net.Addr.
func (n Named) String() string { return string(n) }

// Read implements net.Conn.
func (c *counted) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.received.Add(int64(n))
	return n, err
}

// Write implements net.Conn.
func (c *counted) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.sent.Add(int64(n))
	return n, err
}

// CloseWrite says that nothing more is sent.
func (c *counted) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// Close implements net.Conn. It returns an error if the line cannot be written.
func (c *counted) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		m := moved{c.sent.Load(), c.received.Load(), time.Since(c.began)}
		err = errors.Join(err, c.exit.way.book.write(context.Background(), c.line, m, c.exit.folds))
	})
	return err
}

// A recorder writes down the requests of one transport.
type recorder struct {
	exit *Exit
	next *http.Transport
}

// RoundTrip implements http.RoundTripper. The line is written when the answer
// was read, and before its reader hears that it ends.
func (r *recorder) RoundTrip(req *http.Request) (*http.Response, error) {
	began, ctx := time.Now(), req.Context()
	l := line{action: actionRequest, job: audit.JobOf(ctx), component: r.exit.component, address: hostPort(req), method: req.Method}
	if shape := r.exit.way.cfg.Shape; shape != nil {
		l.path = shape(req.URL.EscapedPath())
	}
	sent := max(req.ContentLength, 0)
	res, err := r.next.RoundTrip(req)
	if err != nil {
		l.result = failure(ctx, err)
		return nil, errors.Join(err, r.exit.way.book.write(ctx, l, moved{sent: sent, took: time.Since(began)}, r.exit.folds))
	}
	l.status = res.StatusCode
	end := func(received int64) error {
		return r.exit.way.book.write(ctx, l, moved{sent, received, time.Since(began)}, r.exit.folds)
	}
	if res.StatusCode == http.StatusSwitchingProtocols { // what follows is no answer
		if err := end(0); err != nil {
			return nil, errors.Join(err, res.Body.Close())
		}
		return res, nil
	}
	res.Body = &answer{ReadCloser: res.Body, end: end}
	return res, nil
}

// An answer is written down when it was read to its end, or is closed.
type answer struct {
	io.ReadCloser
	end      func(received int64) error
	received int64
	once     sync.Once
	err      error // of the line
}

func (a *answer) finish() error {
	a.once.Do(func() { a.err = a.end(a.received) })
	return a.err
}

// Read implements io.Reader. It does not end if the line cannot be written.
func (a *answer) Read(b []byte) (int, error) {
	n, err := a.ReadCloser.Read(b)
	if a.received += int64(n); err != nil {
		if werr := a.finish(); werr != nil {
			err = werr
		}
	}
	return n, err
}

// Close implements io.Closer.
func (a *answer) Close() error { return errors.Join(a.ReadCloser.Close(), a.finish()) }

// CloseIdleConnections is what http.Client calls.
func (r *recorder) CloseIdleConnections() { r.next.CloseIdleConnections() }

func hostPort(req *http.Request) string {
	port := req.URL.Port()
	if port == "" && req.URL.Scheme == "http" {
		port = "80"
	} else if port == "" {
		port = "443"
	}
	return net.JoinHostPort(req.URL.Hostname(), port)
}

// failure is reason of a request: what a server sent that is no HTTP stands in
// errors of net/http, and is not repeated.
func failure(ctx context.Context, err error) string {
	var network net.Error
	if bad := (*tls.CertificateVerificationError)(nil); errors.As(err, &bad) {
		return "certificate: " + bad.Err.Error()
	}
	if away := (*proxyError)(nil); errors.As(err, &away) || errors.As(err, &network) || ctx.Err() != nil || errors.Is(err, io.EOF) {
		return reason(ctx, err)
	}
	return "no connection, or no answer that is HTTP"
}
