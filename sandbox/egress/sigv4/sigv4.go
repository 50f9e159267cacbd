// Package sigv4 reads, verifies and makes the signatures by which AWS, and what
// speaks its protocol, knows who sends a request: Signature Version 4, in the
// header, in the query (presigned), and of bodies in signed chunks.
//
// A request is verified with the key that its sender has and signed anew with
// another. Nothing of the body is held back but one signed chunk, which is
// signed before its data are sent.
package sigv4

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	algorithm = "AWS4-HMAC-SHA256"
	stamp     = "20060102T150405Z"
	day       = "20060102"
	// skew is how far the clocks of AWS and of its callers may be apart.
	skew = 15 * time.Minute
	// lifetime is that of a presigned request that was signed anew: it is sent at
	// once.
	lifetime = time.Minute
	// longest is what a presigned request may live (Expires).
	longest = 7 * 24 * time.Hour
)

// What stands in X-Amz-Content-Sha256 in place of a digest.
const (
	unsigned        = "UNSIGNED-PAYLOAD"
	unsignedTrailer = "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
	signedChunks    = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD"
	signedTrailer   = "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER"
)

// ErrUnsigned reports a request without a signature or anything like it.
var ErrUnsigned = errors.New("the request is not signed")

// A Key is what signs. Its holder reveals it for as long as a call takes.
type Key struct {
	ID, Secret string
	Session    string // the session token; "" if the key has none
}

// A Signature is what a request says of its own.
type Signature struct {
	KeyID   string
	Session string // the session token that it names
	// Region and Service are those that it was made for. It is worth nothing
	// for others.
	Region, Service string

	presigned bool
	headers   []string // the names that are signed, in lower case and sorted
	at        time.Time
	expires   time.Duration // of a presigned one
	value     []byte
	payload   string // a digest or what stands in its place
	summed    bool   // the digest is not in the request
}

// parameters are the keys of a presigned query.
func parameters() []string {
	return []string{
		"X-Amz-Algorithm", "X-Amz-Credential", "X-Amz-Date", "X-Amz-Expires", "X-Amz-SignedHeaders", "X-Amz-Signature", "X-Amz-Security-Token",
	}
}

// Parse reads the signature of a request. What authenticates in another way as
// well, or in a way that this package does not know, is an error.
func Parse(r *http.Request) (*Signature, error) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, errors.New("the query can be read in two ways")
	}
	auth := r.Header["Authorization"]
	inQuery := false
	for key := range query {
		inQuery = inQuery || key == "AWSAccessKeyId" || key == "Signature" // of version 2
		for _, p := range parameters() {
			inQuery = inQuery || strings.EqualFold(key, p)
		}
	}
	s := &Signature{presigned: inQuery}
	switch {
	case len(auth) > 1, len(auth) > 0 && inQuery:
		return nil, errors.New("the request has more than one signature")
	case inQuery:
		err = s.readQuery(query)
	case len(auth) == 1:
		err = s.readHeader(r, auth[0])
	case len(r.Header["X-Amz-Security-Token"]) > 0:
		return nil, errors.New("the request has a session token without a signature")
	default:
		return nil, ErrUnsigned
	}
	if err == nil {
		err = s.readPayload(r, query)
	}
	if err == nil && (!slices.IsSorted(s.headers) || !slices.Contains(s.headers, "host")) {
		err = errors.New("the signed headers are not sorted, or the host is not among them")
	}
	return s, err
}

func (s *Signature) readHeader(r *http.Request, auth string) error {
	rest, ok := strings.CutPrefix(auth, algorithm+" ")
	if !ok {
		return errors.New("the request is not signed by " + algorithm)
	}
	fields := map[string]string{}
	for part := range strings.SplitSeq(rest, ",") {
		k, v, ok := strings.Cut(strings.TrimSpace(part), "=")
		if _, twice := fields[k]; twice || !ok {
			return errors.New("the Authorization of the request is malformed")
		}
		fields[k] = v
	}
	date := r.Header["X-Amz-Date"]
	session := r.Header["X-Amz-Security-Token"]
	if len(fields) != 3 || len(date) != 1 || len(session) > 1 {
		return errors.New("the signature of the request lacks a part, has one too many, or has no X-Amz-Date")
	}
	s.Session = strings.Join(session, "")
	return s.read(fields["Credential"], fields["SignedHeaders"], fields["Signature"], date[0])
}

