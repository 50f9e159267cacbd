package egress

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// A Request narrows what a rule lets through of HTTP. Every field has to allow
// a request. What a gateway can read in two ways must be allowed in both.
type Request struct {
	Methods []string // upper case; at least one
	// Path is a pattern of the path: segments that are compared as they are, "*"
	// for one segment, and at the end "**" for any number of them. "/**" is every
	// path. It is written without percent-encoding.
	Path string
	// Query are the keys that the query may have. nil: any; empty: no query.
	Query []string `json:",omitzero"`
	// ContentTypes are the media types that the body of a request may have, as
	// "application/json" or "image/*". nil: any, also none.
	ContentTypes []string `json:",omitzero"`
	// Sent and Received bound the bytes of one body, each way. A WebSocket's
	// bytes are its bodies. 0: unbounded.
	Sent     int64 `json:",omitempty"`
	Received int64 `json:",omitempty"`
	// Count bounds the requests that pass while the rule is open. 0: unbounded.
	Count int `json:",omitempty"`
	// Rate is how many requests may start in any minute. What comes faster is
	// held back. 0: unbounded.
	Rate int `json:",omitempty"`
	// WebSocket lets a GET become a WebSocket (RFC 6455). No other upgrade is
	// ever carried.
	WebSocket bool `json:",omitempty"`
}

// mostRate is ten thousand a second, which is more than one job gets through.
const mostRate = 600_000

// Check says why the request cannot be enforced as it is written.
func (r Request) Check() error {
	var all []error
	if len(r.Methods) == 0 {
		all = append(all, errors.New("methods: at least one is needed"))
	}
	for _, m := range r.Methods {
		if m == "" || strings.Trim(m, "ABCDEFGHIJKLMNOPQRSTUVWXYZ-") != "" || m == "CONNECT" {
			all = append(all, fmt.Errorf("method %q: an upper-case name is needed, and CONNECT is never carried", m))
		}
	}
	all = append(all, checkPattern(r.Path))
	for _, k := range r.Query {
		if k == "" || strings.ContainsFunc(k, unprintable) {
			all = append(all, fmt.Errorf("query key %q: printable ASCII is needed, as it is when decoded", k))
		}
	}
	if r.ContentTypes != nil && len(r.ContentTypes) == 0 {
		all = append(all, errors.New("content types: an empty list allows none; leave it out, or name some"))
	}
	for _, t := range r.ContentTypes {
		if err := checkMediaType(t); err != nil {
			all = append(all, err)
		}
	}
	if r.Rate > mostRate {
		all = append(all, fmt.Errorf("rate %d: at most %d can be counted", r.Rate, mostRate))
	}
	if r.Sent < 0 || r.Received < 0 || r.Count < 0 || r.Rate < 0 {
		all = append(all, errors.New("a bound is negative"))
	}
	if r.WebSocket && !slices.Contains(r.Methods, "GET") {
		all = append(all, errors.New("a WebSocket begins with GET, which is not among the methods"))
	}
	return errors.Join(all...)
}

// checkPattern refuses patterns that no path, or no path in one reading, is
// compared with as the author thinks.
func checkPattern(p string) error {
	rest, ok := strings.CutPrefix(p, "/")
	if !ok {
		return fmt.Errorf("path %q: it begins with /", p)
	}
	if len(p) > 1000 {
		return errors.New("path: it has more than 1000 bytes")
	}
	segments := strings.Split(rest, "/")
	for i, s := range segments {
		last := i == len(segments)-1
		switch {
		case s == "*", s == "**" && last, s == "" && last:
		case s == "**":
			return fmt.Errorf("path %q: ** stands at the end alone", p)
		case strings.Contains(s, "*"):
			return fmt.Errorf("path %q: * stands for a whole segment", p)
		case s == "", s == ".", s == "..":
			return fmt.Errorf("path %q: a segment is empty or made of dots", p)
		case strings.ContainsFunc(s, func(c rune) bool { return !pathChar(c) }):
			return fmt.Errorf("path %q: a segment is made of letters, digits and -._~!$&'()+,=:@, without percent-encoding", p)
		}
	}
	return nil
}

// pathChar is a character of a path that has no other spelling and no other
// meaning (RFC 3986 section 3.3). "*" is a wildcard here, and ";" begins
// parameters for some servers.
func pathChar(c rune) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("-._~!$&'()+,=:@", c)
}

func unprintable(c rune) bool { return c <= ' ' || c >= 0x7f }

func checkMediaType(t string) error {
	main, sub, ok := strings.Cut(t, "/")
	good := func(s string) bool {
		return s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789.+-_") == ""
	}
	if !ok || !good(main) || sub != "*" && !good(sub) {
		return fmt.Errorf("content type %q: write it in lower case as application/json or image/*, without parameters", t)
	}
	return nil
}
