package oauth2

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/web"
)

// The words of RFC 8693, sections 2.1 and 3.
const (
	grantExchange = "urn:ietf:params:oauth:grant-type:token-exchange"
	typeJWT       = "urn:ietf:params:oauth:token-type:jwt"
	typeAccess    = "urn:ietf:params:oauth:token-type:access_token"
)

// A handle is what Revoke and Probe need: tokens have no names.
type handle struct {
	Token   string `json:"token"`
	Refresh string `json:"refresh,omitempty"` // nobody asked for it
	Used    bool   `json:"used"`              // use_url took it when it was new
	Known   bool   `json:"known"`             // so did introspection
}

// A minting is one Issue on its way.
type minting struct {
	*Issuer
	name    string
	grant   creds.Grant
	scope   Scope
	expires time.Time
	jti     string
	handle  handle
}

// Issue implements creds.Issuer. If it fails half way the lease has the handle of
// what there is, and nothing else.
func (i *Issuer) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	m := &minting{Issuer: i, name: name, grant: g, expires: g.Expires.UTC().Truncate(time.Second)}
	err := m.prepare()
	var given answer
	if err == nil {
		given, err = m.ask(ctx)
	}
	if m.handle.Token == "" {
		if err == nil {
			err = errors.New("no token in the answer")
		}
		return creds.Lease{}, fmt.Errorf("lease %s: %w", name, err)
	}
	if err == nil {
		err = m.judge(ctx, given)
	}
	if err != nil {
		// Nobody may have it, and it may be more than was granted: now, and not
		// when the agent comes to it.
		err = errors.Join(err, i.end(ctx, m.handle))
	}
	h, herr := json.Marshal(m.handle)
	lease := creds.Lease{Handle: h}
	if err = errors.Join(err, herr); err != nil {
		return lease, fmt.Errorf("lease %s: %w", name, err)
	}
	lease.Values = map[string]creds.Secret{"access_token": creds.NewSecret(m.handle.Token)}
	lease.Facts = map[string]string{"scope": strings.Join(m.scope.Scopes, " "), "client_id": i.config.ClientID}
	for key, fact := range map[string]string{"audience": m.scope.Audience, "jti": m.jti} {
		if fact != "" {
			lease.Facts[key] = fact
		}
	}
	lease.ExpiresAt = given.expires
	return lease, nil
}

