package gateway_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// A peer is the job's end of an HTTP/2 connection, which keeps to no rule.
type peer struct {
	*http2.Framer
	host string
}

// block is a header block; pairs are name and value.
func block(pairs ...string) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for i := 0; i+1 < len(pairs); i += 2 {
		_ = e.WriteField(hpack.HeaderField{Name: pairs[i], Value: pairs[i+1]}) // into memory
	}
	return b.Bytes()
}

// good are the fields of a request that is refused for other reasons.
func (p *peer) good(more ...string) []byte {
	return block(append([]string{":method", "POST", ":scheme", "https", ":path", "/bad", ":authority", p.host}, more...)...)
}

// open begins a request of these fields.
func (p *peer) open(stream uint32, end bool, fields []byte) error {
	p.AllowIllegalWrites = true
	return p.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: fields, EndHeaders: true, EndStream: end})
}

// frame writes any frame at all.
func (p *peer) frame(kind http2.FrameType, flags http2.Flags, stream uint32, payload ...byte) error {
	return p.WriteRawFrame(kind, flags, stream, payload)
}

// An offence is what RFC 9113 says must be an error of the stream or the
// connection.
type offence struct {
	name string // with the section
	do   func(p *peer) error
}

func offences() []offence {
	return slices.Concat(frameOffences(), streamOffences(), boundOffences(), requestOffences())
}