func (s *Signature) readQuery(query url.Values) error {
	for _, p := range parameters() {
		if n := len(query[p]); n > 1 || n == 0 && p != "X-Amz-Security-Token" {
			return fmt.Errorf("the presigned request has %d of %s", n, p)
		}
	}
	if query.Get("X-Amz-Algorithm") != algorithm {
		return errors.New("the request is not presigned by " + algorithm)
	}
	seconds, err := strconv.ParseUint(query.Get("X-Amz-Expires"), 10, 31)
	if s.expires = time.Duration(seconds) * time.Second; err != nil || s.expires > longest {
		return errors.New("the presigned request has a bad X-Amz-Expires")
	}
	s.Session = query.Get("X-Amz-Security-Token")
	return s.read(query.Get("X-Amz-Credential"), query.Get("X-Amz-SignedHeaders"), query.Get("X-Amz-Signature"), query.Get("X-Amz-Date"))
}

func (s *Signature) read(credential, headers, signature, date string) error {
	scope := strings.Split(credential, "/")
	at, err := time.Parse(stamp, date)
	value, herr := hex.DecodeString(signature)
	switch {
	case len(scope) != 5 || scope[4] != "aws4_request":
		return errors.New("the scope of the signature is malformed")
	case err != nil || scope[1] != at.Format(day):
		return errors.New("the date of the signature is malformed, or not that of its scope")
	case herr != nil || len(value) != sha256.Size:
		return errors.New("the signature is malformed")
	}
	s.KeyID, s.Region, s.Service = scope[0], scope[2], scope[3]
	s.headers, s.at, s.value = strings.Split(headers, ";"), at, value
	return nil
}

// readPayload finds what the signature says of the body.
func (s *Signature) readPayload(r *http.Request, query url.Values) error {
	given := append(r.Header["X-Amz-Content-Sha256"], query["X-Amz-Content-Sha256"]...)
	digest, err := []byte(nil), error(nil)
	if len(given) == 1 {
		s.payload = given[0]
		digest, err = hex.DecodeString(s.payload)
	}
	switch {
	case len(given) > 1:
		return errors.New("the request has several digests of its body")
	case len(given) == 0 && s.presigned && strings.HasPrefix(s.Service, "s3"):
		s.payload = unsigned
	case len(given) == 0:
		s.summed = true
	case slices.Contains([]string{unsigned, unsignedTrailer}, s.payload):
	case s.streamed() && !s.presigned:
	case err != nil || len(digest) != sha256.Size:
		return fmt.Errorf("the request says of its body what is not known: %.60q", s.payload)
	}
	return nil
}

func (s *Signature) streamed() bool { return s.payload == signedChunks || s.payload == signedTrailer }

// Summed says that the digest of the body is not in the request, so that it must
// be known before the request is verified. AWS's own libraries leave it out for
// all services but S3.
func (s *Signature) Summed() bool { return s.summed }

// Holds says that memory is needed for the body, or for a chunk of it.
func (s *Signature) Holds() bool { return s.summed || s.streamed() }

// SetSum is the digest of the body if Summed.
func (s *Signature) SetSum(body []byte) {
	sum := sha256.Sum256(body)
	s.payload = hex.EncodeToString(sum[:])
}

