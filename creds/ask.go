package creds

import (
	"context"
	"time"
)

// An Asker is an Issuer whose leases are the right to ask: the job gets one
// credential after another under them, each when it wants it and for one audience.
// The value "request_token" of such a lease is what the job shows.
type Asker interface {
	// Ask makes a credential under the lease called name. It wraps ErrBadScope if
	// the lease is not for the audience, which is "" if the job names none, and fails
	// if there is no such lease, it was revoked, or its time is over.
	Ask(ctx context.Context, name, audience string) (Answer, error)
}

// RequestToken is the value of an Asker's lease that the job shows.
const RequestToken = "request_token"

// An Answer is a credential that was asked for.
type Answer struct {
	Value     Secret
	ID        string // for the record; no secret
	Audience  string // that it is for
	ExpiresAt time.Time
}
