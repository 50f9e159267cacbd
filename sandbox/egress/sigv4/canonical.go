package sigv4

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
)

// What is signed of a request, as AWS documents it under "Create a signed AWS API
// request".

// sign is the signature of a request under a secret.
func (s *Signature) sign(r *http.Request, secret string) []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n%s\n%s\n", r.Method, s.path(r.URL), canonicalQuery(r.URL.RawQuery))
	for _, name := range s.headers {
		value, _ := fieldOf(r, name)
		fmt.Fprintf(&b, "%s:%s\n", name, value)
	}
	fmt.Fprintf(&b, "\n%s\n%s", strings.Join(s.headers, ";"), s.payload)
	sum := sha256.Sum256([]byte(b.String()))
	return mac(s.key(secret), fmt.Sprintf("%s\n%s\n%s\n%x", algorithm, s.at.Format(stamp), s.scope(), sum))
}

func (s *Signature) scope() string {
	return s.at.Format(day) + "/" + s.Region + "/" + s.Service + "/aws4_request"
}

// key is what signs under a secret in the scope.
func (s *Signature) key(secret string) []byte {
	k := mac([]byte("AWS4"+secret), s.at.Format(day))
	return mac(mac(mac(k, s.Region), s.Service), "aws4_request")
}

func mac(key []byte, text string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(text))
	return h.Sum(nil)
}

// path is the path of a URL in its canonical form: for S3 it is encoded once, for
// others what is sent is encoded once more.
func (s *Signature) path(u *url.URL) string {
	sent := u.EscapedPath()
	if sent == "" {
		return "/"
	}
	segments := strings.Split(sent, "/")
	for i, segment := range segments {
		if plain, err := url.PathUnescape(segment); err == nil && strings.HasPrefix(s.Service, "s3") {
			segment = plain
		}
		segments[i] = escape(segment)
	}
	return strings.Join(segments, "/")
}

// canonicalQuery has the pairs of a query encoded and sorted, without the
// signature.
func canonicalQuery(raw string) string {
	var pairs [][2]string
	for pair := range strings.SplitSeq(raw, "&") {
		k, v, _ := strings.Cut(pair, "=")
		key, kerr := url.QueryUnescape(k)
		value, verr := url.QueryUnescape(v)
		if pair == "" || kerr != nil || verr != nil || key == "X-Amz-Signature" {
			continue // Parse has refused what is malformed
		}
		pairs = append(pairs, [2]string{escape(key), escape(value)})
	}
	slices.SortFunc(pairs, func(a, b [2]string) int { return slices.Compare(a[:], b[:]) })
	all := make([]string, len(pairs))
	for i, p := range pairs {
		all[i] = p[0] + "=" + p[1]
	}
	return strings.Join(all, "&")
}

// escape encodes all but the unreserved characters (RFC 3986 section 2.3).
func escape(s string) string {
	var b strings.Builder
	for i := range len(s) {
		c := s[i]
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~", c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// fieldOf is the value of a header in its canonical form. Some headers are not
// among those of a request that net/http has read.
func fieldOf(r *http.Request, name string) (string, bool) {
	switch name {
	case "host":
		return r.Host, true
	case "content-length":
		return strconv.FormatInt(r.ContentLength, 10), r.ContentLength >= 0
	}
	if name != strings.ToLower(name) {
		return "", false
	}
	values, ok := r.Header[http.CanonicalHeaderKey(name)]
	all := make([]string, len(values))
	for i, v := range values {
		all[i] = strings.Join(strings.FieldsFunc(v, func(c rune) bool { return c == ' ' }), " ")
	}
	return strings.Join(all, ","), ok
}

// emptySum is the digest of nothing.
func emptySum() string {
	sum := sha256.Sum256(nil)
	return hex.EncodeToString(sum[:])
}
