// Package kubernetes issues tokens of service accounts.
//
// A lease is an empty Secret, and a token that the API server binds to it
// (TokenRequest, authentication.k8s.io/v1): when the Secret is deleted, the token
// is refused. The Secret's name has the lease's name in it, its labels say whose it
// is and until when, its annotations for which job. So leases are revoked and
// listed by name, whatever the agent still knows.
//
// What a token may do is what RBAC lets its service account do. The agent's own
// account may create tokens of those accounts and create, list and delete Secrets
// in one namespace; since that lets it read all Secrets there, the namespace should
// have nothing else.
//
// A server that has seen a token accepts it for ten seconds more, from a cache. A
// lease counts as dead when a request with it is answered 401. Kubernetes gives no
// token for less than ten minutes, so a grant that ends sooner is refused: a token
// would outlive it if nobody deleted its Secret.
package kubernetes

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/web"
)

const maxNameBytes = 40 // the contract's

// minLife is the shortest that a token may be asked for, and the margin in which
// the request is made.
const (
	minLife = 10 * time.Minute
	margin  = time.Second
)

// A Config says where the API server is and who the agent is there.
type Config struct {
	Address   string // https://HOST:PORT
	CAFile    string // PEM; only these are trusted, "" is the system's
	Namespace string // of the service accounts, and of the Secrets that tokens are bound to
	Account   string // service account of jobs, unless the scope names one

	// JobAddress is where jobs find the server, if that is not where the agent
	// does.
	JobAddress string

	// Out is the agent's way out; nil dials directly.
	Out web.Out

	// Token is the agent's own, and asked for at each use.
	Token func() (creds.Secret, error)
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
	for key, text := range map[string]string{"address": c.Address, "job_address": c.JobAddress} {
		bad := web.CheckServer(text, false) != nil || !strings.HasPrefix(text, "https:")
		wrong(bad && (text != "" || key == "address"), "%s %q: want https://HOST:PORT", key, text)
	}
	wrong(!label(c.Namespace), "namespace %q: want the name of one", c.Namespace)
	wrong(c.Account != "" && !account(c.Account), "service_account %q: want the name of one", c.Account)
	wrong(!regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$`).MatchString(c.Owner), "owner %q: want the installation's id, as a label may be", c.Owner)
	wrong(c.Token == nil, "token_file: missing; the agent needs an account of its own")
	return errors.Join(errs...)
}

// label and account are names of namespaces and of other objects (RFC 1123).
func label(name string) bool {
	return regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`).MatchString(name)
}

func account(name string) bool {
	return len(name) <= 253 && regexp.MustCompile(`^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$`).MatchString(name)
}

// An Issuer mints tokens in one namespace. It may be used by several goroutines at
// once.
type Issuer struct {
	config Config
	client *http.Client
	ca     []byte // PEM of what is trusted, for jobs; nil is the system's
}

// New checks c and returns an issuer. It does not connect: a server that is down
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
	i := &Issuer{config: c, client: client}
	if c.CAFile != "" {
		if i.ca, err = os.ReadFile(c.CAFile); err != nil {
			return nil, fmt.Errorf("ca_file: %w", err)
		}
	}
	return i, nil
}

// Close ends idle connections. Leases stay as they are.
func (i *Issuer) Close() { i.client.CloseIdleConnections() }

// MinLife implements creds.Minimum.
func (i *Issuer) MinLife() time.Duration { return minLife + margin }

// A Scope is what a lease of the policy asks for.
type Scope struct {
	// Account is the service account whose token it is; "" is the configuration's.
	Account string `json:"service_account,omitempty"`
	// Audiences are who accepts the token; none is the API server itself. A token
	// for others is not accepted by the API server unless it is among them.
	Audiences []string `json:"audiences,omitempty"`
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
	if s.Account == "" {
		s.Account = i.config.Account
	}
	bad := ""
	switch {
	case d.More():
		bad = "more than one value"
	case s.Account == "":
		bad = "service_account: missing here and in the configuration"
	case !account(s.Account):
		bad = fmt.Sprintf("service_account %q: want the name of one", s.Account)
	}
	for _, a := range s.Audiences {
		if a == "" {
			bad = "audiences: one is empty"
		}
	}
	if bad != "" {
		return s, fmt.Errorf("%w: %s", creds.ErrBadScope, bad)
	}
	return s, nil
}

// object is the name of a lease's Secret. A name of Kubernetes begins and ends with
// a letter or digit, which a lease's name need not.
func object(name string) string { return "mayfly-" + name + "-lease" }

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
