package wire_test

import (
	"bytes"
	"errors"
	"io"
	"reflect"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

// one reads the only frame of b.
func one(t *testing.T, from wire.Side, b []byte) (wire.Type, []byte) {
	t.Helper()
	r := wire.NewReader(bytes.NewReader(b), from)
	typ, p, err := r.Next()
	if err != nil {
		t.Fatalf("frame %x: got %v", b[:min(len(b), 20)], err)
	}
	p = bytes.Clone(p)
	if _, _, err := r.Next(); err != io.EOF {
		t.Fatalf("after the frame: got %v, want EOF", err)
	}
	return typ, p
}

func TestFramesArriveAsTheyWereSent(t *testing.T) {
	t.Parallel()
	for _, c := range []wire.Command{
		{},
		{Dir: "/", Args: []string{"a", "", "c d"}, Env: []string{"A=1", ""}},
		{Dir: "/", Input: wire.Pipe, Alone: true},
		{Dir: "/", Input: wire.Terminal, Size: wire.Size{Rows: 24, Cols: 1<<16 - 1}},
		{Args: []string{strings.Repeat("x", 200<<10)}, Env: []string{"B=2"}}, // larger than the reader's buffer
	} {
		typ, p := one(t, wire.FromAgent, wire.AppendStart(nil, c))
		if got, err := wire.ParseStart(p); err != nil || typ != wire.Start || !reflect.DeepEqual(got, c) {
			t.Errorf("start: got %v and %v, want %v", got, err, c)
		}
	}
	_, p := one(t, wire.FromGuest, wire.AppendHello(nil))
	if v, err := wire.ParseHello(p); err != nil || v != wire.Version {
		t.Errorf("hello: got %d and %v", v, err)
	}
	_, p = one(t, wire.FromAgent, wire.AppendUint32(nil, wire.Stop, 1<<32-1))
	if n, err := wire.ParseUint32(p); err != nil || n != 1<<32-1 {
		t.Errorf("stop: got %d and %v", n, err)
	}
	_, p = one(t, wire.FromAgent, wire.AppendResize(nil, wire.Size{Rows: 50, Cols: 300}))
	if size, err := wire.ParseResize(p); err != nil || size != (wire.Size{Rows: 50, Cols: 300}) {
		t.Errorf("resize: got %v and %v", size, err)
	}
	_, p = one(t, wire.FromAgent, wire.AppendGet(nil, "/a", 1<<63))
	if path, n, err := wire.ParseGet(p); err != nil || path != "/a" || n != 1<<63 {
		t.Errorf("get: got %q, %d and %v", path, n, err)
	}
	_, p = one(t, wire.FromGuest, wire.AppendExit(nil, 0, 64))
	if status, signal, err := wire.ParseExit(p); err != nil || status != 0 || signal != 64 {
		t.Errorf("exit: got %d, %d and %v", status, signal, err)
	}
	_, p = one(t, wire.FromGuest, wire.AppendResult(nil, wire.Failed, strings.Repeat("ä", wire.MaxMessage)))
	if code, text, err := wire.ParseResult(p); err != nil || code != wire.Failed || text != strings.Repeat("ä", wire.MaxMessage/2) {
		t.Errorf("result: got %d, %d bytes and %v, want the message cut", code, len(text), err)
	}
}

func TestReaderRefuses(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		from wire.Side
		in   string
		want error
	}{
		"nothing":                  {wire.FromGuest, "", io.EOF},
		"half a header":            {wire.FromGuest, "\x41\x00", io.ErrUnexpectedEOF},
		"half a payload":           {wire.FromGuest, "\x43\x00\x00\x00\x02x", io.ErrUnexpectedEOF},
		"half a start":             {wire.FromAgent, "\x01\x00\x40\x00\x00" + strings.Repeat("x", 1<<20), io.ErrUnexpectedEOF},
		"start of the guest":       {wire.FromGuest, "\x01\x00\x00\x00\x00", wire.ErrFrame},
		"output of the agent":      {wire.FromAgent, "\x41\x00\x00\x00\x00", wire.ErrFrame},
		"unknown type":             {wire.FromAgent, "\x00\x00\x00\x00\x00", wire.ErrFrame},
		"start too long":           {wire.FromAgent, "\x01\x00\x60\x00\x01", wire.ErrFrame},
		"cancel with a payload":    {wire.FromAgent, "\x07\x00\x00\x00\x01x", wire.ErrFrame},
		"input one byte too long":  {wire.FromAgent, "\x08\x00\x01\x00\x01", wire.ErrFrame},
		"end of input with more":   {wire.FromAgent, "\x09\x00\x00\x00\x01x", wire.ErrFrame},
		"size of five bytes":       {wire.FromAgent, "\x0a\x00\x00\x00\x05", wire.ErrFrame},
		"input of the guest":       {wire.FromGuest, "\x08\x00\x00\x00\x00", wire.ErrFrame},
		"grant of the guest's own": {wire.FromAgent, "\x46\x00\x00\x00\x04", wire.ErrFrame},
		"exit of 4 GiB":            {wire.FromGuest, "\x43\xff\xff\xff\xff", wire.ErrFrame},
		"output one byte too long": {wire.FromGuest, "\x41\x00\x01\x00\x09", wire.ErrFrame},
	} {
		if _, _, err := wire.NewReader(strings.NewReader(c.in), c.from).Next(); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
}

func TestParsersRefuse(t *testing.T) {
	t.Parallel()
	fails := func(name string, err error) {
		t.Helper()
		if !errors.Is(err, wire.ErrFrame) {
			t.Errorf("%s: got %v, want ErrFrame", name, err)
		}
	}
	const head = "\x00\x00\x00\x00\x00\x00"
	for _, p := range []string{"", "\x00", head[1:], "\x03" + head[1:] + head, "\x01\x00\x01" + head[3:] + head, head[:5] + "\x02" + head} {
		_, err := wire.ParseStart([]byte(p))
		fails("head of a start", err)
	}
	_, err := wire.ParseResize([]byte("123"))
	fails("size", err)
	for _, p := range []string{"", "\x00\x00\x00", "\x00\x00\x00\x01", "\xff\xff\xff\xff", "\x00\x00\x00\x00\xff\xff\xff\xff", "\x00\x00\x00\x00\x00\x00\x00\x01\x00", "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01"} {
		_, err := wire.ParseStart([]byte(head + p))
		fails("start", err)
	}
	_, err = wire.ParseUint32([]byte("123"))
	fails("number", err)
	_, _, err = wire.ParseGet([]byte("1234567"))
	fails("get", err)
	_, err = wire.ParseHello([]byte("mayfly-guest"))
	fails("hello", err)
	for _, p := range []string{"", "\x00", "\x01\x01", "\x00\x41", "\x00\x00\x00"} {
		_, _, err = wire.ParseExit([]byte(p))
		fails("exit", err)
	}
	for _, p := range []string{"", "\x05", "\xff"} {
		_, _, err = wire.ParseResult([]byte(p))
		fails("result", err)
	}
	_, _, err = wire.ParseStamp([]byte("1234567"))
	fails("stamp", err)
}

func TestCreditIsNeverMoreThanAWindow(t *testing.T) {
	t.Parallel()
	c := wire.NewCredit()
	if c.Add(1) {
		t.Error("a full window took one byte more")
	}
	if !c.Try(wire.Window) || c.Try(1) {
		t.Error("got more or less than a window, want exactly one")
	}
	if c.Add(wire.Window+1) || c.Add(1<<32-1) {
		t.Error("took back more than was given")
	}
	if !c.Add(10) || !c.Try(10) {
		t.Error("what was given back cannot be used")
	}
	select {
	case <-c.Wake():
	default:
		t.Error("Add did not wake the sender")
	}
}

func TestInboxIsNeverMoreThanAWindow(t *testing.T) {
	t.Parallel()
	in := wire.NewInbox()
	frames := 0
	for in.Put(wire.Stdout, nil) {
		frames++
	}
	if want := wire.Window / wire.HeaderSize; frames != want {
		t.Errorf("got %d empty frames, want %d: headers count", frames, want)
	}
	batch, n := in.Take(nil), 0
	for typ, p, rest, ok := wire.Cut(batch); ok; typ, p, rest, ok = wire.Cut(rest) {
		if typ != wire.Stdout || len(p) != 0 {
			t.Fatalf("frame %d: got type %d and %q", n, typ, p)
		}
		n++
	}
	if n != frames {
		t.Errorf("got %d frames out, want %d", n, frames)
	}
	if !in.Put(wire.Stderr, []byte("x")) {
		t.Error("an empty inbox took nothing")
	}
}

// FuzzReader reads any bytes: what it accepts is what was sent, and each parser
// copes with each payload.
func FuzzReader(f *testing.F) {
	f.Add(true, wire.AppendStart(nil, wire.Command{Dir: "/", Args: []string{"a"}, Env: []string{"b"}}))
	f.Add(true, wire.AppendGet(wire.AppendUint32(nil, wire.Stop, 7), "/x", 9))
	f.Add(true, wire.AppendResize(wire.AppendFrame(wire.AppendStart(nil, wire.Command{Input: wire.Terminal, Size: wire.Size{Rows: 24, Cols: 80}}), wire.Input, "ls\r"), wire.Size{Rows: 1}))
	f.Add(true, wire.AppendHeader(wire.AppendStart(nil, wire.Command{Dir: "/", Input: wire.Pipe, Alone: true}), wire.InputEnd, 0))
	f.Add(true, wire.AppendProbe(nil, 9, []wire.Attempt{{Domain: 2, Type: 1, Port: 80, To: "\xa9\xfe\xa9\xfe", Text: "x"}, {Domain: 17}}))
	f.Add(false, wire.AppendProbed(nil, []wire.Outcome{{Errno: 111}, {Reply: "y"}}))
	f.Add(false, wire.AppendUint32(nil, wire.InputGrant, 9))
	f.Add(false, wire.AppendExit(wire.AppendHello(nil), 1, 0))
	f.Add(false, wire.AppendResult(wire.AppendFrame(nil, wire.Stdout, "12345678abc"), wire.Refused, "no"))
	f.Fuzz(func(t *testing.T, agent bool, data []byte) {
		from := wire.FromGuest
		if agent {
			from = wire.FromAgent
		}
		r := wire.NewReader(bytes.NewReader(data), from)
		var again []byte
		for {
			typ, p, err := r.Next()
			if err != nil {
				break
			}
			again = wire.AppendFrame(again, typ, string(p))
			if c, err := wire.ParseStart(p); err == nil && agent && typ == wire.Start {
				if back := wire.AppendStart(nil, c); !bytes.Equal(back[wire.HeaderSize:], p) {
					t.Errorf("start: got %x, want %x", back[wire.HeaderSize:], p)
				}
			}
			if wait, a, err := wire.ParseProbe(p); err == nil {
				if back := wire.AppendProbe(nil, wait, a); !bytes.Equal(back[wire.HeaderSize:], p) {
					t.Errorf("probe: got %x, want %x", back[wire.HeaderSize:], p)
				}
			}
			if o, err := wire.ParseProbed(p); err == nil {
				if back := wire.AppendProbed(nil, o); !bytes.Equal(back[wire.HeaderSize:], p) {
					t.Errorf("probed: got %x, want %x", back[wire.HeaderSize:], p)
				}
			}
			_, _ = wire.ParseHello(p)
			_, _ = wire.ParseUint32(p)
			_, _ = wire.ParseResize(p)
			_, _, _ = wire.ParseGet(p)
			_, _, _ = wire.ParseExit(p)
			_, _, _ = wire.ParseResult(p)
			_, _, _ = wire.ParseStamp(p)
			for rest, ok := p, true; ok; _, _, rest, ok = wire.Cut(rest) {
			}
		}
		if !bytes.HasPrefix(data, again) {
			t.Errorf("read %x out of %x", again, data)
		}
	})
}
