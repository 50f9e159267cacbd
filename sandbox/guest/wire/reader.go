package wire

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
)

// readerSize holds the largest frame but a Start, which then needs no copy.
const readerSize = HeaderSize + StampSize + MaxData

// A Reader takes frames off a stream. It never holds more than one Start and
// one buffer of other frames, whatever the lengths on the stream claim.
type Reader struct {
	buf  *bufio.Reader
	from Side
	used int // bytes of buf that the last frame still occupies
}

// NewReader returns a reader of what the side named from sends.
func NewReader(r io.Reader, from Side) *Reader {
	return &Reader{buf: bufio.NewReaderSize(r, readerSize), from: from}
}

// Next returns the next frame; the payload is valid until the next call. It
// returns io.EOF at a clean end, io.ErrUnexpectedEOF inside a frame and ErrFrame
// for a type or a length that the sender may not use.
func (r *Reader) Next() (Type, []byte, error) {
	if _, err := r.buf.Discard(r.used); err != nil {
		return 0, nil, err
	}
	r.used = 0
	head, err := r.buf.Peek(HeaderSize)
	if err != nil {
		if err == io.EOF && len(head) > 0 {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	t, n := Type(head[0]), binary.BigEndian.Uint32(head[1:])
	most := limit(r.from, t)
	if most < 0 {
		return 0, nil, fmt.Errorf("%w: unknown type %d", ErrFrame, t)
	}
	if n > uint32(most) {
		return 0, nil, fmt.Errorf("%w: %d bytes in a frame of type %d", ErrFrame, n, t)
	}
	size := HeaderSize + int(n)
	if size > readerSize {
		return r.large(t, size)
	}
	frame, err := r.buf.Peek(size)
	if err != nil {
		return 0, nil, inside(err)
	}
	r.used = size
	return t, frame[HeaderSize:], nil
}

// large reads a frame that does not fit the buffer. Memory grows with what
// arrives and not with what the header claims.
func (r *Reader) large(t Type, size int) (Type, []byte, error) {
	if _, err := r.buf.Discard(HeaderSize); err != nil {
		return 0, nil, err
	}
	payload, err := io.ReadAll(io.LimitReader(r.buf, int64(size-HeaderSize)))
	if err != nil {
		return 0, nil, err
	}
	if len(payload) < size-HeaderSize {
		return 0, nil, io.ErrUnexpectedEOF
	}
	return t, payload, nil
}

// inside turns an end of the stream into one that is not clean.
func inside(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