// frameOffences are those of sections 3 to 6.
func frameOffences() []offence {
	return []offence{
		{"3.4 a wrong preface", nil},
		{"4.2 a frame that is too large", func(p *peer) error { return p.frame(http2.FrameData, 0, 1, make([]byte, 1<<20+1)...) }},
		{"4.3 a header block that is none", func(p *peer) error { return p.open(1, true, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}) }},
		{"5.1 DATA on an idle stream", func(p *peer) error { return p.WriteData(1, true, []byte("x")) }},
		{"5.1 WINDOW_UPDATE on an idle stream", func(p *peer) error { return p.WriteWindowUpdate(1, 1) }},
		{"5.1 HEADERS behind the end of a stream", func(p *peer) error {
			return errors.Join(p.open(1, true, p.good("x", "y")), p.open(1, true, p.good()))
		}},
		{"5.1.1 an even stream", func(p *peer) error { return p.open(2, true, p.good()) }},
		{"5.1.1 a stream below another", func(p *peer) error {
			return errors.Join(p.open(7, true, block(":method", "GET", ":scheme", "https", ":path", "/other", ":authority", "other.example")), p.open(3, true, p.good()))
		}},
		{"5.3.1 a stream that depends on itself", func(p *peer) error {
			return p.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: p.good(), EndHeaders: true, EndStream: true, Priority: http2.PriorityParam{StreamDep: 1}})
		}},
		{"6.1 DATA on stream 0", func(p *peer) error { return p.frame(http2.FrameData, 0, 0, 'x') }},
		{"6.1 more padding than frame", func(p *peer) error {
			return errors.Join(p.open(1, false, p.good()), p.frame(http2.FrameData, http2.FlagDataPadded, 1, 9, 'x'))
		}},
		{"6.2 HEADERS on stream 0", func(p *peer) error { return p.frame(http2.FrameHeaders, http2.FlagHeadersEndHeaders, 0, p.good()...) }},
		{"6.3 PRIORITY on stream 0", func(p *peer) error { return p.frame(http2.FramePriority, 0, 0, 0, 0, 0, 1, 1) }},
		{"6.3 PRIORITY of another length", func(p *peer) error { return p.frame(http2.FramePriority, 0, 1, 0) }},
		{"6.4 RST_STREAM on stream 0", func(p *peer) error { return p.frame(http2.FrameRSTStream, 0, 0, 0, 0, 0, 1) }},
		{"6.4 RST_STREAM on an idle stream", func(p *peer) error { return p.frame(http2.FrameRSTStream, 0, 1, 0, 0, 0, 1) }},
		{"6.4 RST_STREAM of another length", func(p *peer) error { return p.frame(http2.FrameRSTStream, 0, 1, 0) }},
		{"6.5 SETTINGS on a stream", func(p *peer) error { return p.frame(http2.FrameSettings, 0, 1) }},
		{"6.5 SETTINGS of another length", func(p *peer) error { return p.frame(http2.FrameSettings, 0, 0, 1, 2, 3) }},
		{"6.5 an acknowledgement that says something", func(p *peer) error {
			return p.frame(http2.FrameSettings, http2.FlagSettingsAck, 0, 0, 3, 0, 0, 0, 1)
		}},
		{"6.5.2 ENABLE_PUSH of 2", func(p *peer) error { return p.frame(http2.FrameSettings, 0, 0, 0, 2, 0, 0, 0, 2) }},
		{"6.5.2 a window above 2^31-1", func(p *peer) error { return p.frame(http2.FrameSettings, 0, 0, 0, 4, 0xff, 0xff, 0xff, 0xff) }},
		{"6.5.2 frames below 16384", func(p *peer) error { return p.frame(http2.FrameSettings, 0, 0, 0, 5, 0, 0, 0, 1) }},
		{"6.6 PUSH_PROMISE of a client", func(p *peer) error {
			return p.frame(http2.FramePushPromise, http2.FlagPushPromiseEndHeaders, 1, append([]byte{0, 0, 0, 2}, p.good()...)...)
		}},
		{"6.7 PING on a stream", func(p *peer) error { return p.frame(http2.FramePing, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8) }},
		{"6.7 PING of another length", func(p *peer) error { return p.frame(http2.FramePing, 0, 0, 1) }},
		{"6.8 GOAWAY on a stream", func(p *peer) error { return p.frame(http2.FrameGoAway, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0) }},
		{"6.9 WINDOW_UPDATE of 0", func(p *peer) error { return p.frame(http2.FrameWindowUpdate, 0, 0, 0, 0, 0, 0) }},
		{"6.9 WINDOW_UPDATE of another length", func(p *peer) error { return p.frame(http2.FrameWindowUpdate, 0, 0, 1) }},
		{"6.9.1 a window of the connection above 2^31-1", func(p *peer) error { return p.frame(http2.FrameWindowUpdate, 0, 0, 0x7f, 0xff, 0xff, 0xff) }},
		{"6.9.1 a window of a stream above 2^31-1", func(p *peer) error {
			return errors.Join(p.open(1, false, p.good()), p.frame(http2.FrameWindowUpdate, 0, 1, 0x7f, 0xff, 0xff, 0xff))
		}},
		{"6.10 CONTINUATION of nothing", func(p *peer) error {
			return p.frame(http2.FrameContinuation, http2.FlagContinuationEndHeaders, 1, p.good()...)
		}},
		{"6.10 another frame inside a header block", func(p *peer) error {
			return errors.Join(p.frame(http2.FrameHeaders, 0, 1, p.good()...), p.frame(http2.FramePing, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8))
		}},
	}
}

