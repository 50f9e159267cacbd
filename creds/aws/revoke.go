package aws

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// policyPrefix begins the names of the inline policies that end sessions. The
// lease's name follows, and the second of Unix at which the session is over.
const policyPrefix = "mayfly."

// policyMargin is how long a policy stays after that, in case clocks differ.
const policyMargin = time.Hour

func openHandle(sealed []byte) (handle, error) {
	var h handle
	if err := json.Unmarshal(sealed, &h); err != nil || h.Key.ID == "" {
		return handle{}, errors.New("handle: not one of this issuer") // its text is a secret
	}
	return h, nil
}

// Revoke implements creds.Issuer.
func (i *Issuer) Revoke(ctx context.Context, name string, sealed []byte) error {
	if err := checkName(name); err != nil {
		return err
	}
	var h handle
	var err error
	if sealed != nil {
		h, err = openHandle(sealed)
	}
	switch {
	case err != nil:
	case i.config.minio() && sealed == nil:
		err = fmt.Errorf("%w: its handle is lost; the session ends by itself, and nobody has it", creds.ErrNotRevocable)
	case i.config.minio():
		err = i.endItself(ctx, name, h.Key)
	case i.config.RevokerKey != "":
		err = i.deny(ctx, name, h.End)
	case sealed == nil || i.config.Now().Before(h.End):
		err = fmt.Errorf("%w: AWS takes no session back; with revoker_key it can be denied everything", creds.ErrNotRevocable)
	}
	if err != nil {
		return fmt.Errorf("revoke lease %s: %w", name, err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.names, name)
	return nil
}

// endItself has MinIO delete the sessions of this kind, which is the lease's name.
// The session signs the request itself; one that the server does not know is gone.
func (i *Issuer) endItself(ctx context.Context, name string, k key) error {
	err := i.do(ctx, call{
		service: "admin", method: http.MethodPost, key: k,
		path: "/minio/admin/v3/revoke-tokens/builtin?" + url.Values{"user": {""}, "tokenRevokeType": {name}, "fullRevoke": {""}}.Encode(),
	}, nil)
	i.config.Trace("aws.revoke")
	if refused(err, deadKeys()...) {
		return nil
	}
	return err
}

// deny writes the policy that ends a session, and removes those of sessions that
// are over: a role has room for some fifty of them.
func (i *Issuer) deny(ctx context.Context, name string, end time.Time) error {
	if end.IsZero() { // its handle is lost
		end = i.config.Now().Add(maxSession)
	}
	k, err := i.revoker()
	if err != nil {
		return err
	}
	document, err := denial(name)
	if err != nil {
		return err
	}
	if err := i.iam(ctx, k, "PutRolePolicy", url.Values{
		"PolicyName": {policyPrefix + name + "." + strconv.FormatInt(end.Unix(), 10)}, "PolicyDocument": {document},
	}, nil); err != nil {
		return fmt.Errorf("revoker_key must be able to put, list and delete the inline policies of the role: %w", err)
	}
	i.config.Trace("aws.revoke")
	// The next one does what this one could not.
	_ = i.sweep(ctx, k)
	return nil
}

func (i *Issuer) revoker() (key, error) {
	secret, err := i.config.RevokerSecret()
	if err != nil {
		return key{}, fmt.Errorf("revoker_secret_file: %w", err)
	}
	return key{ID: i.config.RevokerKey, Secret: secret.Reveal()}, nil
}

// sweep deletes policies whose sessions are over.
func (i *Issuer) sweep(ctx context.Context, k key) error {
	var a struct {
		Names []string `xml:"ListRolePoliciesResult>PolicyNames>member"`
	}
	if err := i.iam(ctx, k, "ListRolePolicies", url.Values{"MaxItems": {"1000"}}, &a); err != nil {
		return err
	}
	var errs []error
	for _, name := range a.Names {
		if i.over(name) {
			errs = append(errs, i.iam(ctx, k, "DeleteRolePolicy", url.Values{"PolicyName": {name}}, nil))
		}
	}
	return errors.Join(errs...)
}

// over says whether a policy is one of ours whose session has ended.
func (i *Issuer) over(policy string) bool {
	rest, ours := strings.CutPrefix(policy, policyPrefix)
	name, second, dotted := strings.Cut(rest, ".")
	end, err := strconv.ParseInt(second, 10, 64)
	return ours && dotted && checkName(name) == nil && err == nil && i.config.Now().Sub(time.Unix(end, 0)) > policyMargin
}

// iam calls the query API of IAM about the role.
func (i *Issuer) iam(ctx context.Context, k key, action string, form url.Values, into any) error {
	form.Set("Action", action)
	form.Set("Version", "2010-05-08")
	form.Set("RoleName", path.Base(i.config.Role))
	return i.do(ctx, call{service: "iam", method: http.MethodPost, path: "/", form: form, key: k}, into)
}
