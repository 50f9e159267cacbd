// Package oauth2 issues access tokens of an OAuth 2.0 authorization server.
//
// A lease is an access token that the agent's client is given for its own
// credentials (RFC 6749, section 4.4), or in exchange for a token in which the
// agent says which job asks (RFC 8693). What the server gives is compared with
// what was asked for, since a server may give other scopes and another time: a
// token that may more, or lives longer than the grant, is revoked at once and
// the lease refused. It is taken back by RFC 7009. It is dead when introspection
// (RFC 7662), which knew the token when it was new, calls it inactive, and when a
// resource refuses it with 401 that took it before: one of them, or both, as
// configured.
//
// What it cannot do: such tokens have no names. One whose answer was lost with
// the agent is not found again and lives until it expires, for as long as the
// server gives: minutes, if it is set up well. And a resource that looks at a
// signature and asks nobody does not hear of a revocation; name it as use_url,
// and the lease is called dead only when that one refuses it.
package oauth2

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/web"
)

const maxNameBytes = 40 // the contract's

// An Identity is a token in which the agent says which job asks, and its "jti".
type Identity struct {
	Token creds.Secret
	ID    string
}

// A Signer makes an Identity for a lease of that name.
type Signer func(ctx context.Context, s creds.Subject, lease string) (Identity, error)

// Endpoints are those of the server, as its metadata names them (RFC 8414).
type Endpoints struct {
	Token         string
	Revocation    string
	Introspection string // "" if the server has none; then Use is needed
	Use           string // a resource that wants a token; "" asks introspection alone
}

// A Config says who the agent is at the server, and what leases may have.
type Config struct {
	Endpoints Endpoints
	CAFile    string // PEM; only these are trusted, "" is the system's
	Insecure  bool   // http to another machine

	ClientID     string
	ClientSecret func() (creds.Secret, error) // asked for each request
	// Post sends them in the body and not by basic authentication, as some
	// servers want it (client_secret_post).
	Post bool

	Scopes    []string // all that leases may have
	Audiences []string // all that leases may be for; none lets them name none

	// Sign, if it is not nil, has each token exchanged for one of the job's.
	Sign Signer

	// Out is the agent's way out; nil dials directly.
	Out web.Out

	Owner string             // installation id
	Trace func(point string) // called between outside effects; nil is none
	Now   func() time.Time   // clock of the agent; nil is time.Now
}

// Validate reports everything that is wrong with c, by the names of the file.
func (c Config) Validate() error {
	var errs []error
	wrong := func(bad bool, format string, args ...any) {
		if bad {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	for key, text := range map[string]string{
		"token_url": c.Endpoints.Token, "revocation_url": c.Endpoints.Revocation,
		"introspection_url": c.Endpoints.Introspection, "use_url": c.Endpoints.Use,
	} {
		if text != "" || key == "token_url" || key == "revocation_url" {
			err := web.CheckURL(text, c.Insecure)
			wrong(err != nil, "%s %w", key, err)
		}
	}
	wrong(c.Endpoints.Introspection == "" && c.Endpoints.Use == "", "introspection_url: missing, and use_url too: nobody could tell when a token is dead")
	wrong(c.CAFile != "" && strings.HasPrefix(c.Endpoints.Token, "http:"), "ca_file: not used with %s", c.Endpoints.Token)
	wrong(c.ClientID == "", "client_id: missing")
	wrong(c.ClientSecret == nil, "client_secret_file: missing")
	wrong(len(c.Scopes) == 0, "scopes: missing; name those that leases may have")
	for _, s := range c.Scopes {
		wrong(!scopeToken(s), "scopes: %q: want one word", s)
	}
	wrong(c.Owner == "", "owner: missing; it is the installation's id")
	return errors.Join(errs...)
}

// scopeToken is what RFC 6749, section 3.3, lets a scope be.
func scopeToken(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' })
}

// An Issuer has tokens made and revoked at one server. It may be used by several
// goroutines at once.
type Issuer struct {
	config Config
	client *http.Client

	mu    sync.Mutex
	names map[string]bool // issued by this life and not revoked
}

// New checks c and returns an issuer. It does not connect: a server that is
// down stops the jobs that want it and not the agent.
func New(c Config) (*Issuer, error) {
	if c.Trace == nil {
		c.Trace = func(string) {}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	client, err := web.NewClient(c.CAFile, c.Out)
	if err != nil {
		return nil, err
	}
	return &Issuer{config: c, client: client, names: map[string]bool{}}, nil
}

// Close ends idle connections. Leases stay as they are.
func (i *Issuer) Close() { i.client.CloseIdleConnections() }

// A Scope is what a lease of the policy asks for.
type Scope struct {
	Scopes   []string `json:"scopes"`             // of the configuration's
	Audience string   `json:"audience,omitempty"` // one of the configuration's
}

// CheckScope implements creds.ScopeChecker. It asks no server.
func (i *Issuer) CheckScope(scope json.RawMessage) error {
	_, err := i.parseScope(scope)
	return err
}

func (i *Issuer) parseScope(text json.RawMessage) (Scope, error) {
	var s Scope
	if len(text) == 0 {
		text = json.RawMessage("{}")
	}
	d := json.NewDecoder(strings.NewReader(string(text)))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return s, fmt.Errorf("%w: %w", creds.ErrBadScope, err)
	}
	if d.More() {
		return s, fmt.Errorf("%w: more than one value", creds.ErrBadScope)
	}
	for _, scope := range s.Scopes {
		if !slices.Contains(i.config.Scopes, scope) {
			return s, fmt.Errorf("%w: %q is not among the scopes of the configuration", creds.ErrBadScope, scope)
		}
	}
	switch {
	case len(s.Scopes) == 0:
		return s, fmt.Errorf("%w: asks for nothing, which a server may take for everything: name scopes", creds.ErrBadScope)
	case s.Audience == "" && len(i.config.Audiences) > 0:
		return s, fmt.Errorf("%w: audience: missing; want one of %s", creds.ErrBadScope, strings.Join(i.config.Audiences, ", "))
	case s.Audience != "" && !slices.Contains(i.config.Audiences, s.Audience):
		return s, fmt.Errorf("%w: audience %q is not among those of the configuration", creds.ErrBadScope, s.Audience)
	}
	return s, nil
}

func checkName(name string) error {
	if name == "" || len(name) > maxNameBytes || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return fmt.Errorf("lease name %q: want 1 to %d bytes of a-z, 0-9 and -", name, maxNameBytes)
	}
	return nil
}

var (
	_ creds.Issuer       = (*Issuer)(nil)
	_ creds.ScopeChecker = (*Issuer)(nil)
)