// streamOffences are those of what is closed, or half of it, and of what came
// before or around.
func streamOffences() []offence {
	return []offence{
		{"5.1 DATA behind the end of a stream", func(p *peer) error {
			return errors.Join(p.open(1, true, p.good("x", "y")), p.frame(http2.FrameData, 0, 1, 'x'))
		}},
		{"5.1 DATA on a stream that was reset", func(p *peer) error {
			return errors.Join(p.open(1, false, p.good()), p.WriteRSTStream(1, http2.ErrCodeCancel), p.frame(http2.FrameData, http2.FlagDataEndStream, 1, 'x'))
		}},
		{"5.1 HEADERS on a stream that was reset", func(p *peer) error {
			return errors.Join(p.open(1, false, p.good()), p.WriteRSTStream(1, http2.ErrCodeCancel), p.open(1, true, p.good()))
		}},
		{"5.1 DATA on a stream that was passed over", func(p *peer) error {
			return errors.Join(p.open(3, true, p.good("x", "y")), p.frame(http2.FrameData, http2.FlagDataEndStream, 1, 'x'))
		}},
		{"5.1.1 HEADERS on stream 2^31-1, and one more", func(p *peer) error {
			return errors.Join(p.open(1<<31-1, true, p.good("x", "y")), p.open(1<<31-1, true, p.good()))
		}},
		{"5.1.2 more streams than there may be", func(p *peer) error {
			var errs []error
			for i := range uint32(150) {
				errs = append(errs, p.open(2*i+1, false, p.good()))
			}
			return errors.Join(errs...)
		}},
		{"6.1 DATA that should say how it is padded", func(p *peer) error {
			return errors.Join(p.open(1, false, p.good()), p.frame(http2.FrameData, http2.FlagDataPadded, 1))
		}},
		{"6.2 HEADERS with more padding than frame", func(p *peer) error {
			return p.frame(http2.FrameHeaders, http2.FlagHeadersPadded|http2.FlagHeadersEndHeaders|http2.FlagHeadersEndStream, 1, append([]byte{255}, p.good()...)...)
		}},
		{"6.2 HEADERS that should say how they are padded", func(p *peer) error {
			return p.frame(http2.FrameHeaders, http2.FlagHeadersPadded|http2.FlagHeadersEndHeaders|http2.FlagHeadersEndStream, 1)
		}},
		{"6.2 HEADERS that should have a priority", func(p *peer) error {
			return p.frame(http2.FrameHeaders, http2.FlagHeadersPriority|http2.FlagHeadersEndHeaders|http2.FlagHeadersEndStream, 1, 0, 0)
		}},
		{"6.6 PUSH_PROMISE on stream 0", func(p *peer) error {
			return p.frame(http2.FramePushPromise, http2.FlagPushPromiseEndHeaders, 0, 0, 0, 0, 2)
		}},
		{"6.8 GOAWAY of another length", func(p *peer) error { return p.frame(http2.FrameGoAway, 0, 0, 1, 2, 3) }},
		{"6.9 WINDOW_UPDATE of 0 on a stream", func(p *peer) error {
			return errors.Join(p.open(1, false, p.good()), p.frame(http2.FrameWindowUpdate, 0, 1, 0, 0, 0, 0))
		}},
		{"6.9.2 a window that the settings make too large", func(p *peer) error {
			return errors.Join(p.open(1, false, p.good()), p.WriteWindowUpdate(1, 1<<31-1-65535), p.frame(http2.FrameSettings, 0, 0, 0, 4, 0x7f, 0xff, 0xff, 0xff))
		}},
		{"6.10 CONTINUATION on stream 0", func(p *peer) error {
			return errors.Join(p.frame(http2.FrameHeaders, 0, 1, p.good()...), p.frame(http2.FrameContinuation, http2.FlagContinuationEndHeaders, 0))
		}},
		{"6.10 CONTINUATION of another stream", func(p *peer) error {
			return errors.Join(p.frame(http2.FrameHeaders, http2.FlagHeadersEndStream, 1, p.good()...), p.frame(http2.FrameContinuation, http2.FlagContinuationEndHeaders, 3))
		}},
		{"6.10 HEADERS inside a header block", func(p *peer) error {
			return errors.Join(p.frame(http2.FrameHeaders, 0, 1, p.good()...), p.open(3, true, p.good()))
		}},
	}
}

