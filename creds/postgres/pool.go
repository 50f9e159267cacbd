package postgres

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/jackc/pgx/v5"
)

// poolSize bounds the administrator's connections in use, and those kept.
// Enough for the jobs that one agent ends at the same time, few enough that
// the server, which has about 100 for everybody, does not notice.
const poolSize = 4

// A pool keeps connections of the administrator to any database of a server.
// The driver's own pool knows one database only.
type pool struct {
	connect func(ctx context.Context, database string) (*pgx.Conn, error)
	slots   chan struct{} // one token per connection in use

	mu     sync.Mutex
	idle   []*pgx.Conn // oldest first
	closed bool
}

func newPool(connect func(context.Context, string) (*pgx.Conn, error)) *pool {
	return &pool{connect: connect, slots: make(chan struct{}, poolSize)}
}

// with lends a connection that answers to do. One that do leaves broken or in
// a transaction is closed, which undoes the transaction.
func (p *pool) with(ctx context.Context, database string, do func(*pgx.Conn) error) error {
	select {
	case p.slots <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("wait for a connection: %w", context.Cause(ctx))
	}
	defer func() { <-p.slots }()
	conn, err := p.take(ctx, database)
	if err != nil {
		return err
	}
	defer p.put(ctx, conn)
	return do(conn)
}

func (p *pool) take(ctx context.Context, database string) (*pgx.Conn, error) {
	for {
		conn, err := p.kept(database)
		if err != nil {
			return nil, err
		}
		if conn == nil {
			return p.connect(ctx, database)
		}
		if err := conn.Ping(ctx); err == nil {
			return conn, nil
		}
		// The server ended it while nobody looked.
		_ = conn.Close(ctx)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
}

// kept returns the connection to database that was used last, or nil.
func (p *pool) kept(database string) (*pgx.Conn, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, errors.New("issuer closed")
	}
	for n, conn := range slices.Backward(p.idle) {
		if conn.Config().Database == database {
			p.idle = slices.Delete(p.idle, n, n+1)
			return conn, nil
		}
	}
	return nil, nil
}

// put keeps conn for later, in place of the oldest if there are enough. That a
// connection does not close well is nobody's problem any more.
func (p *pool) put(ctx context.Context, conn *pgx.Conn) {
	if conn.IsClosed() {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || conn.PgConn().TxStatus() != 'I' {
		_ = conn.Close(ctx)
		return
	}
	p.idle = append(p.idle, conn)
	if len(p.idle) > poolSize {
		_ = p.idle[0].Close(ctx)
		p.idle = slices.Delete(p.idle, 0, 1)
	}
}

// close ends the kept connections now and those in use when they come back.
func (p *pool) close() {
	ctx, cancel := context.WithTimeout(context.Background(), connectTimeout)
	defer cancel()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, conn := range p.idle {
		_ = conn.Close(ctx)
	}
	p.idle = nil
}
