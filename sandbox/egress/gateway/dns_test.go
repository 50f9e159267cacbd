package gateway

import (
	"context"
	"strings"
	"testing"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// testBox has one name.
func testBox(tb testing.TB) *box {
	tb.Helper()
	g, err := New(Config{})
	if err != nil {
		tb.Fatal(err)
	}
	o := egress.Opening{Rules: egress.Rules{Allow: []egress.Rule{rule("good.example", 443)}}, Ledger: discard}
	if err := g.Open(context.Background(), "job", o); err != nil {
		tb.Fatal(err)
	}
	return g.scopes["job"].box
}

// query packs a message; question names may be anything.
func query(tb testing.TB, h dnsmessage.Header, names ...string) []byte {
	tb.Helper()
	m := dnsmessage.Message{Header: h}
	for _, n := range names {
		m.Questions = append(m.Questions, dnsmessage.Question{
			Name: dnsmessage.MustNewName(n), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET,
		})
	}
	b, err := m.Pack()
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func TestReply(t *testing.T) {
	t.Parallel()
	b := testBox(t)
	const silent = dnsmessage.RCode(0xfff)
	loop := append(query(t, dnsmessage.Header{}), 0xc0, 12, 0, 1, 0, 1) // a name that points to itself
	loop[5] = 1
	for _, tt := range []struct {
		name   string
		packet []byte
		code   dnsmessage.RCode
		addrs  int
		line   string // name in the line; "-" for none, "?" for one without name
	}{
		{"allowed", query(t, dnsmessage.Header{ID: 1}, "good.example."), dnsmessage.RCodeSuccess, 1, "-"},
		{"mixed case", query(t, dnsmessage.Header{ID: 1}, "gOOd.eXample."), dnsmessage.RCodeSuccess, 1, "-"},
		{"other", query(t, dnsmessage.Header{}, "bad.example."), dnsmessage.RCodeNameError, 0, "bad.example"},
		{"tunnel", query(t, dnsmessage.Header{}, "c2VjcmV0.good.example."), dnsmessage.RCodeNameError, 0, "c2vjcmv0.good.example"},
		{"NUL", query(t, dnsmessage.Header{}, "good.example\x00."), dnsmessage.RCodeNameError, 0, `good.example\x00`},
		{"line break", query(t, dnsmessage.Header{}, "a\nb."), dnsmessage.RCodeNameError, 0, `a\nb`},
		{"underscore", query(t, dnsmessage.Header{}, "_http._tcp.good.example."), dnsmessage.RCodeNameError, 0, "_http._tcp.good.example"},
		{"root", query(t, dnsmessage.Header{}, "."), dnsmessage.RCodeNameError, 0, "?"},
		{"own reverse", query(t, dnsmessage.Header{}, "1.0.18.198.in-addr.arpa."), dnsmessage.RCodeNameError, 0, "-"},
		{"other reverse", query(t, dnsmessage.Header{}, "8.8.8.8.in-addr.arpa."), dnsmessage.RCodeNameError, 0, "8.8.8.8.in-addr.arpa"},
		{"two questions", query(t, dnsmessage.Header{}, "good.example.", "bad.example."), dnsmessage.RCodeFormatError, 0, "?"},
		{"no question", query(t, dnsmessage.Header{}), dnsmessage.RCodeFormatError, 0, "?"},
		{"an answer", query(t, dnsmessage.Header{Response: true}, "good.example."), silent, 0, "?"},
		{"an update", query(t, dnsmessage.Header{OpCode: 5}, "good.example."), dnsmessage.RCodeNotImplemented, 0, "?"},
		{"truncated", query(t, dnsmessage.Header{}, "good.example.")[:20], dnsmessage.RCodeFormatError, 0, "?"},
		{"half a header", []byte{1, 2, 3}, silent, 0, "?"},
		{"nothing", nil, silent, 0, "?"},
		{"pointer loop", loop, dnsmessage.RCodeFormatError, 0, "?"},
	} {
		reply, line := b.reply(tt.packet)
		if wantLine := tt.line != "-"; (line.Verdict == egress.Refused) != wantLine || wantLine && line.Name != strings.Trim(tt.line, "?") {
			t.Errorf("%s: got line %+v, want one about %q", tt.name, line, tt.line)
		}
		if tt.code == silent {
			if reply != nil {
				t.Errorf("%s: got answer %x, want none", tt.name, reply)
			}
			continue
		}
		var m dnsmessage.Message
		if err := m.Unpack(reply); err != nil {
			t.Errorf("%s: answer %x: %v", tt.name, reply, err)
			continue
		}
		if !m.Response || m.RCode != tt.code || len(m.Answers) != tt.addrs {
			t.Errorf("%s: got %+v, want code %v and %d addresses", tt.name, m, tt.code, tt.addrs)
		}
		if tt.name == "mixed case" && (m.Questions[0].Name.String() != "gOOd.eXample." || m.Answers[0].Header.Name.String() != "gOOd.eXample.") {
			t.Errorf("%s: got %v and %v, want the case of the question", tt.name, m.Questions[0].Name, m.Answers[0].Header.Name)
		}
	}
}

// FuzzReply: whatever a job sends, an answer is well-formed, gives away nothing
// but the virtual address of the allowed name, and a line is fit to print.
func FuzzReply(f *testing.F) {
	b := testBox(f)
	f.Add(query(f, dnsmessage.Header{ID: 7, RecursionDesired: true}, "good.example."))
	f.Add(query(f, dnsmessage.Header{}, "bad.example.", "a\x00.b."))
	f.Add([]byte{0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xc0, 12, 0, 1, 0, 1})
	f.Fuzz(func(t *testing.T, packet []byte) {
		reply, line := b.reply(packet)
		for _, c := range line.Name + line.Reason {
			if c < ' ' || c > '~' {
				t.Errorf("line %+v is not printable", line)
			}
		}
		if reply == nil {
			return
		}
		var m dnsmessage.Message
		if err := m.Unpack(reply); err != nil {
			t.Fatalf("answer %x: %v", reply, err)
		}
		if len(reply) > 512+len(packet) {
			t.Errorf("an answer of %d bytes to %d", len(reply), len(packet))
		}
		for _, a := range m.Answers {
			if name, err := canonical(a.Header.Name.String()); err != nil || name != "good.example" {
				t.Errorf("an address for %q", a.Header.Name)
			}
		}
	})
}