// boundOffences are those that are too much (section 10.5).
func boundOffences() []offence {
	return []offence{
		{"6.5.2 frames above 2^24-1", func(p *peer) error { return p.frame(http2.FrameSettings, 0, 0, 0, 5, 1, 0, 0, 0) }},
		{"10.5.1 fields without end", func(p *peer) error {
			if err := p.frame(http2.FrameHeaders, http2.FlagHeadersEndStream, 1, p.good()...); err != nil {
				return err
			}
			for range 11 {
				if err := p.frame(http2.FrameContinuation, 0, 1, block("x", strings.Repeat("\x7f", 15_000))...); err != nil {
					return err
				}
			}
			return p.frame(http2.FrameContinuation, http2.FlagContinuationEndHeaders, 1)
		}},
		{"10.5.1 CONTINUATION without end", func(p *peer) error {
			if err := p.frame(http2.FrameHeaders, http2.FlagHeadersEndStream, 1, p.good()...); err != nil {
				return err
			}
			more := block("x", strings.Repeat("y", 15_000))
			for range 5000 { // 75 MB, if nobody minds
				if err := p.frame(http2.FrameContinuation, 0, 1, more...); err != nil {
					return err
				}
			}
			return nil
		}},
		{"10.5.1 a field that is repeated by its number", func(p *peer) error {
			var b bytes.Buffer
			e := hpack.NewEncoder(&b)
			_ = e.WriteField(hpack.HeaderField{Name: "x", Value: strings.Repeat("y", 3900)}) // into memory
			return p.open(1, true, slices.Concat(p.good(), b.Bytes(), bytes.Repeat([]byte{0xbe}, 10_000)))
		}},
		{"7541 4.2 a table of fields that is too large", func(p *peer) error { return p.open(1, true, append([]byte{0x3f, 0xe1, 0xff, 0xff, 0x03}, p.good()...)) }},
		{"7541 2.3.3 a field of a number that there is not", func(p *peer) error { return p.open(1, true, append([]byte{0xff, 0x7f}, p.good()...)) }},
	}
}

// requestOffences are those of section 8.
func requestOffences() []offence {
	return []offence{
		{"8.1.1 less body than its length", func(p *peer) error {
			return errors.Join(p.open(1, false, p.good("content-length", "5")), p.WriteData(1, true, []byte("x")))
		}},
		{"8.1.1 more body than its length", func(p *peer) error {
			return errors.Join(p.open(1, false, p.good("content-length", "1")), p.WriteData(1, true, []byte("xyz")))
		}},
		{"8.1 a trailer that does not end", func(p *peer) error {
			return errors.Join(p.open(1, false, p.good()), p.open(1, false, block("x", "y")))
		}},
		{"8.1 a trailer with a pseudo-field", func(p *peer) error {
			return errors.Join(p.open(1, false, p.good()), p.open(1, true, block(":path", "/other")))
		}},
		{"8.2.1 a blank before a value", func(p *peer) error { return p.open(1, true, p.good("x", " y\r\nz: 1")) }},
		{"8.2.1 an empty name", func(p *peer) error { return p.open(1, true, p.good("", "y")) }},
		{"8.2.1 a colon in a name", func(p *peer) error { return p.open(1, true, p.good("x:y", "z")) }},
		{"8.2.1 a capital in a name", func(p *peer) error { return p.open(1, true, p.good("Upper", "x")) }},
		{"8.2.1 NUL in a value", func(p *peer) error { return p.open(1, true, p.good("x", "a\x00b")) }},
		{"8.2.2 a field of the connection", func(p *peer) error { return p.open(1, true, p.good("connection", "close")) }},
		{"8.2.2 an encoding of the connection", func(p *peer) error { return p.open(1, true, p.good("transfer-encoding", "chunked")) }},
		{"8.2.2 TE of more than trailers", func(p *peer) error { return p.open(1, true, p.good("te", "gzip")) }},
		{"8.3 an unknown pseudo-field", func(p *peer) error {
			return p.open(1, true, append(block(":what", "x"), p.good()...))
		}},
		{"8.3 a pseudo-field behind a field", func(p *peer) error { return p.open(1, true, append(block("x", "y"), p.good()...)) }},
		{"8.3 a pseudo-field twice", func(p *peer) error { return p.open(1, true, append(block(":path", "/other"), p.good()...)) }},
		{"8.3.1 an empty path", func(p *peer) error {
			return p.open(1, true, block(":method", "POST", ":scheme", "https", ":path", "", ":authority", p.host))
		}},
		{"8.3.1 no method", func(p *peer) error {
			return p.open(1, true, block(":scheme", "https", ":path", "/bad", ":authority", p.host))
		}},
		{"8.3.1 no scheme", func(p *peer) error {
			return p.open(1, true, block(":method", "POST", ":path", "/bad", ":authority", p.host))
		}},
		{"8.3 a pseudo-field of answers", func(p *peer) error { return p.open(1, true, append(block(":status", "200"), p.good()...)) }},
		{"8.3.1 no path", func(p *peer) error {
			return p.open(1, true, block(":method", "POST", ":scheme", "https", ":authority", p.host))
		}},
		{"8.3.1 another authority", func(p *peer) error {
			return p.open(1, true, block(":method", "POST", ":scheme", "https", ":path", "/bad", ":authority", "other.example"))
		}},
		{"8.3.1 a host beside the authority", func(p *peer) error { return p.open(1, true, p.good("host", "other.example")) }},
		{"8.5 CONNECT", func(p *peer) error { return p.open(1, true, block(":method", "CONNECT", ":authority", p.host)) }},
		{"8441 CONNECT to a WebSocket", func(p *peer) error {
			return p.open(1, true, block(":method", "CONNECT", ":protocol", "websocket", ":scheme", "https", ":path", "/bad", ":authority", p.host))
		}},
	}
}

