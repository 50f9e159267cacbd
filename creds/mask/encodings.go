package mask

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/mayfly-ci/mayfly/creds"
)

// needlesOf returns everything that gives values away, each of their forms in
// each encoding, sorted and each once.
func needlesOf(values []creds.Secret) []string {
	var needles []string
	for _, v := range values {
		for _, form := range forms(v.Reveal()) {
			needles = append(needles, form, quoteShell(form))
			needles = appendHex(needles, form)
			needles = appendBase64(needles, form)
			needles = appendPercent(needles, form)
			needles = appendJSON(needles, form)
		}
	}
	slices.Sort(needles)
	return slices.Compact(needles)
}

// forms returns v and what tools make of it before they encode it: with either
// end of line, line by line, and each of these without the white space around
// it. What is shorter than MinLen without white space is left out.
func forms(v string) []string {
	unix := strings.ReplaceAll(v, "\r\n", "\n")
	whole := []string{v, unix, strings.ReplaceAll(unix, "\n", "\r\n")}
	seen := map[string]bool{}
	var all []string
	for _, form := range append(whole, strings.Split(unix, "\n")...) {
		trimmed := strings.TrimSpace(form)
		if len(trimmed) < MinLen {
			continue
		}
		for _, f := range []string{form, trimmed} {
			if !seen[f] {
				seen[f] = true
				all = append(all, f)
			}
		}
	}
	return all
}

// quoteShell is how "set -x" shows a word, and how scripts quote one.
func quoteShell(v string) string { return strings.ReplaceAll(v, "'", `'\''`) }

// appendHex appends the two spellings of RFC 4648 section 8.
func appendHex(needles []string, v string) []string {
	lower := hex.EncodeToString([]byte(v))
	return append(needles, lower, strings.ToUpper(lower))
}

// appendBase64 appends v as it stands in a longer text that was encoded by
// RFC 4648 section 4 or 5: v may begin at any of the three places in a group
// of three bytes. Characters that also depend on the bytes around v are left
// out, except for the last one where v ends the text, with and without the
// padding.
func appendBase64(needles []string, v string) []string {
	for _, alphabet := range []*base64.Encoding{base64.StdEncoding, base64.URLEncoding} {
		for before := range 3 {
			first := (before*8 + 5) / 6        // character that depends on nothing before v
			after := (before + len(v)) * 8 / 6 // character that depends on what is after v
			padded := alphabet.EncodeToString(append(make([]byte, before), v...))
			needles = append(needles,
				padded[first:after],
				strings.TrimRight(padded[first:], "="),
				padded[first:])
		}
	}
	// RFC 2045 section 6.8 and RFC 7468: base64(1) and openssl(1) break lines
	// after 76 and 64 characters, which are 57 and 48 bytes. A rest that is
	// shorter than MinLen stays, as a line of a secret does.
	for _, width := range []int{57, 48} {
		for rest := v; len(rest) >= MinLen; rest = rest[min(width, len(rest)):] {
			line := base64.StdEncoding.EncodeToString([]byte(rest[:min(width, len(rest))]))
			needles = append(needles, line)
		}
	}
	return needles
}

// appendPercent appends v in the percent encodings of RFC 3986 section 2, with a
// blank as %20 and as the + of HTML forms. They differ in what they leave alone
// besides the unreserved characters: nothing; what net/url leaves in a path
// segment; what JavaScript's encodeURIComponent and what Python's quote leave.
func appendPercent(needles []string, v string) []string {
	for _, digits := range []string{"0123456789ABCDEF", "0123456789abcdef"} {
		for _, keep := range []string{"", "$&+=:@", "!'()*", "/"} {
			escaped := percent(v, keep, digits)
			if escaped == v {
				continue
			}
			needles = append(needles, escaped, strings.ReplaceAll(escaped, "%20", "+"))
		}
	}
	return needles
}

func percent(v, keep, digits string) string {
	var b strings.Builder
	for i := range len(v) {
		c := v[i]
		unreserved := '0' <= c && c <= '9' || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z' || strings.IndexByte("-._~", c) >= 0
		if unreserved || strings.IndexByte(keep, c) >= 0 {
			b.WriteByte(c)
		} else {
			b.Write([]byte{'%', digits[c>>4], digits[c&15]})
		}
	}
	return b.String()
}

// appendJSON appends v as the inside of a string of RFC 8259 section 7, plain
// and with <, > and & escaped for HTML. JSON cannot carry bytes that are not
// UTF-8.
func appendJSON(needles []string, v string) []string {
	if !utf8.ValidString(v) {
		return needles
	}
	for _, html := range []bool{false, true} {
		var b strings.Builder
		e := json.NewEncoder(&b)
		e.SetEscapeHTML(html)
		if e.Encode(v) == nil { // a string is never refused
			needles = append(needles, b.String()[1:b.Len()-2])
		}
	}
	return needles
}
