package gateway

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync/atomic"
)

// A framed is a connection of HTTP/1 whose framing is judged before net/http
// parses it, which drops what it does not believe: a length beside chunks, say.
// A head that can be read in two ways is not passed on: of it the reader gets the
// first bytes, so that it knows that something came, and then an error. Bodies
// pass as they come.
type framed struct {
	net.Conn
	answers bool                   // they are answers, and not requests
	bodily  atomic.Bool            // the next answer may have a body: it is not one to HEAD
	odd     atomic.Pointer[string] // why something was not passed on

	out   []byte // judged, and not read yet
	in    []byte // not judged yet; a part of store
	store []byte
	state part
	left  int64 // of a body, or of a chunk
	seen  int   // bytes of in that end no head
	told  int   // bytes of a head in in that were handed out
	err   error
}

// A part is what comes next on the connection.
type part int

const (
	atBegin     part = iota // nothing of a head came
	inHead                  // a head
	inBody                  // a number of bytes
	atSize                  // the line before a chunk
	inChunk                 // its bytes
	behindChunk             // the line end after it
	inTrailer               // the fields after the last one
	unframed                // whatever comes
)

const (
	// firstRead is what is read at once of a head.
	firstRead = 4 << 10
	// firstBytes of a head are handed out as they come: net/http waits for as many
	// on an idle connection, and gives the head its own time then. No head that is
	// passed on is as short.
	firstBytes = 4
	// sizeLine bounds the line before a chunk, as net/http does.
	sizeLine = 4 << 10
)

func newFramed(conn net.Conn, answers bool) *framed {
	return &framed{Conn: conn, answers: answers}
}

// why says why something was not passed on, or nothing.
func (f *framed) why() string {
	if f != nil {
		if odd := f.odd.Load(); odd != nil {
			return *odd
		}
	}
	return ""
}

// NetConn is the connection below.
func (f *framed) NetConn() net.Conn { return f.Conn }

// CloseWrite ends what is sent, if the connection below can.
func (f *framed) CloseWrite() error {
	if half, ok := f.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// release ends the judging: the connection has become something else. Nobody may
// be reading, as is so after a request without a body.
func (f *framed) release() {
	if f.state == inHead {
		f.in = f.in[f.told:]
	}
	f.state = unframed
}

func (f *framed) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return f.Conn.Read(p)
	}
	for len(f.out) == 0 {
		switch {
		case f.err != nil:
			return 0, f.err
		case len(f.in) == 0 && (f.state == inBody || f.state == inChunk || f.state == unframed):
			return f.pass(p)
		case f.judge():
		default:
			if err := f.fill(); err != nil {
				return 0, err
			}
		}
	}
	n := copy(p, f.out)
	f.out = f.out[n:]
	return n, nil
}

// pass reads what needs no look.
func (f *framed) pass(p []byte) (int, error) {
	if f.state != unframed && int64(len(p)) > f.left {
		p = p[:f.left]
	}
	n, err := f.Conn.Read(p)
	f.moved(n)
	return n, err
}

// moved counts bytes of a body or a chunk.
func (f *framed) moved(n int) {
	if f.state == unframed {
		return
	}
	if f.left -= int64(n); f.left > 0 {
		return
	}
	if f.state == inBody {
		f.state = atBegin
	} else {
		f.state = behindChunk
	}
}

// fill reads more behind what is not judged yet.
func (f *framed) fill() error {
	if cap(f.store) == 0 {
		f.store = make([]byte, 0, firstRead)
	}
	f.store = append(f.store[:0], f.in...)
	f.store = slices.Grow(f.store, 1)
	n, err := f.Conn.Read(f.store[len(f.store):cap(f.store)])
	f.in = f.store[:len(f.store)+n]
	if n > 0 {
		return nil // an error comes again
	}
	return err
}

// take hands the next n bytes out, but for those that were handed out already.
func (f *framed) take(n int, next part) bool {
	f.out, f.in, f.state, f.seen, f.told = f.in[f.told:n], f.in[n:], next, 0, 0
	return true
}

// refuse hands nothing more out.
func (f *framed) refuse(format string, args ...any) bool {
	what := "request"
	if f.answers {
		what = "answer"
	}
	why := fmt.Sprintf("the "+what+" can be read in two ways: "+format, args...)
	f.err = errors.New(why)
	f.odd.Store(&why)
	return true
}

