package mask_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds/mask"
)

// naive masks a whole text as the package's documentation says it, with no
// thought for speed.
func naive(text string, needles []string) string {
	secret := make([]bool, len(text))
	for _, n := range needles {
		for i := range len(text) - len(n) + 1 {
			if text[i:i+len(n)] == n {
				for j := range len(n) {
					secret[i+j] = true
				}
			}
		}
	}
	var out strings.Builder
	for i := range len(text) {
		switch {
		case !secret[i]:
			out.WriteByte(text[i])
		case i == 0 || !secret[i-1]:
			out.WriteString(mask.Text)
		}
	}
	return out.String()
}

// collect returns a Writer and what it has sent so far.
func collect(set *mask.Set) (*mask.Writer, *bytes.Buffer) {
	var out bytes.Buffer
	return mask.NewWriter(func(b []byte) error {
		if len(b) == 0 {
			return errors.New("dst got an empty slice")
		}
		_, err := out.Write(b)
		return err
	}, set), &out
}

// written masks text in pieces whose lengths are those in splits, again and
// again; a length of 0 is an empty write.
func written(t testing.TB, set *mask.Set, text string, splits []byte) string {
	t.Helper()
	w, out := collect(set)
	for i := 0; len(text) > 0; i++ {
		n := len(text)
		if len(splits) > 0 {
			n = min(int(splits[i%len(splits)]), len(text))
			if n == 0 && i%len(splits) == 0 {
				n = 1 // so that the loop ends
			}
		}
		if got, err := w.Write([]byte(text[:n])); err != nil || got != n {
			t.Fatalf("Write(%d bytes): got %d, %v, want %d, nil", n, got, err, n)
		}
		text = text[n:]
	}
	if err := w.Flush(); err != nil {
		t.Fatalf("Flush: got %v, want nil", err)
	}
	if held := mask.Held(w); held != 0 {
		t.Fatalf("Flush: %d bytes are still held back, want 0", held)
	}
	return out.String()
}

// check holds a masked text against the oracle, and against the promise
// itself: no needle survives. Needles with asterisks can arise anew.
func check(t testing.TB, got, text string, values []string) {
	t.Helper()
	needles := mask.Needles(secretsOf(values))
	if want := naive(text, needles); got != want {
		t.Fatalf("secrets %q in %q:\ngot  %q\nwant %q", values, text, got, want)
	}
	for _, n := range needles {
		if !strings.Contains(n, "*") && strings.Contains(got, n) {
			t.Fatalf("secrets %q in %q: needle %q survives in %q", values, text, n, got)
		}
	}
}

// TestEverySplit cuts a text that is dense with secrets at every place, and at
// every two.
func TestEverySplit(t *testing.T) {
	t.Parallel()
	values := []string{"abcdefgh", "cdef", "ghijkl", "ababab", "line one\nline two\r\n"}
	text := "xabcdefghijklyababababababz abcdefg cde line one\r\nline two\nabcdefghabcdefgh" +
		"YWJjZGVmZ2g= 6162636465666768 line one\\nline two cdecdefab"
	set := mask.New(secretsOf(values))
	check(t, set.Mask(text), text, values)
	want := set.Mask(text)
	for i := range len(text) {
		for j := i; j < len(text); j++ {
			w, out := collect(set)
			for _, piece := range []string{text[:i], text[i:j], text[j:]} {
				if _, err := w.Write([]byte(piece)); err != nil {
					t.Fatal(err)
				}
			}
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
			if out.String() != want {
				t.Fatalf("cut at %d and %d:\ngot  %q\nwant %q", i, j, out.String(), want)
			}
		}
	}
}

// TestRandom uses alphabets so small that secrets overlap, nest and repeat.
func TestRandom(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(5, 6))
	for range 1500 {
		alphabet := []string{"ab", "abc", "a\n", "ab \r\n", alnum}[r.IntN(5)]
		var values []string
		for range 1 + r.IntN(6) {
			values = append(values, random(r, 4+r.IntN(4)*r.IntN(8), alphabet))
		}
		text := random(r, r.IntN(60), alphabet)
		needles := mask.Needles(secretsOf(values))
		for range r.IntN(12) {
			if len(needles) > 0 {
				n := needles[r.IntN(len(needles))]
				text += n[:len(n)-r.IntN(2)*r.IntN(len(n))] + random(r, r.IntN(3), alphabet)
			}
		}
		splits := make([]byte, r.IntN(6))
		for i := range splits {
			splits[i] = byte(r.IntN(9))
		}
		set := mask.New(secretsOf(values))
		check(t, written(t, set, text, splits), text, values)
		if got, want := set.Mask(text), naive(text, needles); got != want {
			t.Fatalf("Mask: secrets %q in %q:\ngot  %q\nwant %q", values, text, got, want)
		}
	}
}

