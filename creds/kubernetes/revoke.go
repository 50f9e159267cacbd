package kubernetes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/web"
)

// Revoke implements creds.Issuer: it deletes the Secret, by its name and only if it
// is of this installation. One that is not there is gone.
func (i *Issuer) Revoke(ctx context.Context, name string, _ []byte) error {
	err := checkName(name)
	if err == nil {
		err = i.asAgent(ctx, http.MethodDelete, i.secrets()+"?"+i.mine(name), nil, nil)
		i.config.Trace("kubernetes.revoke")
	}
	if err != nil {
		return fmt.Errorf("revoke lease %s: %w", name, err)
	}
	return nil
}

// mine selects the Secrets of this installation, or the one of a lease.
func (i *Issuer) mine(name string) string {
	q := url.Values{"labelSelector": {labelOwner + "=" + i.config.Owner}}
	if name != "" {
		q.Set("fieldSelector", "metadata.name="+object(name))
	}
	return q.Encode()
}

// List implements creds.Issuer.
func (i *Issuer) List(ctx context.Context) ([]creds.Info, error) {
	infos, err := i.list(ctx, "")
	if err != nil {
		return nil, fmt.Errorf("list leases: %w", err)
	}
	return infos, nil
}

func (i *Issuer) list(ctx context.Context, name string) ([]creds.Info, error) {
	var a struct {
		Items []secret `json:"items"`
	}
	if err := i.asAgent(ctx, http.MethodGet, i.secrets()+"?"+i.mine(name), nil, &a); err != nil {
		return nil, err
	}
	var infos []creds.Info
	for _, s := range a.Items {
		lease := s.Metadata.Annotations[noteLease]
		if checkName(lease) != nil || object(lease) != s.Metadata.Name {
			continue // somebody else's, whatever its label says
		}
		info := creds.Info{Name: lease, Owner: s.Metadata.Labels[labelOwner]}
		if second, err := strconv.ParseInt(s.Metadata.Labels[labelExpires], 10, 64); err == nil {
			info.ExpiresAt = time.Unix(second, 0).UTC()
		}
		infos = append(infos, info)
	}
	return infos, nil
}

// Probe implements creds.Issuer: it makes a request with the token, or looks for
// the Secret if the token is lost.
func (i *Issuer) Probe(ctx context.Context, name string, sealed []byte) (creds.Proof, error) {
	if err := checkName(name); err != nil {
		return creds.Proof{}, err
	}
	how, refusal, err := i.probe(ctx, name, sealed)
	if err == nil && refusal == "" {
		err = creds.ErrStillValid
	}
	if err != nil {
		return creds.Proof{}, fmt.Errorf("probe lease %s: %w", name, err)
	}
	return creds.Proof{At: i.config.Now(), How: how + " at " + i.config.Address, Refusal: refusal}, nil
}

func (i *Issuer) probe(ctx context.Context, name string, sealed []byte) (how, refusal string, _ error) {
	if sealed == nil {
		infos, err := i.list(ctx, name)
		if err == nil && len(infos) == 0 {
			refusal = "no such object"
		}
		return "the token is not known and was not tried; looked for the Secret that it was bound to, " + object(name), refusal, err
	}
	var h handle
	if err := json.Unmarshal(sealed, &h); err != nil || h.Token == "" {
		return "", "", errors.New("handle: not one of this issuer") // its text is a secret
	}
	how = "SelfSubjectReview with the token"
	if h.Audiences != nil {
		how = "TokenReview of the token for " + strings.Join(h.Audiences, ", ")
	}
	refusal, err := i.try(ctx, h)
	return how, refusal, err
}

// try uses a token and returns the words of the refusal, or nothing if it is
// accepted. One that is for others is shown to the server by the agent, which is
// what they do.
func (i *Issuer) try(ctx context.Context, h handle) (string, error) {
	const group = "/apis/authentication.k8s.io/v1/"
	if h.Audiences != nil {
		return i.review(ctx, h, group+"tokenreviews")
	}
	// Every authenticated user may ask who it is.
	err := i.do(ctx, h.Token, http.MethodPost, group+"selfsubjectreviews", map[string]any{"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}, nil)
	var r *refusal
	if errors.As(err, &r) && r.Code == http.StatusUnauthorized {
		return r.Error(), nil
	}
	return "", err
}

func (i *Issuer) review(ctx context.Context, h handle, path string) (string, error) {
	var a struct {
		Status struct {
			Authenticated bool   `json:"authenticated"`
			Error         string `json:"error"`
		} `json:"status"`
	}
	err := i.asAgent(ctx, http.MethodPost, path, map[string]any{
		"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": map[string]any{"token": h.Token, "audiences": h.Audiences},
	}, &a)
	switch {
	case refused(err, http.StatusForbidden):
		return "", fmt.Errorf("to see tokens for others dead, the agent's account must be able to create tokenreviews (ClusterRole system:auth-delegator): %w", err)
	case err != nil:
		return "", err
	case a.Status.Authenticated:
		return "", nil
	}
	return "not authenticated: " + web.Words(a.Status.Error, h.Token), nil
}
