package kubernetes

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// Labels and annotations of a lease's Secret.
const (
	labelOwner   = "mayfly-ci/installation"
	labelExpires = "mayfly-ci/expires" // second of Unix
	noteLease    = "mayfly-ci/lease"
	notePrefix   = "mayfly-ci/"
)

// A handle is what Probe needs.
type handle struct {
	Token     string   `json:"token"`
	Audiences []string `json:"audiences,omitempty"`
}

type metadata struct {
	Name        string            `json:"name"`
	UID         string            `json:"uid,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// A secret is the object that a token is bound to. It holds nothing.
type secret struct {
	APIVersion string   `json:"apiVersion"`
	Kind       string   `json:"kind"`
	Metadata   metadata `json:"metadata"`
	Immutable  bool     `json:"immutable"`
}

// Issue implements creds.Issuer.
func (i *Issuer) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	if err := checkName(name); err != nil {
		return creds.Lease{}, err
	}
	scope, err := i.parseScope(g.Scope)
	if err != nil {
		return creds.Lease{}, err
	}
	expires := g.Expires.UTC().Truncate(time.Second)
	if left := expires.Sub(i.config.Now()); left < minLife+margin {
		return creds.Lease{}, fmt.Errorf("lease %s: grant ends in %v, and Kubernetes gives no token for less than %v: give the lease and its job that much time", name, left.Round(time.Second), minLife)
	}
	lease, err := i.issue(ctx, name, g.Subject, scope, expires)
	if err != nil {
		return creds.Lease{Handle: lease.Handle, ByName: true}, fmt.Errorf("lease %s: %w", name, err)
	}
	return lease, nil
}

func (i *Issuer) issue(ctx context.Context, name string, subject creds.Subject, scope Scope, expires time.Time) (creds.Lease, error) {
	uid, err := i.bind(ctx, name, subject, expires)
	if err != nil {
		return creds.Lease{}, err
	}
	i.config.Trace("kubernetes.object")
	token, err := i.request(ctx, name, uid, scope, expires)
	if err != nil {
		return creds.Lease{}, err
	}
	i.config.Trace("kubernetes.token")
	h := handle{token, scope.Audiences}
	text, err := json.Marshal(h)
	lease := creds.Lease{Handle: text, ByName: true}
	if err == nil {
		err = i.fresh(ctx, h, expires)
	}
	if err != nil {
		return lease, err
	}
	return i.lease(lease, scope, token, expires)
}

// bind makes the Secret. Its name is taken once.
func (i *Issuer) bind(ctx context.Context, name string, s creds.Subject, expires time.Time) (uid string, _ error) {
	notes := map[string]string{
		"lease": name, "provider": s.Provider, "repository": s.Repository, "ref": s.Ref, "sha": s.SHA,
		"workflow": s.Workflow, "event": s.Event, "trust": s.Trust, "job": s.Job, "step": s.Step,
	}
	meta := metadata{
		Name:        object(name),
		Labels:      map[string]string{labelOwner: i.config.Owner, labelExpires: strconv.FormatInt(expires.Unix(), 10)},
		Annotations: map[string]string{},
	}
	for key, value := range notes {
		if value != "" {
			meta.Annotations[notePrefix+key] = value
		}
	}
	var made secret
	err := i.asAgent(ctx, http.MethodPost, i.secrets(), secret{"v1", "Secret", meta, true}, &made)
	switch {
	case refused(err, http.StatusConflict):
		return "", fmt.Errorf("issued already: %w", err)
	case refused(err, http.StatusForbidden):
		return "", fmt.Errorf("the agent's account must be able to create, list and deletecollection secrets in namespace %s: %w", i.config.Namespace, err)
	case err != nil:
		return "", err
	case made.Metadata.UID == "":
		return "", errors.New("secret: no uid in the answer")
	}
	return made.Metadata.UID, nil
}

func (i *Issuer) secrets() string { return "/api/v1/namespaces/" + i.config.Namespace + "/secrets" }

// request gets a token that is bound to the Secret.
func (i *Issuer) request(ctx context.Context, name, uid string, scope Scope, expires time.Time) (string, error) {
	seconds := int64(expires.Sub(i.config.Now())/time.Second) - int64(margin/time.Second)
	spec := map[string]any{
		"expirationSeconds": max(seconds, int64(minLife/time.Second)),
		"boundObjectRef":    map[string]string{"kind": "Secret", "apiVersion": "v1", "name": object(name), "uid": uid},
	}
	if scope.Audiences != nil {
		spec["audiences"] = scope.Audiences
	}
	var a struct {
		Status struct {
			Token string `json:"token"`
		} `json:"status"`
	}
	err := i.asAgent(ctx, http.MethodPost, "/api/v1/namespaces/"+i.config.Namespace+"/serviceaccounts/"+scope.Account+"/token",
		map[string]any{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}, &a)
	switch {
	case refused(err, http.StatusForbidden), refused(err, http.StatusNotFound):
		return "", fmt.Errorf("service account %s must exist, and the agent's account be able to create its serviceaccounts/token: %w", scope.Account, err)
	case err != nil:
		return "", err
	case a.Status.Token == "":
		return "", errors.New("token: none in the answer")
	}
	return a.Status.Token, nil
}

// fresh looks at a new token: that it ends in time, that it is bound, and that
// the probe's request is accepted with it. Only then is a later refusal a proof.
func (i *Issuer) fresh(ctx context.Context, h handle, expires time.Time) error {
	var claims struct {
		Exp        int64 `json:"exp"`
		Kubernetes struct {
			Secret struct {
				UID string `json:"uid"`
			} `json:"secret"`
		} `json:"kubernetes.io"`
	}
	parts := strings.Split(h.Token, ".")
	if len(parts) != 3 {
		return errors.New("token: not a JWT")
	}
	b, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(b, &claims)
	}
	switch {
	case err != nil:
		return errors.New("token: not a JWT")
	case claims.Exp == 0 || claims.Exp > expires.Unix():
		return fmt.Errorf("token: ends at %s, the grant at %s: the server gives more than it may", time.Unix(claims.Exp, 0).UTC().Format(time.RFC3339), expires.Format(time.RFC3339))
	case claims.Kubernetes.Secret.UID == "":
		return errors.New("token: not bound to its Secret, so that nothing would end it")
	}
	refusal, err := i.try(ctx, h)
	if err == nil && refusal != "" {
		err = fmt.Errorf("token: the server refuses it when it is new: %s", refusal)
	}
	return err
}

func (i *Issuer) lease(l creds.Lease, scope Scope, token string, expires time.Time) (creds.Lease, error) {
	address := i.config.JobAddress
	if address == "" {
		address = i.config.Address
	}
	config, err := kubeconfig(address, i.config.Namespace, i.ca, token)
	if err != nil {
		return l, err
	}
	l.Values = map[string]creds.Secret{"token": creds.NewSecret(token), "kubeconfig": creds.NewSecret(config)}
	l.Facts = map[string]string{"server": address, "namespace": i.config.Namespace, "service_account": scope.Account, "ca": string(i.ca)}
	maps.DeleteFunc(l.Facts, func(_, value string) bool { return value == "" })
	l.ExpiresAt = expires
	return l, nil
}

// kubeconfig is what kubectl reads, in JSON: on one line, so that no word of it
// that is no secret is masked by itself.
func kubeconfig(server, namespace string, ca []byte, token string) (string, error) {
	cluster := map[string]any{"server": server}
	if ca != nil {
		cluster["certificate-authority-data"] = ca
	}
	text, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "job",
		"clusters": []any{map[string]any{"name": "job", "cluster": cluster}},
		"users":    []any{map[string]any{"name": "job", "user": map[string]string{"token": token}}},
		"contexts": []any{map[string]any{"name": "job", "context": map[string]string{"cluster": "job", "user": "job", "namespace": namespace}}},
	})
	return string(text), err
}