// Verify says why the request was not signed with the secret, or is too old.
// What is signed in chunks is verified as it is read from the body that Resign
// leaves.
func (s *Signature) Verify(r *http.Request, secret string, now time.Time) error {
	for name := range r.Header {
		if lower := strings.ToLower(name); strings.HasPrefix(lower, "x-amz-") && !slices.Contains(s.headers, lower) {
			return fmt.Errorf("the header %.60q is not signed", lower)
		}
	}
	for i, name := range s.headers {
		if _, ok := fieldOf(r, name); !ok || i > 0 && name == s.headers[i-1] {
			return fmt.Errorf("the header %.60q is signed, and not there once", name)
		}
	}
	age := now.Sub(s.at)
	switch {
	case age < -skew:
		return errors.New("the signature is of the future")
	case s.presigned && age > s.expires, !s.presigned && age > skew:
		return errors.New("the signature is too old")
	}
	if !hmac.Equal(s.sign(r, secret), s.value) {
		return errors.New("the signature is not made with the key that the job has, or not of this request")
	}
	return nil
}

// Resign replaces the signature of a request that was verified by one of the
// key, made now. out is the request, perhaps without some of its headers, which
// are no longer signed then. A body of signed chunks is replaced by one whose
// chunks are verified and signed anew as they are read.
func (s *Signature) Resign(out *http.Request, secret string, key Key, now time.Time) {
	n := *s
	n.KeyID, n.Session, n.at, n.expires = key.ID, key.Session, now.UTC(), lifetime
	Clear(out)
	n.headers = nil
	for _, name := range s.headers {
		if _, ok := fieldOf(out, name); ok {
			n.headers = append(n.headers, name)
		}
	}
	if s.presigned {
		n.presign(out, key)
		return
	}
	out.Header.Set("X-Amz-Date", n.at.Format(stamp))
	n.headers = append(n.headers, "x-amz-date")
	if key.Session != "" {
		out.Header.Set("X-Amz-Security-Token", key.Session)
		n.headers = append(n.headers, "x-amz-security-token")
	}
	slices.Sort(n.headers)
	n.headers = slices.Compact(n.headers)
	n.value = n.sign(out, key.Secret)
	out.Header.Set("Authorization", fmt.Sprintf("%s Credential=%s/%s, SignedHeaders=%s, Signature=%x",
		algorithm, n.KeyID, n.scope(), strings.Join(n.headers, ";"), n.value))
	if s.streamed() && out.Body != nil {
		out.Body = newChunks(out.Body, s.chain(secret), n.chain(key.Secret), s.payload == signedTrailer)
	}
}

func (s *Signature) presign(out *http.Request, key Key) {
	pairs := []string{}
	if out.URL.RawQuery != "" {
		pairs = append(pairs, out.URL.RawQuery)
	}
	for _, p := range [][2]string{
		{"X-Amz-Algorithm", algorithm},
		{"X-Amz-Credential", s.KeyID + "/" + s.scope()},
		{"X-Amz-Date", s.at.Format(stamp)},
		{"X-Amz-Expires", strconv.Itoa(int(s.expires / time.Second))},
		{"X-Amz-Security-Token", key.Session},
		{"X-Amz-SignedHeaders", strings.Join(s.headers, ";")},
	} {
		if p[1] != "" {
			pairs = append(pairs, p[0]+"="+escape(p[1]))
		}
	}
	out.URL.RawQuery = strings.Join(pairs, "&")
	out.URL.RawQuery += "&X-Amz-Signature=" + hex.EncodeToString(s.sign(out, key.Secret))
}

// Clear removes what a signature is made of from a request.
func Clear(r *http.Request) {
	for _, name := range []string{"Authorization", "X-Amz-Date", "X-Amz-Security-Token"} {
		r.Header.Del(name)
	}
	pairs := strings.Split(r.URL.RawQuery, "&")
	r.URL.RawQuery = strings.Join(slices.DeleteFunc(pairs, func(p string) bool {
		k, _, _ := strings.Cut(p, "=")
		key, err := url.QueryUnescape(k)
		return err == nil && slices.Contains(parameters(), key)
	}), "&")
}
