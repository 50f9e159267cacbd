package gateway

import (
	"net/http"
	"strings"

	"github.com/mayfly-ci/mayfly/creds/mask"
)

// A scrub hides a credential in one answer, wherever it stands.
type scrub struct {
	set, names *mask.Set
	body       *mask.Writer
}

// newScrub makes one whose masked body goes to w.
func newScrub(in *injection, w http.ResponseWriter) *scrub {
	return &scrub{in.hidden, in.names, mask.NewWriter(func(b []byte) error {
		_, err := w.Write(b)
		return err
	}, in.hidden)}
}

// header hides the credential in fields, those of the trailer included, and
// takes off cookies: a session is another credential.
func (s *scrub) header(h http.Header) {
	for name, values := range h {
		lower := strings.ToLower(name)
		if strings.TrimPrefix(lower, "trailer:") == "set-cookie" || s.names.Mask(lower) != lower {
			delete(h, name)
			continue
		}
		for i, v := range values {
			values[i] = s.set.Mask(v)
		}
	}
}

// scrubbable refuses an answer whose body the mask would not see, and takes off
// what masking makes wrong.
func scrubbable(r *http.Response) error {
	bodiless := r.Request.Method == http.MethodHead || r.StatusCode == http.StatusNotModified
	for _, v := range r.Header["Content-Encoding"] {
		if !bodiless && v != "" && !strings.EqualFold(v, "identity") {
			return denied("the answer is encoded although identity was asked for, and may say the credential")
		}
	}
	if !bodiless {
		r.Header.Del("Content-Length")
		r.ContentLength = -1
	}
	return nil
}

// WriteHeader implements http.ResponseWriter. It is called for each 1xx, too.
func (a *answered) WriteHeader(code int) {
	if a.scrub != nil {
		a.scrub.header(a.Header())
	}
	if code >= http.StatusOK {
		a.status = code
	}
	a.ResponseWriter.WriteHeader(code)
}

// finish ends the body: what a mask held back is sent, and the trailer is masked.
func (a *answered) finish() error {
	if a.scrub == nil {
		return nil
	}
	a.scrub.header(a.Header())
	return a.scrub.body.Flush()
}
