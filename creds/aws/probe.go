package aws

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/mayfly-ci/mayfly/creds"
)

// deadKeys are the codes by which a service says that it does not know the key of
// a session any more.
func deadKeys() []string {
	return []string{"InvalidAccessKeyId", "InvalidClientTokenId", "ExpiredToken", "ExpiredTokenException"}
}

// explicitDeny is what AWS says when a policy denies a call, and not when merely
// none allows it (IAM User Guide, "Troubleshoot access denied error messages").
const explicitDeny = "with an explicit deny in"

// Probe implements creds.Issuer: it signs a request with the session.
func (i *Issuer) Probe(ctx context.Context, name string, sealed []byte) (creds.Proof, error) {
	if err := checkName(name); err != nil {
		return creds.Proof{}, err
	}
	refusal, err := "", errors.New("its handle is lost, and nobody can try it")
	if sealed != nil {
		var h handle
		if h, err = openHandle(sealed); err == nil {
			refusal, err = i.try(ctx, h.Key)
		}
	}
	if err == nil && refusal == "" {
		err = creds.ErrStillValid
	}
	if err != nil {
		return creds.Proof{}, fmt.Errorf("probe lease %s: %w", name, err)
	}
	address, _ := i.config.at("s3")
	return creds.Proof{At: i.config.Now(), How: "ListBuckets signed with the session at " + address, Refusal: refusal}, nil
}

// try uses a session and returns the words of the refusal that only a dead one
// gets, or nothing if it lives, whatever it may or may not do.
func (i *Issuer) try(ctx context.Context, k key) (string, error) {
	err := i.do(ctx, call{service: "s3", method: http.MethodGet, path: "/", key: k}, nil)
	var r *refusal
	switch {
	case err == nil:
		return "", nil
	case !errors.As(err, &r):
		return "", err
	case refused(err, deadKeys()...):
		return r.Error(), nil
	case r.code != "AccessDenied":
		return "", err
	case !i.config.minio() && strings.Contains(r.message, explicitDeny):
		return r.Error(), nil
	}
	return "", nil
}