// TestFrames: whatever a job does to HTTP/2, nothing of it arrives whole, the
// gateway says so to the job, and lives.
func TestFrames(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var arrived []string
	s := newSecured(t, true, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if _, err := io.ReadAll(r.Body); err == nil {
			mu.Lock()
			defer mu.Unlock()
			arrived = append(arrived, r.URL.Path+" "+r.Header.Get("X"))
		}
	}))
	for _, o := range offences() {
		if err := s.offend(o.do); err != nil {
			t.Errorf("%s: %v", o.name, err)
		}
		resp, err := s.client(true).Get(s.url("/good"))
		if err != nil {
			t.Fatalf("after %q: %v", o.name, err)
		}
		resp.Body.Close()
	}
	s.close()
	mu.Lock()
	defer mu.Unlock()
	for _, a := range arrived {
		if a != "/good " && a != "/bad y" { // the one that was in order before the offence
			t.Errorf("arrived: %q", a)
		}
	}
	if len(arrived) < len(offences()) {
		t.Errorf("%d good requests arrived, want %d", len(arrived), len(offences()))
	}
}

// offend opens a connection, does something, and reads until the gateway ends
// the stream or the connection.
func (s *secured) offend(do func(*peer) error) error {
	conn, err := s.dial("h2")
	if err != nil {
		return err
	}
	defer conn.Close()
	preface := http2.ClientPreface
	if do == nil {
		preface = strings.Replace(preface, "SM", "XX", 1)
	}
	if _, err := io.WriteString(conn, preface); err != nil {
		return err
	}
	p := &peer{Framer: http2.NewFramer(conn, conn), host: fmt.Sprintf("web.example:%d", s.port)}
	if err := p.WriteSettings(); err != nil {
		return err
	}
	if do != nil {
		_ = do(p) // the gateway may have hung up already
	}
	decoder := hpack.NewDecoder(4096, nil)
	for {
		f, err := p.ReadFrame()
		switch f := f.(type) {
		case nil:
			return hungUp(err)
		case *http2.GoAwayFrame:
			if f.ErrCode == http2.ErrCodeNo {
				return errors.New("the connection ended as if all were well")
			}
			return nil
		case *http2.RSTStreamFrame:
			return nil
		case *http2.HeadersFrame:
			fields, err := decoder.DecodeFull(f.HeaderBlockFragment())
			if err != nil {
				return err
			}
			if status := fields[0].Value; status == "200" && do != nil && f.StreamID == 1 {
				continue // to the request before the offence
			} else if status != "400" && status != "431" {
				return fmt.Errorf("answered with %s", status)
			}
			return nil
		}
	}
}

// hungUp expects the end of a connection, and not that nothing came.
func hungUp(err error) error {
	var timeout interface{ Timeout() bool }
	if errors.As(err, &timeout) && timeout.Timeout() {
		return errors.New("nothing happened")
	}
	return nil
}
