package mask_test

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/mask"
)

func setOf(values ...string) *mask.Set { return mask.New(secretsOf(values)) }

func write(t *testing.T, w *mask.Writer, text string) {
	t.Helper()
	if n, err := w.Write([]byte(text)); n != len(text) || err != nil {
		t.Fatalf("Write(%q): got %d, %v, want %d, nil", text, n, err, len(text))
	}
}

func TestCollapse(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		secrets []string
		in      string
		want    string
	}{
		{"none", nil, "text", "text"},
		{"alone", []string{"secret"}, "secret", "***"},
		{"between", []string{"secret"}, "a secret b", "a *** b"},
		{"touching", []string{"secret"}, "secretsecretsecret", "***"},
		{"touching others", []string{"secret", "hidden"}, "xsecrethiddeny", "x***y"},
		{"one byte between", []string{"secret"}, "secret secret", "*** ***"},
		{"overlapping itself", []string{"abab"}, "xababababy", "x***y"},
		{"overlapping", []string{"abcd", "cdef"}, "abcdef", "***"},
		{"nested", []string{"abcdefgh", "cdef"}, "abcdefgh abcdefg", "*** ab***g"},
		{"prefix of another", []string{"abcd", "abcdef", "abcdefgh"}, "abcd abcde abcdef abcdefg abcdefgh", "*** ***e *** ***g ***"},
		{"asterisks in the text", []string{"secret"}, "***secret***", "*********"},
		{"prefix at the end", []string{"secret"}, "secre", "secre"},
	} {
		set := setOf(c.secrets...)
		if got := set.Mask(c.in); got != c.want {
			t.Errorf("%s: Mask: got %q, want %q", c.name, got, c.want)
		}
		if got := written(t, set, c.in, []byte{1}); got != c.want {
			t.Errorf("%s: byte by byte: got %q, want %q", c.name, got, c.want)
		}
	}
}

// TestHoldsBackOnlyBeginnings is why a log can be watched: a line comes out
// when it is written, unless it may become a secret.
func TestHoldsBackOnlyBeginnings(t *testing.T) {
	t.Parallel()
	w, out := collect(setOf("a secret of some length", strings.Repeat("long", 1000)))
	for _, c := range []struct{ in, sent string }{
		{"a line\n", "a line\n"},
		{"no newline: ", "no newline: "},
		{"a sec", ""},
		{"ret of some leng", ""},
		{"t! a secret of some length", "a secret of some lengt! ***"},
		{"longlong", ""},
		{"\n", "longlong\n"},
	} {
		out.Reset()
		write(t, w, c.in)
		if out.String() != c.sent {
			t.Errorf("after %q: sent %q, want %q", c.in, out.String(), c.sent)
		}
	}
}

func TestFlush(t *testing.T) {
	t.Parallel()
	w, out := collect(setOf("secret", "tattle"))
	for _, text := range []string{"a sec", "ret", "secret", "secrettat"} {
		write(t, w, text)
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		out.WriteByte('|')
	}
	write(t, w, "tle")
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	if got, want := out.String(), "a sec|ret|***|***tat|tle"; got != want {
		t.Errorf("four streams through one Writer: got %q, want %q", got, want)
	}
	out.Reset()
	if err := w.Flush(); err != nil || out.Len() != 0 {
		t.Errorf("Flush of nothing: got %q, %v, want nothing", out.String(), err)
	}
}

