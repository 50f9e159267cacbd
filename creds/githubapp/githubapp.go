// Package githubapp issues tokens of an installation of a GitHub App, narrowed to
// repositories by id and to permissions.
//
// An empty list means "all" to GitHub, so that both must be said, and what the
// token has is compared with what was asked for, in GitHub's answer and by the
// token's own list of repositories. One that has anything else is revoked at once.
//
// A token is revoked with itself, so that its handle is needed; one that is lost
// ends at its expiry, and nobody has it. GitHub's tokens live for an hour and not
// for less: a grant that ends sooner is refused, since a token would outlive it if
// the agent could not revoke it. That a token is dead is GitHub's "Bad credentials".
//
// It is tested against a server that behaves as GitHub documents it, and not at
// GitHub.
package githubapp

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

// life is that of every token of an installation.
const life = time.Hour

const defaultAddress = "https://api.github.com"

// A Config says which App the agent is.
type Config struct {
	Address      string // of the API; "" is https://api.github.com
	CAFile       string // PEM; only these are trusted, "" is the system's
	App          string // client id, or the App's id
	Installation int64

	// Out is the agent's way out; nil dials directly.
	Out web.Out

	// Key is the App's private key, in PEM, and asked for at each use.
	Key   func() (creds.Secret, error)
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
	err := web.CheckURL(c.address(), false)
	wrong(err != nil, "address %w", err)
	wrong(strings.HasSuffix(c.Address, "/"), "address %q: want https://HOST[/api/v3]", c.Address)
	wrong(c.CAFile != "" && strings.HasPrefix(c.Address, "http:"), "ca_file: not used with %s", c.Address)
	wrong(c.App == "", "app: missing; it is the client id of the GitHub App")
	wrong(c.Installation <= 0, "installation: missing; it is the number at the end of its settings' address")
	wrong(c.Key == nil, "private_key_file: missing; the private key of the GitHub App")
	return errors.Join(errs...)
}

func (c Config) address() string {
	if c.Address == "" {
		return defaultAddress
	}
	return c.Address
}

// An Issuer mints tokens of one installation. It may be used by several goroutines
// at once.
type Issuer struct {
	config Config
	client *http.Client

	mu    sync.Mutex
	names map[string]bool // issued by this life and not revoked
}

// New checks c and returns an issuer. It does not connect: a service that is down
// stops the jobs that want it and not the agent.
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

// MinLife implements creds.Minimum: GitHub gives every token an hour.
func (i *Issuer) MinLife() time.Duration { return life }

// A Scope is what a lease of the policy asks for. Both must be said.
type Scope struct {
	// Repositories are ids: a name may be another repository tomorrow.
	Repositories []int64 `json:"repository_ids"`
	// Permissions are those of the App's, each with read, write or admin.
	Permissions map[string]string `json:"permissions"`
}

// CheckScope implements creds.ScopeChecker. It asks no server.
func (i *Issuer) CheckScope(scope json.RawMessage) error {
	_, err := parseScope(scope)
	return err
}

func parseScope(text json.RawMessage) (Scope, error) {
	var s Scope
	if len(text) == 0 {
		text = json.RawMessage("{}")
	}
	d := json.NewDecoder(strings.NewReader(string(text)))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return s, fmt.Errorf("%w: %w", creds.ErrBadScope, err)
	}
	bad := ""
	switch {
	case d.More():
		bad = "more than one value"
	case len(s.Repositories) == 0:
		bad = "repository_ids: empty, which GitHub takes for all of the installation's"
	case len(s.Permissions) == 0:
		bad = "permissions: empty, which GitHub takes for all of the App's"
	case len(s.Repositories) > maxRepositories:
		bad = fmt.Sprintf("repository_ids: %d, want %d at most", len(s.Repositories), maxRepositories)
	case slices.ContainsFunc(s.Repositories, func(id int64) bool { return id <= 0 }):
		bad = "repository_ids: one is no id"
	}
	for name, level := range s.Permissions {
		if name == "" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz_") != "" || level != "read" && level != "write" && level != "admin" {
			bad = fmt.Sprintf("permissions: %q: %q: want read, write or admin", name, level)
		}
	}
	if bad != "" {
		return s, fmt.Errorf("%w: %s", creds.ErrBadScope, bad)
	}
	slices.Sort(s.Repositories)
	s.Repositories = slices.Compact(s.Repositories)
	return s, nil
}

// List implements creds.Issuer: GitHub does not tell which tokens there are.
func (i *Issuer) List(ctx context.Context) ([]creds.Info, error) {
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("list leases: %w: tokens cannot be listed", errors.ErrUnsupported)
}

// checkName keeps to the contract's alphabet.
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
