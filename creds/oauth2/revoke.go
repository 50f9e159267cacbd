package oauth2

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/web"
)

func openHandle(sealed []byte) (handle, error) {
	var h handle
	if err := json.Unmarshal(sealed, &h); err != nil || h.Token == "" {
		return handle{}, errors.New("handle: not one of this issuer") // its text is a secret
	}
	return h, nil
}

// Revoke implements creds.Issuer. Without a handle there is nothing that the
// server could be told.
func (i *Issuer) Revoke(ctx context.Context, name string, sealed []byte) error {
	err := checkName(name)
	if err == nil && sealed == nil {
		err = fmt.Errorf("%w: a token has no name, and its handle is lost", creds.ErrNotRevocable)
	}
	if err == nil {
		var h handle
		if h, err = openHandle(sealed); err == nil {
			err = i.end(ctx, h)
		}
	}
	if err != nil {
		return fmt.Errorf("revoke lease %s: %w", name, err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.names, name)
	return nil
}

// end revokes what a handle names. A server says 200 to a token that it does not
// know (RFC 7009, section 2.2).
func (i *Issuer) end(ctx context.Context, h handle) error {
	var errs []error
	for kind, token := range map[string]string{"refresh_token": h.Refresh, "access_token": h.Token} {
		if token == "" {
			continue
		}
		status, body, err := i.form(ctx, i.config.Endpoints.Revocation, url.Values{"token": {token}, "token_type_hint": {kind}})
		if err == nil && status != http.StatusOK {
			err = fmt.Errorf("revocation of the %s: answer %d: %s", strings.ReplaceAll(kind, "_", " "), status, web.Words(string(body), token))
		}
		errs = append(errs, err)
	}
	i.config.Trace("oauth2.revoked")
	return errors.Join(errs...)
}

// form sends a request with the client's credentials.
func (i *Issuer) form(ctx context.Context, address string, values url.Values) (int, []byte, error) {
	secret, err := i.config.ClientSecret()
	if err != nil {
		return 0, nil, fmt.Errorf("client_secret_file: %w", err)
	}
	if i.config.Post {
		values.Set("client_id", i.config.ClientID)
		values.Set("client_secret", secret.Reveal())
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, address, strings.NewReader(values.Encode()))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Accept", "application/json")
	if !i.config.Post { // both are form-encoded first: RFC 6749, section 2.3.1
		req.SetBasicAuth(url.QueryEscape(i.config.ClientID), url.QueryEscape(secret.Reveal()))
	}
	status, body, err := web.Do(i.client, req)
	if err == nil {
		body = []byte(strings.ReplaceAll(string(body), secret.Reveal(), "[secret]"))
	}
	return status, body, err
}

// A seen token is what introspection says of it.
type seen struct {
	Active bool   `json:"active"`
	Scope  string `json:"scope"`
}

// introspect asks the server about a token. An answer without "active" is none.
func (i *Issuer) introspect(ctx context.Context, token string) (seen, error) {
	status, body, err := i.form(ctx, i.config.Endpoints.Introspection, url.Values{"token": {token}, "token_type_hint": {"access_token"}})
	if err != nil {
		return seen{}, err
	}
	var s struct {
		seen
		Active *bool `json:"active"`
	}
	if bad := json.Unmarshal(body, &s); status != http.StatusOK || bad != nil || s.Active == nil {
		return seen{}, fmt.Errorf("introspection: answer %d says nothing of the token: %s", status, web.Words(string(body), token))
	}
	s.seen.Active = *s.Active
	return s.seen, nil
}

// use sends a token to the resource. It is creds.ErrStillValid if that is taken,
// and nil, with the refusal, if it is refused: with 401 and a challenge that names
// its scheme (RFC 6750, section 3), which no proxy has.
func (i *Issuer) use(ctx context.Context, token string) (refusal string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, i.config.Endpoints.Use, nil)
	if err != nil {
		return "", err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	status, header, err := web.Head(i.client, req)
	challenge := header.Get("WWW-Authenticate")
	switch {
	case err != nil:
		return "", err
	case status/100 == 2, status == http.StatusForbidden && strings.Contains(challenge, "insufficient_scope"):
		return "", creds.ErrStillValid
	case status == http.StatusUnauthorized && len(challenge) >= 6 && strings.EqualFold(challenge[:6], "bearer"):
		return fmt.Sprintf("%d: %s", status, web.Words(challenge, token)), nil
	}
	return "", fmt.Errorf("use_url: answer %d says nothing of the token", status)
}

// Probe implements creds.Issuer. Without a handle nobody can say.
func (i *Issuer) Probe(ctx context.Context, name string, sealed []byte) (creds.Proof, error) {
	how, said, err := i.probe(ctx, name, sealed)
	if err != nil {
		return creds.Proof{}, fmt.Errorf("probe lease %s: %w", name, err)
	}
	return creds.Proof{At: i.config.Now(), How: strings.Join(how, "; "), Refusal: strings.Join(said, "; ")}, nil
}

func (i *Issuer) probe(ctx context.Context, name string, sealed []byte) (how, said []string, _ error) {
	if err := checkName(name); err != nil {
		return nil, nil, err
	}
	if sealed == nil {
		return nil, nil, errors.New("a token has no name, and its handle is lost")
	}
	h, err := openHandle(sealed)
	if err != nil {
		return nil, nil, err
	}
	// A token whose life nobody saw begin is dead if the server says so; a
	// resource that never took it proves nothing.
	if at := i.config.Endpoints.Introspection; at != "" {
		s, err := i.introspect(ctx, h.Token)
		if err == nil && s.Active {
			err = fmt.Errorf("introspection calls it active: %w", creds.ErrStillValid)
		}
		if err != nil {
			return nil, nil, err
		}
		how, said = append(how, "introspection of the token at "+at), append(said, "active: false")
	}
	if at := i.config.Endpoints.Use; at != "" && (h.Used || !h.Known) {
		refusal, err := i.use(ctx, h.Token)
		if err != nil {
			return nil, nil, err
		}
		how, said = append(how, "GET "+at+" with the token"), append(said, refusal)
	}
	if len(how) == 0 {
		return nil, nil, errors.New("nobody to ask: set introspection_url or use_url again")
	}
	return how, said, nil
}

// List implements creds.Issuer: no server lists tokens.
func (i *Issuer) List(context.Context) ([]creds.Info, error) {
	return nil, fmt.Errorf("list leases: %w: OAuth 2.0 has no list of tokens", errors.ErrUnsupported)
}