func TestUse(t *testing.T) {
	t.Parallel()
	set := setOf("abcdefgh")
	more, err := set.With(creds.NewSecret("cdxyz"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name          string
		before, after *mask.Set
		first, second string
		sent, want    string // sent after Use
	}{
		{"held bytes stay", set, more, "abcd", "efgh", "", "***"},
		{"held bytes are judged anew", set, more, "abcd", "xyz", "", "ab***"},
		{"only the new set holds back", set, more, "cd", "xyz", "cd", "cdxyz"},
		{"what nothing needs is sent", set, mask.New(nil), "xabcd", "efgh", "xabcd", "xabcdefgh"},
		{"a run goes on", set, more, "abcdefghcd", "xyz", "***cd", "***cdxyz"},
		{"a run goes on in held bytes", setOf("abcdefgh", "ghijkl"), more, "abcdefgh", "cdxyz", "***", "***"},
		{"covered bytes stay covered", setOf("abcdef", "efghij"), mask.New(nil), "abcdef", "ghij", "***", "***ghij"},
	} {
		w, out := collect(c.before)
		write(t, w, c.first)
		if err := w.Use(c.after); err != nil {
			t.Fatal(err)
		}
		if out.String() != c.sent {
			t.Errorf("%s: after Use: got %q, want %q", c.name, out.String(), c.sent)
		}
		write(t, w, c.second)
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		if out.String() != c.want {
			t.Errorf("%s: got %q, want %q", c.name, out.String(), c.want)
		}
	}
	if got := set.Mask("cdxyz"); got != "cdxyz" {
		t.Errorf("With changed its receiver: got %q, want cdxyz", got)
	}
}

// TestDestinationFails loses what the destination refused and nothing else.
func TestDestinationFails(t *testing.T) {
	t.Parallel()
	broken := errors.New("destination broken")
	var fail error
	var out bytes.Buffer
	w := mask.NewWriter(func(b []byte) error {
		if len(b) == 0 {
			t.Error("dst got an empty slice")
		}
		if fail == nil {
			out.Write(b)
		}
		return fail
	}, setOf("secret"))
	write(t, w, "one ")
	fail = broken
	if n, err := w.Write([]byte("two sec")); n != 7 || !errors.Is(err, broken) {
		t.Errorf("Write: got %d, %v, want 7, %v", n, err, broken)
	}
	long := strings.Repeat("x", 1<<20)
	if n, err := w.Write([]byte("ret" + long)); n >= len(long) || n == 0 || !errors.Is(err, broken) {
		t.Errorf("Write of much: got %d, %v, want the first piece, %v", n, err, broken)
	}
	fail = nil
	write(t, w, "three secre")
	fail = broken
	if err := w.Flush(); !errors.Is(err, broken) {
		t.Errorf("Flush: got %v, want %v", err, broken)
	}
	fail = nil
	write(t, w, "t four")
	if got, want := out.String(), "one three t four"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestMemoryIsFlat writes without a newline, with secrets and with the longest
// beginnings of them, and wants buffers that do not grow.
func TestMemoryIsFlat(t *testing.T) {
	values := hundredSecrets()
	set := mask.New(secretsOf(values))
	longest := 0
	for _, n := range mask.Needles(secretsOf(values)) {
		longest = max(longest, len(n))
	}
	piece := append(logText(1<<20), values[8]+values[0]+values[8][:1500]...)
	piece = bytes.ReplaceAll(piece, []byte("\n"), []byte("_"))
	for _, c := range []struct {
		name  string
		total int
		write int // bytes at once
	}{
		{"100 MB in one write", 100 << 20, 100 << 20},
		{"1 GB", 1 << 30, 1 << 20},
	} {
		if raceEnabled {
			c.total, c.write = c.total/32, c.write/32 // the detector is slow
		}
		text := bytes.Repeat(piece, c.write/len(piece)+1)[:c.write]
		got := 0
		w := mask.NewWriter(func(b []byte) error {
			got += len(b)
			return nil
		}, set)
		if _, err := w.Write(text); err != nil {
			t.Fatal(err)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for n := len(text); n < c.total; n += len(text) {
			if _, err := w.Write(text); err != nil {
				t.Fatal(err)
			}
			if held := mask.Held(w); held >= longest {
				t.Fatalf("%s: %d bytes held back, want fewer than the longest needle has, %d", c.name, held, longest)
			}
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		runtime.ReadMemStats(&after)
		if room, most := mask.Room(w), 4*(longest+64<<10); room > most {
			t.Errorf("%s: buffers of %d bytes, want at most %d", c.name, room, most)
		}
		if grown := after.TotalAlloc - before.TotalAlloc; grown > 1<<20 {
			t.Errorf("%s: allocated %d bytes after the first write, want next to none", c.name, grown)
		}
		if got < c.total/2 || got > c.total {
			t.Errorf("%s: %d bytes came out, want most of %d", c.name, got, c.total)
		}
	}
}

// TestMemoryOfMatches makes the most matches: at every byte, of many needles.
func TestMemoryOfMatches(t *testing.T) {
	t.Parallel()
	var values []string
	for n := 4; n < 100; n++ {
		values = append(values, strings.Repeat("a", n), strings.Repeat("a", n)+"b")
	}
	w, out := collect(setOf(values...))
	write(t, w, strings.Repeat(strings.Repeat("a", 40)+"x", 20000))
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	if got, want := out.String(), strings.Repeat("***x", 20000); got != want {
		t.Errorf("got %d bytes, want %d", len(got), len(want))
	}
	if room, most := mask.Room(w), 1<<20; room > most {
		t.Errorf("buffers of %d bytes, want at most %d", room, most)
	}
}

func TestTooShort(t *testing.T) {
	t.Parallel()
	long := creds.NewSecret("long enough")
	for _, c := range []struct {
		value string
		short bool
	}{
		{"", false}, // nothing to hide
		{"q7z", true},
		{"q7zk", false},
		{" q7z\n", true},
		{"q7z\nk4j\r\nx9v", true},
		{"q7z\nk4jx", false},
		{"      ", true},
	} {
		set, err := setOf("other secret").With(long, creds.NewSecret(c.value))
		if errors.Is(err, mask.ErrTooShort) != c.short || (err != nil) != c.short {
			t.Errorf("With(%q): got %v, want ErrTooShort: %v", c.value, err, c.short)
		}
		if again := mask.New([]creds.Secret{long, creds.NewSecret(c.value)}).Err(); errors.Is(again, mask.ErrTooShort) != c.short {
			t.Errorf("New(%q).Err: got %v, want ErrTooShort: %v", c.value, again, c.short)
		}
		if c.short {
			if got := fmt.Sprint(err); !strings.Contains(got, "value 2 of 2") || strings.Contains(got, "q7z") {
				t.Errorf("With(%q): error %q, want the position and not the value", c.value, got)
			}
			if in := "<" + c.value + ">"; set.Mask(in) != in {
				t.Errorf("%q is masked, want it as it is", in)
			}
			if later, err := set.With(long); err != nil || !errors.Is(later.Err(), mask.ErrTooShort) {
				t.Errorf("With after a short value: got %v and Err %v, want nil and ErrTooShort", err, later.Err())
			}
		}
		if got := set.Mask("other secret, long enough"); got != "***, ***" {
			t.Errorf("beside %q: got %q, want ***, ***", c.value, got)
		}
	}
}
