package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/sigv4"
)

// Requests that are signed: the job's signature is verified with the placeholders
// that it has, and replaced by one of the real key. The secret part of that key
// is in no request, so no answer can tell it.

const (
	// wholeBody bounds a body whose digest is signed and not sent with it: it is
	// read before the request is verified. S3, which takes large ones, sends it.
	wholeBody = 4 << 20
	// heldBodies bounds the requests of a box of which a body or a chunk is held.
	heldBodies = 16
)

// readSignature finds whose the signature of a request is.
func (u *injected) readSignature(r *http.Request) state {
	signed, err := sigv4.Parse(r)
	if u.why = err; errors.Is(err, sigv4.ErrUnsigned) {
		return absent
	}
	if err != nil || signed.KeyID != u.Signing.PlaceID || signed.Session != u.Signing.PlaceSession {
		return foreign
	}
	u.signed = signed
	return ours
}

// unsigned says why a request that has no signature of ours does not pass.
func (u *injected) unsigned() string {
	switch {
	case u.state == ours, u.state == absent && u.Pass:
		return ""
	case u.why != nil:
		return "the rule signs anew what is signed with the key of its lease: " + u.why.Error()
	}
	return "the rule has a key of its own, and the request is signed with another"
}

// held waits for a place among the requests of which something is in memory, and
// returns what gives it back.
func held(ctx context.Context, places chan struct{}) (leave func(), err error) {
	select {
	case places <- struct{}{}:
		return func() { <-places }, nil
	case <-ctx.Done():
		return func() {}, context.Cause(ctx)
	}
}

// verify says why a request is not signed with the key that the job has, or does
// not ask for a token as the rule says. It may
// wait for a place, and for the body, and returns what gives the place back.
func (u *injected) verify(r *http.Request, places chan struct{}) (leave func(), err error) {
	leave = func() {}
	if u != nil && u.As == egress.OCIToken { // what the realm answers is held, too
		if leave, err = held(r.Context(), places); err == nil {
			err = u.readForm(r)
		}
		return leave, err
	}
	if u == nil || u.signed == nil {
		return leave, nil
	}
	s := u.signed
	switch {
	case !slices.Contains(u.Signing.Regions, s.Region):
		return leave, denied("the rule does not sign for the region %q", printable(s.Region))
	case !slices.Contains(u.Signing.Services, s.Service):
		return leave, denied("the rule does not sign for the service %q", printable(s.Service))
	}
	if s.Holds() {
		if leave, err = held(r.Context(), places); err != nil {
			return leave, err
		}
	}
	if s.Summed() {
		body, err := io.ReadAll(io.LimitReader(r.Body, wholeBody+1))
		switch {
		case err != nil:
			return leave, fmt.Errorf("body of the request: %w", err)
		case len(body) > wholeBody:
			return leave, denied("the body has more than %d bytes and no digest with it, and cannot be signed", wholeBody)
		}
		s.SetSum(body)
		r.Body, r.ContentLength = struct {
			io.Reader
			io.Closer
		}{bytes.NewReader(body), r.Body}, int64(len(body))
	}
	if err := s.Verify(r, u.Placeholder, time.Now()); err != nil {
		return leave, denied("%v", err)
	}
	return leave, nil
}

// resign gives the request that the destination gets its signature. Ranges and
// encodings stay: the answer has nothing to hide but names.
func (u *injected) resign(out *http.Request) {
	out.Trailer = nil
	out.Header.Del("Cookie")
	if u.signed == nil {
		return
	}
	key := sigv4.Key{ID: u.Signing.KeyID.Reveal(), Secret: u.Value.Reveal()}
	if !u.Signing.Session.IsZero() {
		key.Session = u.Signing.Session.Reveal()
	}
	u.signed.Resign(out, u.Placeholder, key, time.Now())
}

// opaque reports an answer whose body is not masked: an object of the store, with
// its length, ranges and encoding. Errors name the key, and are.
func (u *injected) opaque(status int) bool {
	return u.As == egress.SigV4 && status < http.StatusBadRequest || u.As == egress.Certificate
}
