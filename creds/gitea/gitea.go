// Package gitea issues access tokens of a Gitea that live no longer than a job.
//
// A lease is an access token of one user, the bot, which the agent makes with
// the bot's own credential, with the scopes that the policy names and no other,
// and deletes. Its name at the server is made of the installation and the name
// of the lease, so that a token is deleted whose answer was lost. It is dead when
// the server, which accepted it when it was new, answers its use with 401.
//
// What it cannot do: Gitea ends no token by itself, so that one which nobody
// deletes lives on; the reaper takes those that no journal owes. A token cannot
// be narrowed to some repositories: it reaches what the bot reaches. So a bot is
// for jobs that trust each other, is no administrator, neither of the server nor
// of a repository (who may add deploy keys, which stay), and owns nothing.
package gitea

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/web"
)

const maxNameBytes = 40 // the contract's

// A Config says where the server is, who the bot is, and what leases may have.
type Config struct {
	URL      string
	CAFile   string // PEM; only these are trusted, "" is the system's
	Insecure bool   // http to another machine

	// User is the bot. Password gives its password, or a token of it that has
	// write:user and all of Scopes; it is asked for each request, so that it can
	// be changed under a running agent.
	User     string
	Password func() (creds.Secret, error)

	// Scopes are all that leases may have of Gitea's: read:repository, ….
	Scopes []string

	// JobURL is where jobs find the server, if that is not where the agent does.
	JobURL string

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
	err := web.CheckURL(c.URL, c.Insecure)
	wrong(err != nil, "url %w", err)
	if c.JobURL != "" {
		err := web.CheckURL(c.JobURL, c.Insecure)
		wrong(err != nil, "job_url %w", err)
	}
	wrong(c.CAFile != "" && strings.HasPrefix(c.URL, "http:"), "ca_file: not used with %s", c.URL)
	wrong(!plain(c.User), "user %q: want the name of the bot", c.User)
	wrong(c.Password == nil, "password_file: missing; it has the bot's password")
	wrong(len(c.Scopes) == 0, "scopes: missing; name those that leases may have")
	for _, s := range c.Scopes {
		err := checkScope(s)
		wrong(err != nil, "scopes: %w", err)
	}
	wrong(!plain(c.Owner), "owner %q: want the installation's id", c.Owner)
	return errors.Join(errs...)
}

// plain are names that need no quoting in a URL, and no dot, which divides names
// of tokens.
func plain(name string) bool {
	return name != "" && strings.Trim(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_") == ""
}

// checkScope knows the scopes of Gitea 1.27 (models/auth/access_token_scope.go).
// Three are never given: "all", and the two with which a job could make itself
// tokens, keys or users that stay when its own token is gone.
func checkScope(s string) error {
	switch level, category, _ := strings.Cut(s, ":"); {
	case s == "public-only":
		return nil
	case s == "all", s == "write:user", s == "write:admin":
		return fmt.Errorf("%q: no job may have that: it makes credentials that outlive the job", s)
	case (level == "read" || level == "write") &&
		slices.Contains([]string{"activitypub", "admin", "issue", "misc", "notification", "organization", "package", "repository", "user"}, category):
		return nil
	}
	return fmt.Errorf("%q: want one as in read:repository, or public-only", s)
}

// An Issuer makes and deletes tokens of one bot. It may be used by several
// goroutines at once.
type Issuer struct {
	config Config
	client *http.Client
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
	c.URL, c.JobURL = strings.TrimRight(c.URL, "/"), strings.TrimRight(c.JobURL, "/")
	if err := c.Validate(); err != nil {
		return nil, err
	}
	client, err := web.NewClient(c.CAFile, c.Out)
	if err != nil {
		return nil, err
	}
	return &Issuer{config: c, client: client}, nil
}

// Close ends idle connections. Leases stay as they are.
func (i *Issuer) Close() { i.client.CloseIdleConnections() }

// A Scope is what a lease of the policy asks for.
type Scope struct {
	Scopes []string `json:"scopes"` // of Gitea's, and of the configuration's
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
	rights := 0
	for _, scope := range s.Scopes {
		if err := checkScope(scope); err != nil {
			return s, fmt.Errorf("%w: %w", creds.ErrBadScope, err)
		}
		if !covers(i.config.Scopes, scope) {
			return s, fmt.Errorf("%w: %s is not among the scopes of the configuration", creds.ErrBadScope, scope)
		}
		if scope != publicOnly {
			rights++
		}
	}
	if rights == 0 {
		return s, fmt.Errorf("%w: asks for nothing: name scopes", creds.ErrBadScope)
	}
	if slices.Contains(i.config.Scopes, publicOnly) && !slices.Contains(s.Scopes, publicOnly) {
		s.Scopes = append(s.Scopes, publicOnly)
	}
	return s, nil
}

// publicOnly takes away, and gives nothing.
const publicOnly = "public-only"

// covers says whether scopes have what scope gives: to write is to read.
func covers(scopes []string, scope string) bool {
	category, read := strings.CutPrefix(scope, "read:")
	return scope == publicOnly || slices.Contains(scopes, scope) || read && slices.Contains(scopes, "write:"+category)
}

// prefix begins the names of all tokens of the installation; that of the lease
// follows.
func (i *Issuer) prefix() string { return "mayfly." + i.config.Owner + "." }

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
