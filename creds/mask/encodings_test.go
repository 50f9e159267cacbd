package mask_test

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/mask"
)

const awkward = "p@ss w0rd/é<&>\"'\\+=?~!\t*;%$"

// jsonOf is v inside a JSON string, HTML characters escaped or not.
func jsonOf(t *testing.T, v string, html bool) string {
	t.Helper()
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(html)
	if err := e.Encode(v); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(b.String()), `"`), `"`)
}

func lowerEscapes(s string) string {
	b := []byte(s)
	for i := range b {
		if b[i] == '%' {
			copy(b[i+1:i+3], strings.ToLower(s[i+1:i+3]))
		}
	}
	return string(b)
}

// TestEncodings gives each encoding, made by the standard library where that
// has it, and wants it gone without a rest.
func TestEncodings(t *testing.T) {
	t.Parallel()
	for _, secret := range []string{"hunter22", "four", awkward, "\x00\xff\xfe\x80\x81binary\xf0", strings.Repeat("Long0+/ ", 40)} {
		encodings := map[string]string{
			"raw":                secret,
			"hex":                hex.EncodeToString([]byte(secret)),
			"HEX":                fmt.Sprintf("%X", secret),
			"query":              url.QueryEscape(secret),
			"query, lower":       lowerEscapes(url.QueryEscape(secret)),
			"query, blank":       strings.ReplaceAll(url.QueryEscape(secret), "+", "%20"),
			"path":               url.PathEscape(secret),
			"path, lower":        lowerEscapes(url.PathEscape(secret)),
			"encodeURIComponent": strings.NewReplacer("+", "%20", "%21", "!", "%27", "'", "%28", "(", "%29", ")", "%2A", "*").Replace(url.QueryEscape(secret)),
			"quote":              strings.NewReplacer("+", "%20", "%2F", "/").Replace(url.QueryEscape(secret)),
			"base64":             base64.StdEncoding.EncodeToString([]byte(secret)),
			"base64, raw":        base64.RawStdEncoding.EncodeToString([]byte(secret)),
			"base64, URL":        base64.URLEncoding.EncodeToString([]byte(secret)),
			"base64, raw URL":    base64.RawURLEncoding.EncodeToString([]byte(secret)),
			"set -x":             strings.ReplaceAll(secret, "'", `'\''`),
		}
		if !strings.Contains(secret, "\xff") {
			encodings["JSON"] = jsonOf(t, secret, false)
			encodings["JSON for HTML"] = jsonOf(t, secret, true)
		}
		set := mask.New([]creds.Secret{creds.NewSecret(secret)})
		for name, text := range encodings {
			if got := set.Mask("[" + text + "]"); got != "["+mask.Text+"]" {
				t.Errorf("%s of %q: got %q, want [%s]", name, secret, got, mask.Text)
			}
		}
	}
}

// TestBase64Alignments finds by trial which characters a secret determines,
// wherever it stands in a longer text: exactly these must be masked.
func TestBase64Alignments(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(11, 12))
	for _, alphabet := range []*base64.Encoding{base64.StdEncoding, base64.URLEncoding} {
		for range 200 {
			secret := random(r, 4+r.IntN(30), alnum+"\xff\xfe?>~")
			before, after := r.IntN(7), 1+r.IntN(7)
			encoded := func(around byte) string {
				text := strings.Repeat(string([]byte{around}), before) + secret + strings.Repeat(string([]byte{around}), after)
				return alphabet.EncodeToString([]byte(text))
			}
			// All bits of 0x00 and 0xff differ, and the ones are not the zeros
			// that fill up the last character of a text.
			zeros, ones := encoded(0x00), encoded(0xff)
			first, end := before*8/6, ((before+len(secret))*8+5)/6 // depend on the secret at all
			for zeros[first] != ones[first] {
				first++
			}
			for zeros[end-1] != ones[end-1] {
				end--
			}
			expected := ones[:first] + mask.Text + ones[end:]
			got := mask.New([]creds.Secret{creds.NewSecret(secret)}).Mask(ones)
			if got != expected {
				t.Fatalf("%d bytes, %q, %d bytes in base64: got %q, want %q", before, secret, after, got, expected)
			}
		}
	}
}

// TestBase64Lines is what base64(1) and openssl(1) print of a long secret. Its
// length leaves no last line of fewer than MinLen bytes, which would stay.
func TestBase64Lines(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(13, 14))
	secret := random(r, 399, alnum)
	set := mask.New([]creds.Secret{creds.NewSecret(secret)})
	for _, width := range []int{64, 76} {
		var in, want strings.Builder
		text := base64.StdEncoding.EncodeToString([]byte(secret))
		for line := range slices.Chunk([]byte(text), width) {
			in.WriteString(string(line) + "\n")
			want.WriteString(mask.Text + "\n")
		}
		if got := set.Mask(in.String()); got != want.String() {
			t.Errorf("width %d: got %q, want %q", width, got, want.String())
		}
	}
}

// TestLines prints a secret of several lines whole, line by line, and with
// either end of line, in several encodings.
func TestLines(t *testing.T) {
	t.Parallel()
	for _, end := range []string{"\n", "\r\n"} {
		secret := strings.Join([]string{"", "first line", "  second\tline ", "abc", "", "the last one", ""}, end)
		set := mask.New([]creds.Secret{creds.NewSecret(secret)})
		for _, c := range []struct{ name, in, want string }{
			{"whole, \\n", "<" + strings.ReplaceAll(secret, "\r\n", "\n") + ">", "<***>"},
			{"whole, \\r\\n", "<" + strings.ReplaceAll(strings.ReplaceAll(secret, "\r\n", "\n"), "\n", "\r\n") + ">", "<***>"},
			{"trimmed", "<" + strings.TrimSpace(secret) + ">", "<***>"},
			{"JSON, \\n", `"first line\n  second\tline \nabc\n\nthe last one"`, `"***"`},
			{"JSON, \\r\\n", `"first line\r\n  second\tline \r\nabc\r\n\r\nthe last one"`, `"***"`},
			{"one line", "1: first line\n", "1: ***\n"},
			{"a line and its blanks", "x  second\tline y", "x***y"},
			{"a line without its blanks", "x second\tline; y", "x ***; y"},
			{"other line ends between", "first line\r  second\tline \r", "***\r***\r"},
			{"a short line", "abc", "abc"},
			{"a line in base64", base64.StdEncoding.EncodeToString([]byte("first line")), "***"},
			{"a line in hex", hex.EncodeToString([]byte("the last one")), "***"},
			{"as words", "first line second\tline abc the last one", "*** *** abc ***"},
		} {
			if got := set.Mask(c.in); got != c.want {
				t.Errorf("secret with %q, %s: got %q, want %q", end, c.name, got, c.want)
			}
		}
	}
}
