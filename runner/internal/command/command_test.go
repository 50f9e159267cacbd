package command

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	t.Parallel()
	for line, want := range map[string]Command{
		"::debug::x":    {Name: "debug", Message: "x"},
		" \t::Debug:: ": {Name: "debug", Message: " "},
		"::endgroup::":  {Name: "endgroup"},
		"::error file=a%2Cb.js,line=1,endLine=2,title=A%3A B%25::a%0Ab%3A::c": {
			Name: "error", Properties: map[string]string{"file": "a,b.js", "line": "1", "endline": "2", "title": "A: B%"}, Message: "a\nb%3A::c",
		},
		"::set-output name=x=y,=z,w::%250A%0D": {Name: "set-output", Properties: map[string]string{"name": "x=y"}, Message: "%0A\r"},
		"::a-token::":                          {Name: "a-token"},
	} {
		if want.Properties == nil {
			want.Properties = map[string]string{}
		}
		if got, ok := Parse([]byte(line)); !ok || !reflect.DeepEqual(got, want) {
			t.Errorf("Parse(%q) = %+v, %v; want %+v", line, got, ok, want)
		}
	}
	for _, line := range []string{"", "::", "::x", ":::", "::::", ":: x::", "x ::debug::y", "a::b::c", ":debug::x"} {
		if got, ok := Parse([]byte(line)); ok {
			t.Errorf("Parse(%q) = %+v, want no command", line, got)
		}
	}
}

// scan gives what a Scanner makes of a stream that is cut in two or three.
// Lines of commands stand in brackets; every other one of them is dropped.
func scan(t *testing.T, parts ...[]byte) string {
	t.Helper()
	var out bytes.Buffer
	commands := 0
	s := NewScanner(
		func(b []byte) error { out.Write(b); return nil },
		func(line, end []byte) (bool, error) {
			commands++
			out.WriteString("[" + string(line) + "]")
			if commands%2 == 1 {
				out.Write(end)
			}
			return commands%2 == 1, nil
		})
	for _, p := range parts {
		if err := s.Write(bytes.Clone(p)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// reference is what a Scanner should do, written down without a stream.
func reference(b []byte) string {
	var out strings.Builder
	commands := 0
	for len(b) > 0 {
		n := bytes.IndexAny(b, "\r\n")
		line, ending, rest := b, []byte(nil), []byte(nil)
		if n >= 0 {
			line, ending, rest = b[:n], b[n:n+1], b[n+1:]
		}
		text := bytes.TrimLeft(line, " \t\v\f")
		if !bytes.HasPrefix(text, []byte("::")) || len(line)-len(text) > maxIndent || len(line) > MaxLine {
			out.Write(line)
			out.Write(ending)
			b = rest
			continue
		}
		commands++
		out.WriteString("[" + string(line) + "]")
		if commands%2 == 1 {
			out.Write(ending)
		} else if string(ending) == "\r" {
			rest = bytes.TrimPrefix(rest, []byte("\n"))
		}
		b = rest
	}
	return out.String()
}

func streams() []string {
	return []string{
		"", "x", "\n", "::", ":", ": :\n", "::a::b", "a\n::a::b\nc", "a ::b::c\n d::e\n:f\n", "  ::a::b\n\t::c::d\r\n::e::f\r\ng\r::h::i\r\n\n::j",
		strings.Repeat(" ", maxIndent) + "::a::\n" + strings.Repeat(" ", maxIndent+1) + "::b::\n::c::", "   \n  :\n  :: \n  :::\n",
		"\r\r\n::a::\r\r\n::b::\r\r\n", "std::vector\nfoo::bar::baz ::x::y\n::add-mask::s\n::add-mask::t\n",
	}
}

func TestScanner(t *testing.T) {
	t.Parallel()
	for _, text := range streams() {
		want := reference([]byte(text))
		for i := range len(text) + 1 {
			for j := i; j <= len(text); j += 1 + len(text)/40 {
				if got := scan(t, []byte(text[:i]), []byte(text[i:j]), []byte(text[j:])); got != want {
					t.Fatalf("%q cut at %d and %d:\n got %q\nwant %q", text, i, j, got, want)
				}
			}
		}
		var bytewise [][]byte
		for i := range len(text) {
			bytewise = append(bytewise, []byte(text[i:i+1]))
		}
		if got := scan(t, bytewise...); got != want {
			t.Errorf("%q byte by byte:\n got %q\nwant %q", text, got, want)
		}
	}
}

// A line without an end must not be kept without one.
func TestScannerIsBounded(t *testing.T) {
	t.Parallel()
	for _, n := range []int{MaxLine - 1, MaxLine, MaxLine + 1} {
		line := "::x::" + strings.Repeat("y", n-len("::x::"))
		text := line + "\n::z::\n"
		want := "[" + line + "]\n[::z::]"
		if n > MaxLine {
			want = line + "\n[::z::]\n"
		}
		for _, cut := range []int{0, 1, 5, MaxLine - 1, MaxLine, len(text)} {
			if got := scan(t, []byte(text[:cut]), []byte(text[cut:])); got != want {
				t.Errorf("a line of %d bytes cut at %d: got %d bytes that begin with %.20q, want %d that begin with %.20q", n, cut, len(got), got, len(want), want)
			}
		}
	}
}

func FuzzScanner(f *testing.F) {
	for _, s := range streams() {
		f.Add([]byte(s), uint16(1), uint16(3))
	}
	f.Fuzz(func(t *testing.T, b []byte, x, y uint16) {
		i := min(int(x), len(b))
		j := min(i+int(y), len(b))
		if got, want := scan(t, b[:i], b[i:j], b[j:]), reference(b); got != want {
			t.Errorf("%q cut at %d and %d:\n got %q\nwant %q", b, i, j, got, want)
		}
	})
}

// The budget is the mask's, 500 MB/s: finding commands must cost next to
// nothing beside it.
func BenchmarkScanner(b *testing.B) {
	plain := bytes.Repeat([]byte("2026-11-24T08:00:00Z compiling package runner, 12 of 340 files, no warning so far\n"), 400)[:32<<10]
	for name, text := range map[string][]byte{
		"plain":    plain,
		"colons":   bytes.ReplaceAll(plain, []byte("package runner"), []byte("std::vector<x>")),
		"short":    bytes.Repeat([]byte("ok\n"), 11<<10),
		"commands": bytes.Repeat([]byte("::warning file=a.go,line=1::something\n"), 860),
	} {
		b.Run(name, func(b *testing.B) {
			s := NewScanner(func([]byte) error { return nil }, func(_, _ []byte) (bool, error) { return true, nil })
			b.SetBytes(int64(len(text)))
			for b.Loop() {
				if err := s.Write(text); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
