package sigv4

import (
	"bufio"
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

const (
	// MaxChunk bounds the data of one signed chunk, which are held until all of
	// them are verified. Clients take 64 KiB to 1 MiB.
	MaxChunk = 1 << 20
	// maxLine is more than the header of a chunk, or a line of a trailer, has.
	maxLine = 1 << 10
	// maxTrailer bounds the lines of a trailer: one checksum, and a signature.
	maxTrailer = 16
)

// A chain is the signatures of chunks, of which each covers the one before.
type chain struct {
	key   []byte
	scope string // and the date before it
	last  string // in hexadecimal
}

// chain begins with the signature of the request.
func (s *Signature) chain(secret string) chain {
	return chain{s.key(secret), s.at.Format(stamp) + "\n" + s.scope(), hex.EncodeToString(s.value)}
}

func (c *chain) chunk(data []byte) string {
	return c.sign(fmt.Sprintf("%s-PAYLOAD\n%s\n%s\n%s\n%x", algorithm, c.scope, c.last, emptySum(), sha256.Sum256(data)))
}

func (c *chain) trailer(lines []byte) string {
	return c.sign(fmt.Sprintf("%s-TRAILER\n%s\n%s\n%x", algorithm, c.scope, c.last, sha256.Sum256(lines)))
}

func (c *chain) sign(text string) string {
	c.last = hex.EncodeToString(mac(c.key, text))
	return c.last
}

// chunks is a body of signed chunks, of which each is verified under one chain
// and signed under another. Its length stays the same.
type chunks struct {
	in       *bufio.Reader
	body     io.Closer
	from, to chain
	trailer  bool // the signatures end with one of a trailer
	ready    bytes.Buffer
	err      error // what follows what is ready
}

func newChunks(body io.ReadCloser, from, to chain, trailer bool) *chunks {
	return &chunks{in: bufio.NewReaderSize(body, 32<<10), body: body, from: from, to: to, trailer: trailer}
}

// Close closes the body.
func (c *chunks) Close() error { return c.body.Close() }

// Read gives what was verified and signed anew.
func (c *chunks) Read(p []byte) (int, error) {
	for c.ready.Len() == 0 {
		if c.err != nil {
			return 0, c.err
		}
		c.ready.Reset()
		if c.err = c.next(); c.err != nil && !errors.Is(c.err, io.EOF) {
			c.ready.Reset() // nothing of a chunk that is not good
		}
	}
	return c.ready.Read(p)
}

var errChunk = errors.New("a signed chunk of the body is malformed")

// next makes one chunk ready, and returns io.EOF behind the last.
func (c *chunks) next() error {
	line, err := c.line()
	if err != nil {
		return err
	}
	size, signature, ok := strings.Cut(strings.TrimSuffix(line, "\r\n"), ";chunk-signature=")
	n, err := strconv.ParseUint(size, 16, 32)
	switch {
	case !ok || err != nil || !strings.HasSuffix(line, "\r\n"):
		return errChunk
	case n > MaxChunk:
		return fmt.Errorf("a signed chunk has %d bytes, at most %d are carried", n, MaxChunk)
	}
	var data bytes.Buffer
	if _, err := io.CopyN(&data, c.in, int64(n)); err != nil {
		return cutOff(err)
	}
	if !same(c.from.chunk(data.Bytes()), signature) {
		return errors.New("a chunk of the body is not signed with the key that the job has")
	}
	fmt.Fprintf(&c.ready, "%s;chunk-signature=%s\r\n", size, c.to.chunk(data.Bytes()))
	if n == 0 && c.trailer {
		return c.end()
	}
	c.ready.Write(data.Bytes())
	end, err := c.line()
	if err != nil || end != "\r\n" {
		return errors.Join(errChunk, err)
	}
	c.ready.WriteString(end)
	if n > 0 {
		return nil
	}
	return c.over()
}

// end makes the trailer ready: fields, their signature, an empty line.
func (c *chunks) end() error {
	var signed bytes.Buffer
	for range maxTrailer {
		line, err := c.line()
		if err != nil {
			return err
		}
		text := strings.TrimRight(line, "\r\n")
		name, value, ok := strings.Cut(text, ":")
		switch {
		case text == "": // some clients end the fields so
			c.ready.WriteString(line)
		case !ok:
			return errChunk
		case strings.EqualFold(name, "x-amz-trailer-signature"):
			if !same(c.from.trailer(signed.Bytes()), strings.TrimSpace(value)) {
				return errors.New("the trailer of the body is not signed with the key that the job has")
			}
			fmt.Fprintf(&c.ready, "%s:%s%s", name, c.to.trailer(signed.Bytes()), line[len(text):])
			return c.last()
		default:
			fmt.Fprintf(&signed, "%s:%s\n", strings.ToLower(name), strings.TrimSpace(value))
			c.ready.WriteString(line)
		}
	}
	return errChunk
}

// last takes the empty line behind the signature of a trailer, if there is one.
func (c *chunks) last() error {
	line, err := c.line()
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF) && line == "":
		return io.EOF
	case err != nil || line != "\r\n":
		return errors.Join(errChunk, err)
	}
	c.ready.WriteString(line)
	return c.over()
}

// over wants nothing behind the last chunk: it would not be signed.
func (c *chunks) over() error {
	if _, err := c.in.ReadByte(); err == nil {
		return errors.New("the body goes on behind its last signed chunk")
	} else if !errors.Is(err, io.EOF) {
		return err
	}
	return io.EOF
}

// line reads one with its end.
func (c *chunks) line() (string, error) {
	var b []byte
	for len(b) < maxLine {
		ch, err := c.in.ReadByte()
		if err != nil {
			return string(b), cutOff(err)
		}
		if b = append(b, ch); ch == '\n' {
			return string(b), nil
		}
	}
	return "", errChunk
}

func cutOff(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// same compares two signatures in a time that tells nothing.
func same(want, got string) bool { return hmac.Equal([]byte(want), []byte(got)) }
