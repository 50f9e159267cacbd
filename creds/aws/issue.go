package aws

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// A handle is what Probe signs with, and Revoke too at MinIO.
type handle struct {
	Key key       `json:"key"`
	End time.Time `json:"end"` // of the session at the service
}

// Issue implements creds.Issuer. If it fails after the session was made, the lease
// has its handle and nothing else.
func (i *Issuer) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	if err := checkName(name); err != nil {
		return creds.Lease{}, err
	}
	scope, err := i.parseScope(g.Scope)
	if err != nil {
		return creds.Lease{}, err
	}
	expires := g.Expires.UTC().Truncate(time.Second)
	if limit := i.config.Now().Add(i.config.MaxSession).UTC().Truncate(time.Second); limit.Before(expires) {
		expires = limit
	}
	if expires.Sub(i.config.Now()) < time.Second {
		return creds.Lease{}, fmt.Errorf("lease %s: grant ends at %s, which is too soon", name, expires.Format(time.RFC3339))
	}
	policy, err := i.policy(scope, expires)
	if err != nil {
		return creds.Lease{}, err
	}
	if err := i.take(name); err != nil {
		return creds.Lease{}, err
	}
	lease, err := i.assume(ctx, name, g.Subject, policy, expires)
	if err != nil {
		return creds.Lease{Handle: lease.Handle}, fmt.Errorf("lease %s: %w", name, err)
	}
	return lease, nil
}

// take keeps a name from being issued twice by one life of the agent; the agent
// gives no name again in another.
func (i *Issuer) take(name string) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.names[name] {
		return fmt.Errorf("lease %s: issued already", name)
	}
	i.names[name] = true
	return nil
}

// assumed is the answer of the STS.
type assumed struct {
	Result struct {
		Credentials struct {
			key
			Expiration time.Time `xml:"Expiration"`
		} `xml:"Credentials"`
		User struct {
			ARN string `xml:"Arn"`
		} `xml:"AssumedRoleUser"`
	} `xml:"AssumeRoleWithWebIdentityResult"`
}

// assume makes the session. It asks for the shortest that lasts until expires, when
// its policy ends it.
func (i *Issuer) assume(ctx context.Context, name string, s creds.Subject, policy string, expires time.Time) (creds.Lease, error) {
	identity, err := i.config.Sign(ctx, s, name)
	if err != nil {
		return creds.Lease{}, fmt.Errorf("identity: %w", err)
	}
	duration := max(expires.Sub(i.config.Now()).Truncate(time.Second), minSession)
	form := url.Values{
		"Action": {"AssumeRoleWithWebIdentity"}, "Version": {"2011-06-15"},
		"RoleArn": {i.config.Role}, "RoleSessionName": {name}, "WebIdentityToken": {identity.Token.Reveal()},
		"DurationSeconds": {strconv.Itoa(int(duration / time.Second))}, "Policy": {policy},
	}
	if i.config.minio() {
		form.Set("TokenRevokeType", name) // by which it is taken back
	}
	var a assumed
	err = i.do(ctx, call{service: "sts", method: http.MethodPost, path: "/", form: form}, &a)
	switch {
	case refused(err, "MalformedPolicyDocument", "PackedPolicyTooLarge"):
		return creds.Lease{}, fmt.Errorf("%w: %w", creds.ErrBadScope, err)
	case refused(err, "AccessDenied", "InvalidIdentityToken"):
		return creds.Lease{}, fmt.Errorf("role %s refuses the job: see its trust policy and the identity provider in IAM (audience, sub, keys): %w", i.config.Role, err)
	case refused(err, "ValidationError"):
		return creds.Lease{}, fmt.Errorf("a session of %v: if the role allows less, set max_session: %w", duration, err)
	case err != nil:
		return creds.Lease{}, err
	}
	c := a.Result.Credentials
	if c.ID == "" || c.Secret == "" || c.Token == "" || c.Expiration.IsZero() {
		return creds.Lease{}, errors.New("sts: no credentials in the answer")
	}
	i.config.Trace("aws.session")
	text, err := json.Marshal(handle{c.key, c.Expiration})
	lease := creds.Lease{Handle: text}
	if err == nil {
		err = i.fresh(ctx, c.key)
	}
	if err != nil {
		return lease, err
	}
	lease.Values = map[string]creds.Secret{"secret_access_key": creds.NewSecret(c.Secret), "session_token": creds.NewSecret(c.Token)}
	lease.Facts = i.facts(c.ID, a.Result.User.ARN, identity.ID)
	lease.ByName = i.config.RevokerKey != ""
	if lease.ExpiresAt = expires; c.Expiration.Before(expires) {
		lease.ExpiresAt = c.Expiration
	}
	return lease, nil
}

// fresh tries the call that Probe will try: only if a new session is not refused
// in that way is a later refusal a proof.
func (i *Issuer) fresh(ctx context.Context, k key) error {
	refusal, err := i.try(ctx, k)
	if err == nil && refusal != "" {
		err = fmt.Errorf("the new session is refused as a dead one would be, so that nobody could tell when it is dead: let no policy deny it s3:ListAllMyBuckets by name: %s", refusal)
	}
	return err
}

// facts are for the job and the record.
func (i *Issuer) facts(id, arn, jti string) map[string]string {
	endpoint := i.config.JobEndpoint
	if endpoint == "" {
		endpoint = i.config.Endpoint
	}
	_, region := i.config.at("s3")
	facts := map[string]string{"access_key_id": id, "region": region, "endpoint": endpoint, "session": arn, "jti": jti}
	maps.DeleteFunc(facts, func(_, value string) bool { return value == "" })
	return facts
}
