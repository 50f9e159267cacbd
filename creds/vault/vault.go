// Package vault issues what a server with Vault's HTTP API gives: HashiCorp
// Vault or OpenBao, with any secrets engine.
//
// A lease is made in three steps. The agent logs in with a token about the job,
// which the server checks against the claims that its role is bound to. Under
// that login it makes a token that ends with the grant and says in its metadata
// whose it is. With that one it reads or writes the path of the scope. Revoking
// ends what the engine made, then the login, and with it all that is under it.
//
// A server's "done" is no proof: a database that refuses to drop a role leaves
// a password that works. So a lease counts as dead when its tokens are refused
// and the server no longer knows what the engine made. For the last the agent
// looks with a login of its own (Config.AgentRole), which may revoke leases.
// Without it only tokens, and secrets that have no lease, are given.
//
// The name of a lease is in the token's metadata and in no path. A lease whose
// handle is lost is found by it if the agent's role may list accessors; else it
// ends at its expiry.
package vault

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/web"
)

const maxNameBytes = 40 // the contract's

// An Identity is a token that the agent logs in with.
type Identity struct {
	Token creds.Secret
	ID    string // its "jti", for the records
}

// A Signer makes an identity for one lease of a job, new at every call. A
// subject without a job asks for one about the agent itself.
type Signer func(ctx context.Context, s creds.Subject, lease string) (Identity, error)

// A Config says where the server is and how the agent logs in.
type Config struct {
	Address   string `yaml:"address,required" json:"address"`
	Namespace string `yaml:"namespace" json:"namespace"`
	CAFile    string `yaml:"ca_file" json:"ca_file"`   // PEM; only these are trusted, "" is the system's
	Insecure  bool   `yaml:"insecure" json:"insecure"` // http to another machine
	Mount     string `yaml:"mount" json:"mount"`       // of the jwt method; "" is jwt
	Role      string `yaml:"role" json:"role"`         // of jobs, unless the scope names one
	AgentRole string `yaml:"agent_role" json:"agent_role"`

	// JobAddress is where jobs find the server, if that is not where the agent
	// does.
	JobAddress string `yaml:"job_address" json:"job_address"`

	// Out is the agent's way out; nil dials directly.
	Out web.Out `yaml:"-" json:"-"`

	Sign  Signer             `yaml:"-" json:"-"`
	Owner string             `yaml:"-" json:"-"` // installation id
	Trace func(point string) `yaml:"-" json:"-"` // called between outside effects; nil is none
	Now   func() time.Time   `yaml:"-" json:"-"` // clock of the agent; nil is time.Now
}

// Validate reports everything that is wrong with c, by the names of the file.
func (c Config) Validate() error {
	var errs []error
	wrong := func(bad bool, format string, args ...any) {
		if bad {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	for key, text := range map[string]string{"address": c.Address, "job_address": c.JobAddress} {
		if text != "" || key == "address" {
			err := web.CheckServer(text, c.Insecure)
			wrong(err != nil, "%s %w", key, err)
		}
	}
	wrong(c.CAFile != "" && strings.HasPrefix(c.Address, "http:"), "ca_file: not used with %s", c.Address)
	wrong(!cleanPath(c.mount()), "mount %q: want the path of the jwt method", c.Mount)
	for key, role := range map[string]string{"role": c.Role, "agent_role": c.AgentRole} {
		wrong(strings.ContainsAny(role, "/ ?#%\x00"), "%s %q: want the name of a role of auth/%s", key, role, c.mount())
	}
	wrong(c.Role != "" && c.Role == c.AgentRole, "agent_role: the role of jobs; a job must not be able to do what the agent does")
	wrong(strings.ContainsAny(c.Namespace, "\r\n\x00"), "namespace %q: want one line", c.Namespace)
	wrong(c.Owner == "", "owner: missing; it is the installation's id")
	wrong(c.Sign == nil, "oidc: missing; the agent needs an identity to log in with")
	return errors.Join(errs...)
}

func (c Config) mount() string {
	if c.Mount == "" {
		return "jwt"
	}
	return c.Mount
}

// cleanPath refuses what a server or a proxy before it could take for another path.
func cleanPath(path string) bool {
	for part := range strings.SplitSeq(path, "/") {
		if part == "" || part == "." || part == ".." || strings.ContainsAny(part, "?#%\\ ") {
			return false
		}
	}
	return !strings.ContainsFunc(path, func(r rune) bool { return r < ' ' || r > '~' })
}

// An Issuer mints leases on one server. It may be used by several goroutines at
// once.
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
	// Role of the jwt method to log in with; "" is the configuration's.
	Role string `json:"role,omitempty"`
	// Policies that the token has, of those of the role; none are all of them.
	Policies []string `json:"policies,omitempty"`
	// Token gives the job the token itself, as "vault_token".
	Token bool `json:"token,omitempty"`
	// Path is read, or written with Data, without "v1/": database/creds/app. Each
	// field of the answer becomes a value of the lease.
	Path string         `json:"path,omitempty"`
	Data map[string]any `json:"data,omitempty"`
	// Unleased accepts an answer that the server cannot take back, as that of a
	// key-value engine: revoking the lease ends the way to it, not the secret.
	Unleased bool `json:"unleased,omitempty"`
	// Wrap adds "wrapping_token", with which the answer can be had once, for so
	// many seconds: who finds it used up knows that somebody else has read it.
	Wrap int `json:"wrap,omitempty"`
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
	if s.Role == "" {
		s.Role = i.config.Role
	}
	bad := ""
	switch {
	case s.Path == "" && !s.Token:
		bad = "asks for nothing: name a path, or token: true"
	case s.Path == "" && (s.Data != nil || s.Wrap != 0 || s.Unleased):
		bad = "data, wrap and unleased go with a path"
	case s.Path != "" && (!cleanPath(s.Path) || strings.HasPrefix(s.Path, "v1/")):
		bad = fmt.Sprintf("path %q: want one as in database/creds/app", s.Path)
	case strings.HasPrefix(s.Path, "auth/"), strings.HasPrefix(s.Path, "sys/"):
		bad = fmt.Sprintf("path %q: want one of a secrets engine; token: true gives a token", s.Path)
	case s.Role == "":
		bad = "role: missing here and in the configuration"
	case s.Role == i.config.AgentRole:
		bad = "role: is the agent's own"
	case strings.ContainsAny(s.Role, "/ ?#%\x00"):
		bad = fmt.Sprintf("role %q: want the name of a role", s.Role)
	case s.Wrap < 0 || s.Wrap > 3600:
		bad = fmt.Sprintf("wrap %d: want seconds, 3600 at most", s.Wrap)
	}
	for _, p := range s.Policies {
		if p == "" || p == "root" || strings.ContainsAny(p, "\x00,/ ") {
			bad = fmt.Sprintf("policy %q: want the name of one that the role has", p)
		}
	}
	if bad != "" {
		return s, fmt.Errorf("%w: %s", creds.ErrBadScope, bad)
	}
	return s, nil
}

// checkName keeps to the contract's alphabet; the name is put into metadata.
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
