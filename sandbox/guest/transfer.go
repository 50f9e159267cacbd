package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

// A transfer is a Put or a Get under way: what the reading goroutine knows of it.
type transfer struct {
	credit *wire.Credit  // of a Put; nil for a Get
	most   int64         // of a Get: bytes that may come
	data   []byte        // of a Get
	code   wire.Code     // valid when ended is closed
	text   string        // the same
	ended  chan struct{} // closed by receive
}

// receive takes a frame of the transfer. The caller holds Client.mu.
func (x *transfer) receive(t wire.Type, p []byte) (err error) {
	if isClosed(x.ended) {
		return fmt.Errorf("%w: type %d after the result", wire.ErrFrame, t)
	}
	switch {
	case t == wire.Result:
		if x.code, x.text, err = wire.ParseResult(p); err != nil {
			return fmt.Errorf("result: %w", err)
		}
		close(x.ended)
		return nil
	case t == wire.Grant && x.credit != nil:
		n, err := wire.ParseUint32(p)
		if err != nil || !x.credit.Add(n) {
			return fmt.Errorf("%w: grant of more than was sent", wire.ErrFrame)
		}
		return nil
	case t == wire.FileData && x.credit == nil:
		if int64(len(p)) > x.most-int64(len(x.data)) {
			return fmt.Errorf("%w: more than the %d bytes asked for", wire.ErrFrame, x.most)
		}
		x.data = append(x.data, p...)
		return nil
	}
	return fmt.Errorf("%w: type %d in this transfer", wire.ErrFrame, t)
}

// begin waits for the transfer before and makes x the one under way.
func (c *Client) begin(ctx context.Context, x *transfer) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	select {
	case c.lane <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.done:
		return c.Err()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		<-c.lane
		return c.err
	}
	c.transfer = x
	return nil
}

// end makes room for the next transfer.
func (c *Client) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.transfer = nil
	<-c.lane
}

// await waits for the result of x. When ctx ends first, or cause is not nil
// already, it cancels x and waits, not longer than the guest's time to answer,
// so that the stream can be used again.
func (c *Client) await(ctx context.Context, x *transfer, cause error) error {
	if cause == nil {
		select {
		case <-x.ended:
			return x.result()
		case <-c.done:
			return c.Err()
		case <-ctx.Done():
			cause = context.Cause(ctx)
		}
	}
	if err := c.send(wire.AppendHeader(nil, wire.Cancel, 0)); err != nil {
		return errors.Join(cause, err)
	}
	timer := time.NewTimer(c.wait)
	defer timer.Stop()
	select {
	case <-x.ended:
		return cause
	case <-timer.C:
		c.kill(fmt.Errorf("the guest has not answered for %v", c.wait))
	case <-c.done:
	}
	return errors.Join(cause, c.Err())
}

// result turns what the guest said into an error. Its words are quoted: they
// may be anything.
func (x *transfer) result() error {
	switch x.code {
	case wire.OK:
		return nil
	case wire.NotExist:
		return fmt.Errorf("%w: %s", fs.ErrNotExist, strconv.Quote(x.text))
	case wire.Refused:
		return fmt.Errorf("%w: %s", ErrRefused, strconv.Quote(x.text))
	case wire.Failed, wire.Canceled:
	}
	return fmt.Errorf("guest: %s", strconv.Quote(x.text))
}

// checkPath refuses what the guest would refuse, before a byte is sent.
func checkPath(name string) error {
	switch {
	case !path.IsAbs(name):
		return errors.New("path is not absolute")
	case len(name) > wire.MaxPath:
		return fmt.Errorf("path has more than %d bytes", wire.MaxPath)
	case strings.Contains(name, "\x00"):
		return errors.New("path contains a zero byte")
	}
	return nil
}

