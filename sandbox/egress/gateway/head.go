package gateway

import (
	"bytes"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// A framing is what the head of a message of HTTP/1 says of its body (RFC 9112
// section 6).
type framing struct {
	status  int   // of an answer
	length  int64 // -1: none is given
	chunked bool

	lengths, encodings, hosts int // how often they are given

	old          bool   // HTTP/1.0
	target, host string // of a request
}

// readHead reads a head to its empty line, and says what in it is read in several
// ways by those who take it.
func readHead(head []byte, answer bool) (how framing, why string) {
	how.length = -1
	first := true
	for line := range bytes.Lines(head) {
		text, ok := ended(line, answer)
		switch {
		case !ok:
			return how, "a line does not end in CR LF"
		case first && answer:
			why = how.statusLine(text)
		case first:
			why = how.requestLine(text)
		case len(text) > 0:
			why = how.field(text, answer)
		}
		if why != "" {
			return how, why
		}
		first = false
	}
	switch {
	case how.encodings > 0 && how.lengths > 0:
		return how, "Content-Length stands beside Transfer-Encoding"
	case how.encodings > 1:
		return how, "Transfer-Encoding is given twice"
	case how.lengths > 1:
		return how, "Content-Length is given twice"
	case how.hosts > 1 && !answer:
		return how, "Host is given twice"
	case how.encodings > 0 && how.old:
		return how, "Transfer-Encoding stands in HTTP/1.0"
	case !answer && !how.oneHost():
		return how, "its target names another host than Host"
	}
	return how, ""
}

// ended takes the end off a line. Servers that end lines in LF alone are left to
// be, since nobody reads their answers but the gateway.
func ended(line []byte, answer bool) (text []byte, ok bool) {
	text, ok = bytes.CutSuffix(line, []byte("\r\n"))
	if !ok && answer {
		text, ok = bytes.CutSuffix(line, []byte("\n"))
	}
	return text, ok
}

// oneHost compares Host with a target that is a whole URL, as proxies get it (RFC
// 9112 section 3.2.2).
func (how *framing) oneHost() bool {
	scheme, rest, whole := strings.Cut(how.target, "://")
	if !whole || strings.HasPrefix(scheme, "/") {
		return true
	}
	port := ":80"
	if strings.EqualFold(scheme, "https") {
		port = ":443"
	}
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		rest = rest[:i]
	}
	return strings.EqualFold(strings.TrimSuffix(rest, port), strings.TrimSuffix(how.host, port))
}

// requestLine refuses one that is not three words. The words are for others.
func (how *framing) requestLine(text []byte) string {
	words := bytes.Split(text, []byte(" "))
	if len(words) != 3 || len(words[1]) == 0 || !slices.Contains([]string{"HTTP/1.1", "HTTP/1.0", "HTTP/2.0"}, string(words[2])) {
		return "its first line is not a method, a target and a version, with one blank between"
	}
	if !name(words[0]) || bytes.ContainsFunc(words[1], func(c rune) bool { return c < ' ' || c == 0x7f }) {
		return "its first line has a control character, or a method that is no word"
	}
	how.target, how.old = string(words[1]), string(words[2]) == "HTTP/1.0"
	return ""
}

// statusLine reads that of an answer.
func (how *framing) statusLine(text []byte) string {
	version, rest, _ := bytes.Cut(text, []byte(" "))
	code, _, _ := bytes.Cut(rest, []byte(" "))
	n, err := strconv.Atoi(string(code))
	if err != nil || len(code) != 3 || n < 100 || !bytes.HasPrefix(version, []byte("HTTP/1.")) {
		return "its first line is not a version and a status"
	}
	how.status, how.old = n, string(version) == "HTTP/1.0"
	return ""
}

// field reads a field, and says what is wrong with it.
func (how *framing) field(text []byte, answer bool) string {
	key, value, ok := bytes.Cut(text, []byte(":"))
	switch {
	case text[0] == ' ' || text[0] == '\t':
		return "a field is folded"
	case !ok || !name(key):
		return fmt.Sprintf("a field is called %q", printable(string(key)))
	case bytes.ContainsFunc(value, func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f }):
		return "a field has a control character"
	}
	value = bytes.Trim(value, " \t")
	switch {
	case alike(key, "content-length"):
		how.lengths++
		n, err := strconv.ParseInt(string(value), 10, 64)
		if err != nil || bytes.IndexByte(key, '_') >= 0 || bytes.ContainsAny(value, "+-") {
			return fmt.Sprintf("%s is %q", key, printable(string(value)))
		}
		how.length = n
	case alike(key, "transfer-encoding"):
		how.encodings++
		if !bytes.EqualFold(value, []byte("chunked")) || bytes.IndexByte(key, '_') >= 0 {
			return fmt.Sprintf("%s is %q", key, printable(string(value)))
		}
		how.chunked = true
	case bytes.EqualFold(key, []byte("host")) && !answer:
		how.hosts++
		how.host = string(value)
	}
	return ""
}

// alike compares a name of a field as those servers do that take "_" for "-".
func alike(key []byte, with string) bool {
	return len(key) == len(with) && strings.EqualFold(strings.ReplaceAll(string(key), "_", "-"), with)
}

// name reports a token (RFC 9110 section 5.6.2).
func name(word []byte) bool {
	for _, c := range word {
		if (c|0x20 < 'a' || c|0x20 > 'z') && (c < '0' || c > '9') && bytes.IndexByte([]byte("!#$%&'*+-.^_`|~"), c) < 0 {
			return false
		}
	}
	return len(word) > 0
}