// TestHundredSecrets holds the large set, with its bitmap and windows, against
// the oracle.
func TestHundredSecrets(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(7, 8))
	values := hundredSecrets()
	needles := mask.Needles(secretsOf(values))
	var b strings.Builder
	for b.Len() < 60<<10 {
		b.Write(logText(1 + r.IntN(300)))
		n := needles[r.IntN(len(needles))]
		b.WriteString(n[:len(n)-r.IntN(2)])
	}
	text := b.String()
	set := mask.New(secretsOf(values))
	// The oracle would take minutes for all needles: those that are there do.
	var there []string
	for _, n := range needles {
		if strings.Contains(text, n) {
			there = append(there, n)
		}
	}
	want := naive(text, there)
	for _, splits := range [][]byte{nil, {1}, {255}, {100, 3, 0, 17}} {
		if got := written(t, set, text, splits); got != want {
			t.Errorf("splits %v: got %d bytes, want %d, or they differ", splits, len(got), len(want))
		}
	}
}

// TestWhatIsSentDependsOnTheBytesAlone looks after every byte: what has been
// sent by then is the same however the bytes came. Else Use would not be
// independent of the cuts.
func TestWhatIsSentDependsOnTheBytesAlone(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(9, 10))
	values := []string{"aabaab", "abab", "baabb", "bbbbbbba"}
	set := mask.New(secretsOf(values))
	text := random(r, 120, "ab")
	single, sent := collect(set)
	for i := range len(text) {
		if _, err := single.Write([]byte{text[i]}); err != nil {
			t.Fatal(err)
		}
		for _, cut := range []int{0, i / 2, i} {
			w, out := collect(set)
			for _, piece := range []string{text[:cut], text[cut : i+1]} {
				if _, err := w.Write([]byte(piece)); err != nil {
					t.Fatal(err)
				}
			}
			if out.String() != sent.String() {
				t.Fatalf("%q cut at %d: sent %q, want %q as byte by byte", text[:i+1], cut, out.String(), sent.String())
			}
		}
	}
}

// FuzzWriter is the property as a whole. The secrets are separated by 0xff.
func FuzzWriter(f *testing.F) {
	f.Add([]byte("a secret in a text: s3cr3t! and czNjcjN0IQ=="), []byte{3, 1}, []byte("s3cr3t!"))
	f.Add([]byte("abababababab"), []byte{1}, []byte("abab\xffbaba\xffababab"))
	f.Add([]byte("one line\r\nanother line\r\n"), []byte{7, 0}, []byte("one line\nanother line\n"))
	f.Add([]byte("a%20b%2fc a+b%2Fc \\u003cx"), []byte{2}, []byte("a b/c\xff<xyz>&\"\\"))
	f.Add([]byte("****a***b*******"), []byte{5}, []byte("a***b\xff****"))
	f.Fuzz(func(t *testing.T, input, splits, secrets []byte) {
		if len(input) > 2000 || len(secrets) > 200 {
			return // the oracle is slow
		}
		var values []string
		for v := range bytes.SplitSeq(secrets, []byte{0xff}) {
			values = append(values, string(v))
		}
		set := mask.New(secretsOf(values))
		check(t, written(t, set, string(input), splits), string(input), values)

		// The same with a needle in it, and with a set that grows.
		if needles := mask.Needles(secretsOf(values)); len(needles) > 0 {
			text := string(input) + needles[len(input)%len(needles)] + string(input)
			check(t, written(t, set, text, splits), text, values)
		}
		grown := mask.New(nil)
		for _, v := range slices.Backward(secretsOf(values)) {
			grown, _ = grown.With(v)
		}
		if got, want := grown.Mask(string(input)), set.Mask(string(input)); got != want {
			t.Fatalf("set made one by one: got %q, want %q", got, want)
		}
	})
}
