package sigv4_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress/sigv4"
)

// The key and the requests of the examples in AWS's documentation of S3.
const (
	exampleID     = "AKIAIOSFODNN7EXAMPLE"
	exampleSecret = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
	exampleScope  = exampleID + "/20130524/us-east-1/s3/aws4_request"
	emptyDigest   = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
)

func then() time.Time { return time.Date(2013, 5, 24, 0, 0, 0, 0, time.UTC) }

func example() sigv4.Key { return sigv4.Key{ID: exampleID, Secret: exampleSecret} }

// request is one of fields "Name: value".
func request(t testing.TB, method, url, body string, fields ...string) *http.Request {
	t.Helper()
	r, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range fields {
		name, value, _ := strings.Cut(f, ": ")
		r.Header.Add(name, value)
	}
	return r
}

func authorization(headers, signature string) string {
	return "Authorization: AWS4-HMAC-SHA256 Credential=" + exampleScope + ",SignedHeaders=" + headers + ",Signature=" + signature
}

// examples are requests of the documentation, with their signatures.
func examples(t testing.TB) map[string]*http.Request {
	const bucket = "https://examplebucket.s3.amazonaws.com"
	const date, digest = "X-Amz-Date: 20130524T000000Z", "X-Amz-Content-Sha256: " + emptyDigest
	return map[string]*http.Request{
		"f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41": request(t, "GET", bucket+"/test.txt", "", date, digest, "Range: bytes=0-9",
			authorization("host;range;x-amz-content-sha256;x-amz-date", "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41")),
		"34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7": request(t, "GET", bucket+"/?max-keys=2&prefix=J", "", date, digest,
			authorization("host;x-amz-content-sha256;x-amz-date", "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7")),
		"98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd": request(t, "PUT", bucket+"/test$file.text", "Welcome to Amazon S3.", date,
			"Date: Fri, 24 May 2013 00:00:00 GMT", "X-Amz-Storage-Class: REDUCED_REDUNDANCY",
			"X-Amz-Content-Sha256: 44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072",
			authorization("date;host;x-amz-content-sha256;x-amz-date;x-amz-storage-class", "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd")),
		"aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404": request(t, "GET", bucket+"/test.txt?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential="+
			strings.ReplaceAll(exampleScope, "/", "%2F")+"&X-Amz-Date=20130524T000000Z&X-Amz-Expires=86400&X-Amz-SignedHeaders=host&X-Amz-Signature=aeeed9bbccd4d02ee5c0109b86d86835f995330da4c265957d157751f604d404", ""),
	}
}

// TestExamples: what AWS signed is verified, and signed anew with the same key at
// the same time it has the same signature.
func TestExamples(t *testing.T) {
	t.Parallel()
	for want, r := range examples(t) {
		s, err := sigv4.Parse(r)
		if err != nil {
			t.Fatal(err)
		}
		if s.KeyID != exampleID || s.Region != "us-east-1" || s.Service != "s3" || s.Summed() || s.Holds() {
			t.Errorf("read %+v", s)
		}
		if err := s.Verify(r, exampleSecret, then()); err != nil {
			t.Errorf("%s: %v", r.URL.Path, err)
		}
		if err := s.Verify(r, exampleSecret+"x", then()); err == nil {
			t.Errorf("%s: verified with another secret", r.URL.Path)
		}
		if err := s.Verify(r, exampleSecret, then().Add(8*24*time.Hour)); err == nil {
			t.Errorf("%s: verified when it was old", r.URL.Path)
		}
		if err := s.Verify(r, exampleSecret, then().Add(-time.Hour)); err == nil {
			t.Errorf("%s: verified before it was made", r.URL.Path)
		}
		s.Resign(r, exampleSecret, example(), then())
		if r.URL.Query().Has("X-Amz-Signature") {
			if got := r.URL.Query().Get("X-Amz-Expires"); got != "60" {
				t.Errorf("what is sent at once lives %s seconds", got)
			}
			continue
		}
		if got := r.Header.Get("Authorization"); !strings.HasSuffix(got, "Signature="+want) {
			t.Errorf("%s: got %s", r.URL.Path, got)
		}
	}
}

