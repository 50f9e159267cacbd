package gateway

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// script is a connection on which a client has sent bytes, piece by piece.
type script struct {
	net.Conn
	r io.Reader
}

func (s script) Read(b []byte) (int, error)      { return s.r.Read(b) }
func (s script) SetReadDeadline(time.Time) error { return nil }

// clientHello is what crypto/tls sends first.
func clientHello(tb testing.TB, c *tls.Config) []byte {
	tb.Helper()
	var sent bytes.Buffer
	c.InsecureSkipVerify = true // nothing is verified: there is no server
	err := tls.Client(sink{w: &sent}, c).Handshake()
	if !errors.Is(err, io.EOF) || sent.Len() == 0 {
		tb.Fatalf("ClientHello: got %d bytes and %v", sent.Len(), err)
	}
	return sent.Bytes()
}

// sink is a connection that nobody answers on.
type sink struct {
	net.Conn
	w io.Writer
}

func (s sink) Write(b []byte) (int, error) { return s.w.Write(b) }
func (s sink) Read([]byte) (int, error)    { return 0, io.EOF }

// records cuts the one record of a hello into records of n bytes.
func records(hello []byte, n int) []byte {
	var all []byte
	for body := hello[5:]; len(body) > 0; {
		m := min(n, len(body))
		all = append(all, hello[0], hello[1], hello[2])
		all = binary.BigEndian.AppendUint16(all, uint16(m))
		all = append(all, body[:m]...)
		body = body[m:]
	}
	return all
}

// extend appends an extension to a ClientHello in one record.
func extend(hello []byte, typ uint16, value []byte) []byte {
	h := bytes.Clone(hello)
	at := 5 + 4 + 2 + 32                   // record, handshake, version, random
	at += 1 + int(h[at])                   // session
	at += 2 + int(h[at])<<8 + int(h[at+1]) // suites
	at += 1 + int(h[at])                   // compression
	ext := binary.BigEndian.AppendUint16(nil, typ)
	ext = binary.BigEndian.AppendUint16(ext, uint16(len(value)))
	ext = append(ext, value...)
	add := func(b []byte, n int) { binary.BigEndian.PutUint16(b, binary.BigEndian.Uint16(b)+uint16(n)) }
	add(h[at:], len(ext))
	add(h[7:], len(ext)) // the low bytes of the handshake's length
	add(h[3:], len(ext))
	// Before the others: a pre-shared key must stay last.
	return append(h[:at+2], append(ext, h[at+2:]...)...)
}

func TestParseHello(t *testing.T) {
	t.Parallel()
	const name = "good.example"
	good := clientHello(t, &tls.Config{ServerName: name})
	for _, tt := range []struct {
		name string
		sent io.Reader
		want string // part of the refusal, "" for none
	}{
		{"good", bytes.NewReader(good), ""},
		{"good, one byte at a time", oneByte{bytes.NewReader(good)}, ""},
		{"good, in records of one byte", bytes.NewReader(records(good, 1)), ""},
		{"good, in records of 100 bytes", bytes.NewReader(records(good, 100)), ""},
		{"TLS 1.2", bytes.NewReader(clientHello(t, &tls.Config{ServerName: name, MaxVersion: tls.VersionTLS12})), ""},
		{"other case", bytes.NewReader(clientHello(t, &tls.Config{ServerName: "GOOD.Example"})), ""},
		{"other name", bytes.NewReader(clientHello(t, &tls.Config{ServerName: "evil.example"})), "asks for evil.example"},
		{"an address", bytes.NewReader(clientHello(t, &tls.Config{ServerName: "192.0.2.7"})), "no server name"},
		{"no name", bytes.NewReader(clientHello(t, &tls.Config{})), "no server name"},
		{"ECH, as GREASE or not", bytes.NewReader(extend(good, extensionECH, bytes.Repeat([]byte{0, 0, 1, 0, 1, 7}, 20))), "encrypted part"},
		{"empty ECH", bytes.NewReader(extend(good, extensionECH, nil)), "encrypted part"},
		{"unknown extension", bytes.NewReader(extend(good, 0x4a4a, []byte{1})), ""},
		{"two server names", bytes.NewReader(extend(good, 0, append([]byte{0, 15, 0, 0, 12}, "evil.example"...))), "not a ClientHello"},
		{"final dot", bytes.NewReader(bytes.Replace(good, []byte(name), []byte("good.exampl."), 1)), "not a ClientHello"},
		{"NUL in the name", bytes.NewReader(bytes.Replace(good, []byte(name), []byte("good\x00example"), 1)), `good\x00example`},
		{"cut", bytes.NewReader(good[:40]), "ended before"},
		{"nothing", bytes.NewReader(nil), "ended before"},
		{"HTTP", strings.NewReader("GET / HTTP/1.1\r\nHost: good.example\r\n\r\n"), "not a ClientHello"},
		{"SSH", strings.NewReader("SSH-2.0-OpenSSH_9.2\r\n"), "not a ClientHello"},
		{"SSLv2", bytes.NewReader([]byte{0x80, 0x2e, 1, 3, 1, 0, 21, 0, 0, 0, 16, 1, 2, 3}), "not a ClientHello"},
		{"endless", io.MultiReader(bytes.NewReader([]byte{22, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff}), endless{}), "ClientHello"},
		{"empty records", io.MultiReader(bytes.NewReader(bytes.Repeat([]byte{22, 3, 1, 0, 0}, 100_000))), "ClientHello"},
	} {
		conn := &peeked{Conn: script{r: tt.sent}}
		err := parseHello(conn, name)
		switch r := (*refusal)(nil); {
		case tt.want == "" && err != nil:
			t.Errorf("%s: got %v, want it let through", tt.name, err)
		case tt.want != "" && (!errors.As(err, &r) || !strings.Contains(r.reason, tt.want)):
			t.Errorf("%s: got %v, want a refusal with %q", tt.name, err, tt.want)
		}
		if len(conn.read) > helloLimit {
			t.Errorf("%s: %d bytes kept, want at most %d", tt.name, len(conn.read), helloLimit)
		}
	}
}

type oneByte struct{ r io.Reader }

func (o oneByte) Read(b []byte) (int, error) { return o.r.Read(b[:1]) }

type endless struct{}

func (endless) Read(b []byte) (int, error) { return len(b), nil }

// FuzzHello: whatever a client sends, it is let through only with the name in
// clear, and what is kept is what was sent.
func FuzzHello(f *testing.F) {
	good := clientHello(f, &tls.Config{ServerName: "good.example"})
	f.Add(good)
	f.Add(records(good, 50))
	f.Add(extend(good, extensionECH, []byte{0, 0, 1, 0, 1, 7}))
	f.Add(clientHello(f, &tls.Config{ServerName: "evil.example"}))
	f.Fuzz(func(t *testing.T, sent []byte) {
		conn := &peeked{Conn: script{r: bytes.NewReader(sent)}}
		err := parseHello(conn, "good.example")
		if !bytes.HasPrefix(sent, conn.read) || len(conn.read) > helloLimit {
			t.Errorf("kept %x of %x", conn.read, sent)
		}
		if err == nil && len(sent) < 60 {
			t.Errorf("%x was let through", sent)
		}
	})
}