// prepare finds out what is wrong before anybody is asked, and takes the name.
func (m *minting) prepare() (err error) {
	if err := checkName(m.name); err != nil {
		return err
	}
	if m.scope, err = m.parseScope(m.grant.Scope); err != nil {
		return err
	}
	if !m.expires.After(m.config.Now()) {
		return fmt.Errorf("grant ends at %s, which is over", m.expires.Format(time.RFC3339))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.names[m.name] {
		return errors.New("issued already")
	}
	m.names[m.name] = true
	return nil
}

// An answer is what the server says of a token that it gives.
type answer struct {
	scopes  []string // nil if it does not say: then those that were asked for
	expires time.Time
	kind    string
}

// ask sends the request for a token, with what the grant needs.
func (m *minting) ask(ctx context.Context) (answer, error) {
	secret, err := m.config.ClientSecret()
	if err != nil {
		return answer{}, fmt.Errorf("client_secret_file: %w", err)
	}
	params := url.Values{}
	if m.scope.Audience != "" {
		params.Set("audience", m.scope.Audience)
	}
	hide := []string{secret.Reveal()}
	if m.config.Sign != nil {
		identity, err := m.config.Sign(ctx, m.grant.Subject, m.name)
		if err != nil {
			return answer{}, fmt.Errorf("identity: %w", err)
		}
		m.jti = identity.ID
		subject := identity.Token.Reveal()
		hide = append(hide, subject)
		params.Set("grant_type", grantExchange)
		params.Set("subject_token", subject)
		params.Set("subject_token_type", typeJWT)
		params.Set("requested_token_type", typeAccess)
	}
	style := oauth2.AuthStyleInHeader
	if m.config.Post {
		style = oauth2.AuthStyleInParams
	}
	c := clientcredentials.Config{
		ClientID: m.config.ClientID, ClientSecret: secret.Reveal(), TokenURL: m.config.Endpoints.Token,
		Scopes: m.scope.Scopes, EndpointParams: params, AuthStyle: style,
	}
	t, err := c.Token(context.WithValue(ctx, oauth2.HTTPClient, m.client))
	if err != nil {
		return answer{}, complaint(err, hide)
	}
	m.handle = handle{Token: t.AccessToken, Refresh: t.RefreshToken}
	m.config.Trace("oauth2.token")
	a := answer{kind: t.Type()}
	if !t.Expiry.IsZero() { // counted from now, which is not too early
		a.expires = t.Expiry.UTC().Truncate(time.Second)
	}
	if words, ok := t.Extra("scope").(string); ok && words != "" {
		a.scopes = strings.Fields(words)
	}
	return a, nil
}

// complaint is what a server says instead of giving a token, without the secrets
// that it was sent.
func complaint(err error, hide []string) error {
	var r *oauth2.RetrieveError
	if !errors.As(err, &r) {
		return errors.New(web.Words(err.Error(), hide...))
	}
	status := 0
	if r.Response != nil {
		status = r.Response.StatusCode
	}
	words := fmt.Errorf("token endpoint answers %d: %s", status, web.Words(r.ErrorCode+": "+r.ErrorDescription, hide...))
	switch {
	case status/100 == 3:
		return fmt.Errorf("token endpoint answers %d: %w", status, web.ErrRedirect)
	case r.ErrorCode == "":
		return fmt.Errorf("token endpoint answers %d, and not in the words of OAuth 2.0", status)
	case r.ErrorCode == "invalid_scope", r.ErrorCode == "invalid_target":
		return fmt.Errorf("%w: %w", creds.ErrBadScope, words)
	case r.ErrorCode == "invalid_client", status == http.StatusUnauthorized:
		return fmt.Errorf("%w: see client_id and client_secret_file", words)
	case r.ErrorCode == "invalid_grant":
		return fmt.Errorf("%w: the server does not give this job a token; see what it wants of the agent's identity", words)
	}
	return words
}

// judge wants what was asked for and no more, and wants to see it alive: only
// then is a later refusal a proof.
func (m *minting) judge(ctx context.Context, a answer) error {
	switch {
	case m.handle.Refresh != "":
		return errors.New("the server gave a refresh token too, which lives longer: have it give this client none")
	case !strings.EqualFold(a.kind, "bearer"):
		return fmt.Errorf("the server gave a token of type %q, want bearer", a.kind)
	case a.expires.IsZero():
		return errors.New("the server does not say when the token ends")
	case a.expires.After(m.expires):
		return fmt.Errorf("the server gave a token until %s, and the grant ends at %s: have it give this client shorter ones, or raise the lease's ttl",
			a.expires.Format(time.RFC3339), m.expires.Format(time.RFC3339))
	}
	if err := m.narrow(a.scopes); err != nil {
		return err
	}
	if m.config.Endpoints.Introspection != "" {
		seen, err := m.introspect(ctx, m.handle.Token)
		if err != nil {
			return err
		}
		if !seen.Active {
			return errors.New("introspection calls the new token inactive: let the client look at its own tokens")
		}
		if err := m.narrow(strings.Fields(seen.Scope)); err != nil {
			return err
		}
		m.handle.Known = true
	}
	if m.config.Endpoints.Use != "" {
		refusal, err := m.use(ctx, m.handle.Token)
		switch {
		case err == nil:
			return fmt.Errorf("use_url refuses the new token: %s", refusal)
		case !errors.Is(err, creds.ErrStillValid):
			return err
		}
		m.handle.Used = true
	}
	return nil
}

// narrow refuses scopes that were not asked for.
func (m *minting) narrow(given []string) error {
	for _, scope := range given {
		if !slices.Contains(m.scope.Scopes, scope) {
			return fmt.Errorf("the server gave the scope %q, which was not asked for", web.Words(scope, m.handle.Token))
		}
	}
	return nil
}