// TestChanged: a request of which anything that is signed was changed, or that
// has more of what has to be signed, is not verified.
func TestChanged(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*http.Request){
		"method":               func(r *http.Request) { r.Method = "DELETE" },
		"path":                 func(r *http.Request) { r.URL.Path += "x" },
		"host":                 func(r *http.Request) { r.Host = "other.s3.amazonaws.com" },
		"query":                func(r *http.Request) { r.URL.RawQuery += "&x=y" },
		"an unsigned header":   func(r *http.Request) { r.Header.Set("X-Amz-Acl", "public-read") },
		"no longer the header": func(r *http.Request) { r.Header.Del("Range"); r.Header.Del("Date"); r.URL.RawQuery += "&a" },
	} {
		for _, r := range examples(t) {
			s, err := sigv4.Parse(r)
			if err != nil {
				t.Fatal(err)
			}
			change(r)
			if err := s.Verify(r, exampleSecret, then()); err == nil {
				t.Errorf("%s: %s %s is verified", name, r.Method, r.URL)
			}
		}
	}
}

// TestParse: what cannot be read in one way is refused.
func TestParse(t *testing.T) {
	t.Parallel()
	const good = "host;x-amz-date"
	sig := strings.Repeat("ab", 32)
	for name, r := range map[string]*http.Request{
		"version 2":              request(t, "GET", "https://h/", "", "Authorization: AWS AKIA:abc"),
		"version 2 in the query": request(t, "GET", "https://h/?AWSAccessKeyId=x&Signature=y&Expires=1", ""),
		"asymmetric":             request(t, "GET", "https://h/", "", "Authorization: AWS4-ECDSA-P256-SHA256 Credential=a, SignedHeaders=host, Signature=00"),
		"no date":                request(t, "GET", "https://h/", "", authorization(good, sig)),
		"another day":            request(t, "GET", "https://h/", "", "X-Amz-Date: 20130525T000000Z", authorization(good, sig)),
		"two signatures":         request(t, "GET", "https://h/", "", "X-Amz-Date: 20130524T000000Z", authorization(good, sig), authorization(good, sig)),
		"header and query":       request(t, "GET", "https://h/?X-Amz-Signature=x", "", "X-Amz-Date: 20130524T000000Z", authorization(good, sig)),
		"key of another case":    request(t, "GET", "https://h/?x-amz-signature=x", ""),
		"a session alone":        request(t, "GET", "https://h/", "", "X-Amz-Security-Token: x"),
		"a part twice":           request(t, "GET", "https://h/", "", "X-Amz-Date: 20130524T000000Z", authorization(good, sig)+", Signature="+sig),
		"the host not signed":    request(t, "GET", "https://h/", "", "X-Amz-Date: 20130524T000000Z", authorization("x-amz-date", sig)),
		"headers not sorted":     request(t, "GET", "https://h/", "", "X-Amz-Date: 20130524T000000Z", authorization("x-amz-date;host", sig)),
		"a short signature":      request(t, "GET", "https://h/", "", "X-Amz-Date: 20130524T000000Z", authorization(good, "abcd")),
		"an unknown payload":     request(t, "GET", "https://h/", "", "X-Amz-Date: 20130524T000000Z", "X-Amz-Content-Sha256: STREAMING-AWS4-ECDSA-P256-SHA256-PAYLOAD", authorization(good, sig)),
		"two digests":            request(t, "GET", "https://h/?X-Amz-Content-Sha256=UNSIGNED-PAYLOAD", "", "X-Amz-Date: 20130524T000000Z", "X-Amz-Content-Sha256: UNSIGNED-PAYLOAD", authorization(good, sig)),
		"a query of two ways":    request(t, "GET", "https://h/?a;b=%zz", ""),
	} {
		if _, err := sigv4.Parse(r); err == nil || errors.Is(err, sigv4.ErrUnsigned) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if _, err := sigv4.Parse(request(t, "GET", "https://h/?a=b", "", "X-Amz-Meta-A: b")); !errors.Is(err, sigv4.ErrUnsigned) {
		t.Errorf("unsigned: got %v", err)
	}
}

// TestOther: a service whose signatures have a digest of the body that is sent
// beside nothing; a session token; a path that is encoded twice.
func TestOther(t *testing.T) {
	t.Parallel()
	const body = "Action=GetCallerIdentity&Version=2011-06-15"
	r := request(t, "POST", "https://sts.example/a%20b/", body, "X-Amz-Date: 20130524T000000Z", "X-Amz-Security-Token: place",
		strings.Replace(authorization("host;x-amz-date;x-amz-security-token", strings.Repeat("ab", 32)), "/s3/", "/sts/", 1))
	s, err := sigv4.Parse(r)
	if err != nil || !s.Summed() || !s.Holds() || s.Session != "place" || s.Service != "sts" {
		t.Fatalf("got %+v, %v", s, err)
	}
	s.SetSum([]byte(body))
	if err := s.Verify(r, exampleSecret, then()); err == nil {
		t.Error("a signature that nobody made is verified")
	}
	key := sigv4.Key{ID: "REAL", Secret: "real secret", Session: "real session"}
	s.Resign(r, exampleSecret, key, then())
	again, err := sigv4.Parse(r)
	if err != nil || again.KeyID != "REAL" || again.Session != "real session" {
		t.Fatalf("got %+v, %v", again, err)
	}
	again.SetSum([]byte(body))
	if err := again.Verify(r, key.Secret, then()); err != nil {
		t.Error(err)
	}
	again.SetSum([]byte(body + "x"))
	if err := again.Verify(r, key.Secret, then()); err == nil {
		t.Error("another body is verified")
	}
}

// chunked is the example of signed chunks: 65 KiB of "a".
func chunked(t testing.TB, body string) *http.Request {
	return request(t, "PUT", "https://s3.amazonaws.com/examplebucket/chunkObject.txt", body,
		"X-Amz-Date: 20130524T000000Z", "X-Amz-Storage-Class: REDUCED_REDUNDANCY", "Content-Encoding: aws-chunked",
		"X-Amz-Content-Sha256: STREAMING-AWS4-HMAC-SHA256-PAYLOAD", "X-Amz-Decoded-Content-Length: 66560",
		authorization("content-encoding;content-length;host;x-amz-content-sha256;x-amz-date;x-amz-decoded-content-length;x-amz-storage-class",
			"4f232c4386841ef735655705268965c44a0e4690baa4adea153f7db9fa80a0a9"))
}

func chunk(n int, signature string) string {
	return fmt.Sprintf("%x;chunk-signature=%s\r\n%s\r\n", n, signature, strings.Repeat("a", n))
}

func exampleChunks() []string {
	return []string{
		chunk(65536, "ad80c730a21e5b8d04586a2213dd63b9a0e99e0e2307b0ade35a65485a288648"),
		chunk(1024, "0055627c9e194cb4542bae2aa5492e3c1575bbb81b612b7d234b86a503ef5497"),
		chunk(0, "b6c6ea8a5354eaf15b3cb7646744f4275b71ea724fed81ceb9323e279d449df9"),
	}
}

// resigned is what becomes of the body of the example.
func resigned(t testing.TB, body string, key sigv4.Key) (string, error) {
	t.Helper()
	r := chunked(t, body)
	s, err := sigv4.Parse(r)
	if err != nil || !s.Holds() {
		t.Fatalf("got %+v, %v", s, err)
	}
	if err := s.Verify(r, exampleSecret, then()); int64(len(body)) == 66824 && err != nil {
		t.Fatal(err)
	}
	s.Resign(r, exampleSecret, key, then())
	b, err := io.ReadAll(r.Body)
	return string(b), errors.Join(err, r.Body.Close())
}

// TestChunks: the chunks of the example come out as they went in under the same
// key, of the same length under another, and not at all if one is not as it was
// signed.
func TestChunks(t *testing.T) {
	t.Parallel()
	parts := exampleChunks()
	whole := strings.Join(parts, "")
	if got, err := resigned(t, whole, example()); err != nil || got != whole {
		t.Errorf("%d bytes became %d, %v", len(whole), len(got), err)
	}
	got, err := resigned(t, whole, sigv4.Key{ID: "x", Secret: "y"})
	if err != nil || len(got) != len(whole) || strings.Contains(got, "ad80c730") {
		t.Errorf("under another key: %d bytes, %v", len(got), err)
	}
	for name, body := range map[string]string{
		"nothing":           "",
		"no last chunk":     parts[0] + parts[1],
		"another order":     parts[1] + parts[0] + parts[2],
		"a chunk left out":  parts[0] + parts[2],
		"other data":        strings.Replace(whole, "aaaa", "aaab", 1),
		"something behind":  whole + "x",
		"a chunk again":     whole + parts[2],
		"a long line":       strings.Repeat("0", 5000) + whole,
		"a huge chunk":      "7fffffff;chunk-signature=00\r\n",
		"a number too long": "fffffffffffffffff;chunk-signature=00\r\n",
		"no signature":      "400\r\n" + strings.Repeat("a", 1024) + "\r\n0\r\n\r\n",
		"a line feed alone": strings.ReplaceAll(whole, "\r\n", "\n"),
		"cut off":           whole[:len(whole)-1],
	} {
		got, err := resigned(t, body, example())
		if err == nil || strings.HasSuffix(got, parts[2]) {
			t.Errorf("%s: %d bytes passed, %v", name, len(got), err)
		}
	}
}

// FuzzParse: whatever a job sends, a signature is read and verified, or not.
func FuzzParse(f *testing.F) {
	f.Add("GET", "/a%20b?x=y&z", strings.TrimPrefix(authorization("host;x-amz-date", strings.Repeat("ab", 32)), "Authorization: "), "20130524T000000Z", emptyDigest)
	f.Add("PUT", "/?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=a/20130524/r/s/aws4_request&X-Amz-Date=20130524T000000Z&X-Amz-Expires=1&X-Amz-SignedHeaders=host&X-Amz-Signature="+strings.Repeat("ab", 32), "", "", "")
	f.Fuzz(func(t *testing.T, method, target, auth, date, digest string) {
		r, err := http.NewRequest(method, "https://h.example"+target, nil)
		if err != nil {
			return
		}
		for name, v := range map[string]string{"Authorization": auth, "X-Amz-Date": date, "X-Amz-Content-Sha256": digest} {
			if v != "" {
				r.Header[name] = []string{v}
			}
		}
		s, err := sigv4.Parse(r)
		if err != nil {
			return
		}
		if s.Summed() {
			s.SetSum(nil)
		}
		if s.Verify(r, "a secret that nobody knows", then()) == nil {
			t.Fatal("verified")
		}
		key := sigv4.Key{ID: "REAL", Secret: "real", Session: "session"}
		s.Resign(r, "place", key, then())
		again, err := sigv4.Parse(r)
		if err != nil {
			t.Fatalf("what was made cannot be read: %v", err)
		}
		if again.Summed() {
			again.SetSum(nil)
		}
		lone := again.KeyID == "REAL" && again.Session == "session" && again.Region == s.Region && again.Service == s.Service
		if err := again.Verify(r, "real", then()); err != nil && !strings.Contains(err.Error(), "is not signed") && !strings.Contains(err.Error(), "not there once") || !lone {
			t.Fatalf("what was made is not verified: %v", err)
		}
	})
}

// FuzzChunks: no body passes but one that was signed.
func FuzzChunks(f *testing.F) {
	whole := strings.Join(exampleChunks(), "")
	f.Add([]byte(whole))
	f.Add([]byte(exampleChunks()[2]))
	f.Add([]byte("400;chunk-signature=00\r\n"))
	f.Fuzz(func(t *testing.T, body []byte) {
		if got, err := resigned(t, string(body), example()); err == nil && !bytes.Equal([]byte(got), body) || err == nil && got != whole && got != exampleChunks()[2] {
			t.Fatalf("%q passed as %q", body, got)
		}
	})
}