// judge looks at what has come. It is false if more is needed.
func (f *framed) judge() bool {
	if len(f.in) == 0 {
		return false
	}
	switch f.state {
	case atBegin:
		f.state = inHead
		return true
	case inHead:
		if n := min(len(f.in), firstBytes); f.told < n {
			f.out, f.told = f.in[f.told:n], n // they stay in the buffer
			return true
		}
		return f.judgeHead()
	case atSize:
		return f.judgeSize()
	case behindChunk:
		return f.judgeBehind()
	case inTrailer:
		return f.judgeTrailer()
	}
	n := len(f.in)
	if f.state != unframed {
		n = int(min(int64(n), f.left))
	}
	f.out, f.in = f.in[:n], f.in[n:]
	f.moved(n)
	return true
}

// ends finds the end of a block of lines: an empty line, whatever ends lines.
func (f *framed) ends() (n int, ok bool) {
	for i := f.seen; i < len(f.in); i++ {
		if f.in[i] != '\n' {
			continue
		}
		rest := f.in[i+1:]
		switch {
		case len(rest) > 0 && rest[0] == '\n':
			return i + 2, true
		case len(rest) > 1 && rest[0] == '\r' && rest[1] == '\n':
			return i + 3, true
		}
	}
	f.seen = max(len(f.in)-2, 0)
	return 0, false
}

func (f *framed) judgeHead() bool {
	n, ok := f.ends()
	if !ok {
		if len(f.in) > headerLimit {
			return f.refuse("its head has more than %d bytes", headerLimit)
		}
		return false
	}
	how, why := readHead(f.in[:n], f.answers)
	if why != "" {
		return f.refuse("%s", why)
	}
	next := atBegin
	switch {
	case f.answers && how.status == 101:
		next = unframed
	case f.answers && (how.status < 200 || how.status == 204 || how.status == 304 || !f.bodily.Load()):
	case how.chunked:
		next = atSize
	case how.length > 0:
		f.left, next = how.length, inBody
	case how.length < 0 && f.answers:
		next = unframed // to the end of the connection
	}
	return f.take(n, next)
}

func (f *framed) judgeSize() bool {
	i := bytes.IndexByte(f.in, '\n')
	if i < 0 && len(f.in) <= sizeLine {
		return false
	}
	if i < 1 || f.in[i-1] != '\r' || bytes.IndexByte(f.in[:i-1], '\r') >= 0 {
		return f.refuse("a chunk has no size, or a line in it does not end in CR LF")
	}
	digits, _, _ := bytes.Cut(f.in[:i-1], []byte(";"))
	digits = bytes.TrimRight(digits, " \t")
	left, ok := hexadecimal(digits)
	if !ok {
		return f.refuse("a chunk has the size %q", printable(string(digits)))
	}
	if f.left = left; left == 0 {
		return f.take(i+1, inTrailer)
	}
	return f.take(i+1, inChunk)
}

// hexadecimal is the size of a chunk, of at most 2^60 bytes.
func hexadecimal(digits []byte) (n int64, ok bool) {
	for _, c := range digits {
		switch {
		case c >= '0' && c <= '9':
			n = n<<4 | int64(c-'0')
		case c|0x20 >= 'a' && c|0x20 <= 'f':
			n = n<<4 | int64(c|0x20-'a'+10)
		default:
			return 0, false
		}
	}
	return n, len(digits) > 0 && len(digits) <= 15
}

func (f *framed) judgeBehind() bool {
	if len(f.in) < 2 && f.in[0] == '\r' {
		return false
	}
	if f.in[0] != '\r' || f.in[1] != '\n' {
		return f.refuse("a chunk is longer than its size")
	}
	return f.take(2, atSize)
}

func (f *framed) judgeTrailer() bool {
	if f.in[0] == '\r' && len(f.in) < 2 {
		return false
	}
	if f.in[0] == '\r' && f.in[1] == '\n' {
		return f.take(2, atBegin)
	}
	n, ok := f.ends()
	if !ok {
		if len(f.in) > headerLimit {
			return f.refuse("its trailer has more than %d bytes", headerLimit)
		}
		return false
	}
	var how framing
	for line := range bytes.Lines(f.in[:n]) {
		text, ok := ended(line, f.answers)
		if !ok {
			return f.refuse("a line of its trailer does not end in CR LF")
		}
		if len(text) > 0 {
			if why := how.field(text, f.answers); why != "" {
				return f.refuse("%s", why)
			}
		}
	}
	if how.lengths+how.encodings+how.hosts > 0 {
		return f.refuse("its trailer frames it")
	}
	return f.take(n, atBegin)
}
