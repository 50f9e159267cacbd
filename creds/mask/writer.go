package mask

import (
	"fmt"
	"io"

	"github.com/mayfly-ci/mayfly/creds"
)

// pieceLen is how many bytes a Writer searches at once, so that its memory does
// not grow with the writes. It is what a pipe holds.
const pieceLen = 64 << 10

// A Writer masks a stream. It holds back only the bytes that may be the
// beginning of a secret, always fewer than the longest needle has, and sends
// all others on before Write returns. Its buffers are bounded by a small
// multiple of that and of 64 KiB, whatever is written. It is not safe for
// concurrent use, and prints as [creds.Placeholder].
type Writer struct {
	// state is a function because the held bytes may be secret, and fmt
	// follows a pointer to a struct where a verb does not fit.
	state func() *state
}

type state struct {
	dst     func([]byte) error
	set     *Set
	buf     []byte // held back; during a Write, the new bytes as well
	covered int    // bytes of buf that belong to an occurrence begun before it
	inside  bool   // the last byte that left was masked
	out     []byte // scratch
	spans   []span // scratch
}

// NewWriter returns a Writer that sends what it masked with set to dst, at most
// once for each 64 KiB written and never with an empty slice. dst must not keep
// the slice.
func NewWriter(dst func([]byte) error, set *Set) *Writer {
	s := &state{dst: dst, set: set}
	return &Writer{func() *state { return s }}
}

// Write implements io.Writer. An error is dst's: the n bytes are taken, those
// that dst was given are not given to it again, and the Writer can go on.
func (w *Writer) Write(p []byte) (n int, err error) {
	s := w.state()
	for n < len(p) && err == nil {
		piece := p[n:min(n+pieceLen, len(p))]
		n += len(piece)
		s.buf = append(s.buf, piece...)
		err = s.send(s.set.matcher().open(s.buf))
	}
	return n, err
}

// Flush ends the stream, as at the end of a step: it sends what is held back,
// and nothing written later can complete a secret begun before. Half a secret
// is shown then, so do not flush between two writes of one stream.
func (w *Writer) Flush() error {
	s := w.state()
	err := s.send(len(s.buf))
	s.inside = false
	return err
}

// Use masks with set from here on. Bytes that are held back are judged by set
// too; those that it does not hold back are sent, so an error is dst's.
func (w *Writer) Use(set *Set) error {
	s := w.state()
	s.set = set
	return s.send(set.matcher().open(s.buf))
}

// Format implements fmt.Formatter, for all verbs.
func (Writer) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, creds.Placeholder) }

// MarshalText implements encoding.TextMarshaler, which JSON and YAML honour.
func (Writer) MarshalText() ([]byte, error) { return []byte(creds.Placeholder), nil }

// send masks buf and gives the first end bytes of it away.
func (s *state) send(end int) error {
	if end == 0 {
		return nil
	}
	s.spans = s.set.matcher().scan(s.buf, s.spans[:0])
	if s.covered > 0 {
		s.spans = add(s.spans, span{0, s.covered})
	}
	s.spans = merge(s.spans)
	s.covered = 0
	n := 0 // spans that begin in what is sent
	for n < len(s.spans) && s.spans[n].start < end {
		if over := s.spans[n].end - end; over > 0 {
			s.covered, s.spans[n].end = over, end
		}
		n++
	}
	out := s.buf[:end]
	if n == 0 {
		s.inside = false
	} else {
		s.out, s.inside = render(s.out[:0], out, s.spans[:n], s.inside)
		out = s.out
	}
	var err error
	if len(out) > 0 { // not inside of a run
		err = s.dst(out)
	}
	s.buf = s.buf[:copy(s.buf, s.buf[end:])]
	return err
}

// render appends b to out with Text for each of its spans, which are sorted
// and apart. inside says whether the byte before b was masked; the result says
// it of the last byte of b.
func render(out, b []byte, spans []span, inside bool) ([]byte, bool) {
	at := 0
	for _, s := range spans {
		out = append(out, b[at:s.start]...)
		if s.start > 0 || !inside {
			out = append(out, Text...)
		}
		at = s.end
	}
	return append(out, b[at:]...), at == len(b)
}