// Put implements sandbox.Sandbox. dir is made if it is missing and no part of
// it may be a link. A file or link that stands where an entry goes is replaced.
// Owners are not restored, set-id bits are dropped, devices and FIFOs refused.
// A stream that is refused is ErrRefused; what came before the bad entry stays.
func (c *Client) Put(ctx context.Context, dir string, tar io.Reader) error {
	err := checkPath(dir)
	if err == nil {
		err = c.put(ctx, dir, tar)
	}
	if err != nil {
		return fmt.Errorf("put below %s: %w", dir, err)
	}
	return nil
}

func (c *Client) put(ctx context.Context, dir string, tar io.Reader) error {
	x := &transfer{credit: wire.NewCredit(), ended: make(chan struct{})}
	if err := c.begin(ctx, x); err != nil {
		return err
	}
	defer c.end()

	// A small Put is one write: what is put is put behind the PutOpen.
	b := make([]byte, 0, len(dir)+3*wire.HeaderSize+wire.MaxData)
	b = wire.AppendFrame(b, wire.PutOpen, dir)
	for opened := false; ; opened = true {
		at := len(b)
		n, err := fill(tar, b[at+wire.HeaderSize:at+wire.HeaderSize+wire.MaxData])
		if n > 0 {
			wire.PutHeader(b[at:cap(b)], wire.PutData, n)
			b = b[:at+wire.HeaderSize+n]
			if paid := c.pay(ctx, x, wire.HeaderSize+n); !paid && !opened {
				return errors.Join(context.Cause(ctx), c.Err())
			} else if !paid {
				return c.await(ctx, x, nil)
			}
		}
		if err == io.EOF {
			b = wire.AppendHeader(b, wire.PutEnd, 0)
		}
		if sendErr := c.send(b); sendErr != nil {
			return sendErr
		}
		switch err {
		case nil:
			b = b[:0]
		case io.EOF:
			return c.await(ctx, x, nil)
		default:
			return c.await(ctx, x, fmt.Errorf("tar: %w", err))
		}
	}
}

// pay takes credit for n bytes. It reports false if there is no point in sending
// them: ctx has ended, the guest is dead or has given its result already.
func (c *Client) pay(ctx context.Context, x *transfer, n int) (paid bool) {
	for ctx.Err() == nil && !isClosed(x.ended) && !isClosed(c.done) {
		if x.credit.Try(n) {
			return true
		}
		select {
		case <-x.credit.Wake():
		case <-x.ended:
		case <-ctx.Done():
		case <-c.done:
		}
	}
	return false
}

// maxEmptyReads is how often a reader may return nothing and no error.
const maxEmptyReads = 100

// fill reads until b is full or r ends. Other than io.ReadFull it keeps an
// io.ErrUnexpectedEOF of r itself, a cut archive, apart from the end of r.
func fill(r io.Reader, b []byte) (n int, err error) {
	for empty := 0; n < len(b) && err == nil; {
		var more int
		more, err = r.Read(b[n:])
		n += more
		if more > 0 {
			empty = 0
		} else if empty++; err == nil && empty == maxEmptyReads {
			err = io.ErrNoProgress
		}
	}
	return n, err
}

// Get implements sandbox.Sandbox. A path of which any part is a link, anything
// but a regular file, and a file with more than limit bytes is ErrRefused.
func (c *Client) Get(ctx context.Context, name string, limit int64) ([]byte, error) {
	err := checkPath(name)
	if err == nil && limit < 0 {
		err = fmt.Errorf("limit of %d bytes", limit)
	}
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", name, err)
	}
	x := &transfer{most: limit, ended: make(chan struct{})}
	if err := c.get(ctx, name, x); err != nil {
		return nil, fmt.Errorf("get %s: %w", name, err)
	}
	return x.data, nil
}

func (c *Client) get(ctx context.Context, name string, x *transfer) error {
	if err := c.begin(ctx, x); err != nil {
		return err
	}
	defer c.end()
	if err := c.send(wire.AppendGet(nil, name, uint64(x.most))); err != nil {
		return err
	}
	return c.await(ctx, x, nil)
}
