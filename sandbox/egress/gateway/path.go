package gateway

import (
	"net/url"
	"slices"
	"strings"
	"unicode/utf8"
)

// decodings bounds how often a path can be decoded until nothing changes any
// more. A server decodes once; one behind another may do it again.
const decodings = 3

// everything is the pattern that has nothing to compare.
const everything = "/**"

// matches compares an encoded path with a pattern that egress.Request has
// checked. A path that servers can read in two ways must match in all of them.
func matches(pattern, path string) bool {
	if pattern == everything {
		return strings.HasPrefix(path, "/")
	}
	all, ok := readings(path)
	if !ok {
		return false
	}
	want := strings.Split(pattern[1:], "/")
	for _, segments := range all {
		if !matchSegments(want, segments) {
			return false
		}
	}
	return true
}

func matchSegments(want, got []string) bool {
	for i, w := range want {
		switch {
		case w == "**":
			return len(got) > i
		case i >= len(got):
			return false
		case w == "*" && got[i] != "":
		case w != got[i]:
			return false
		}
	}
	return len(got) == len(want)
}

// readings are the segments of a path as they are, each decoded, and those that
// appear when the path is decoded as a whole, and again. It is false for a path
// that means different things to different servers: dot segments, empty ones
// but the last, backslashes, control characters, what is not UTF-8.
func readings(path string) ([][]string, bool) {
	if !strings.HasPrefix(path, "/") {
		return nil, false
	}
	segments := strings.Split(path[1:], "/")
	for i, s := range segments {
		decoded, err := url.PathUnescape(s)
		if err != nil {
			return nil, false
		}
		segments[i] = decoded
	}
	all := [][]string{segments}
	for range decodings {
		decoded, err := url.PathUnescape(path)
		if err != nil {
			decoded = path // a percent sign that is only that
		}
		all = append(all, strings.Split(decoded[1:], "/"))
		if decoded == path {
			return all, !slices.ContainsFunc(all, ambiguous)
		}
		path = decoded
	}
	return nil, false
}

func ambiguous(segments []string) bool {
	for i, s := range segments {
		name, _, _ := strings.Cut(s, ";") // servers in Java take the rest off before they look for dots
		last := i == len(segments)-1
		switch {
		case name == "." || name == "..", name == "" && (!last || s != ""):
			return true
		case !utf8.ValidString(s), strings.ContainsFunc(s, func(c rune) bool { return c < ' ' || c == 0x7f || c == '\\' }):
			return true
		}
	}
	return false
}

// queryKeys are the keys of a query. It is false where servers differ in what
// they are.
func queryKeys(query string) ([]string, bool) {
	if query == "" {
		return nil, true
	}
	if strings.Contains(query, ";") { // a separator for some
		return nil, false
	}
	var keys []string
	for pair := range strings.SplitSeq(query, "&") {
		key, value, _ := strings.Cut(pair, "=")
		name, err := url.QueryUnescape(key)
		if err != nil {
			return nil, false
		}
		if _, err := url.QueryUnescape(value); err != nil {
			return nil, false
		}
		keys = append(keys, name)
	}
	return keys, true
}

// Shape is what a record may say of a path.
func Shape(path string) string { return shape(path) }

// shape is a path for the ledger: what could be a secret, or is no word, is a
// "*" there. A shape is a pattern for the policy, too.
func shape(path string) string {
	const most = 12 // segments; more say nothing
	segments := strings.Split(strings.TrimPrefix(path, "/"), "/")
	for i, s := range segments {
		if i == most {
			return "/" + strings.Join(append(segments[:most], "**"), "/")
		}
		if s != "" && !plain(s) {
			segments[i] = "*"
		}
	}
	return "/" + strings.Join(segments, "/")
}

// plain reports a segment that is a word, or short: tokens are long, and have
// digits, or capitals in between.
func plain(s string) bool {
	const short, long = 8, 40
	if len(s) > long || s == "." || s == ".." {
		return false
	}
	digits, capitals := 0, 0
	for _, c := range s {
		switch {
		case c >= '0' && c <= '9':
			digits++
		case c >= 'A' && c <= 'Z':
			capitals++
		case c >= 'a' && c <= 'z', strings.ContainsRune("-._~@", c):
		default:
			return false
		}
	}
	return len(s) <= short || digits == 0 && capitals <= 3
}
