// Package static issues a secret that is as old as it is: one that a service
// gives to people and takes back from nobody but them.
//
// It is the last resort, and is made as harmless as such a secret can be. It is
// at rest sealed for this installation. No job holds it: the gateway adds it to
// the requests that a rule names, while the lease is held. And it is counted for
// how many days it has been the same.
//
// What it cannot do: nothing ends such a secret but its replacement at the
// service. So Revoke is creds.ErrNotRevocable, and there is never a proof.
package static

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// valueSecret is the only value of a lease.
const valueSecret = "secret"

const maxNameBytes = 40 // the contract's

// DefaultReplace is for how long a secret may be the same before the doctor
// counts it as missing: a quarter, as most rules of the trade have it.
const DefaultReplace = 90 * 24 * time.Hour

const day = 24 * time.Hour

// A Config says which secret it is.
type Config struct {
	// Secret gives the secret and when it was set; a time of zero says that it is
	// not sealed, and it is refused. It is asked for each lease, so that the
	// secret can be replaced under a running agent.
	Secret func() (creds.Secret, time.Time, error)

	User    string        // fact "username", for basic authentication; "" is none
	Replace time.Duration // how old it may get; 0 is DefaultReplace
	Owner   string        // installation id

	Now func() time.Time // clock of the agent; nil is time.Now
}

// An Issuer lends one secret. It may be used by several goroutines at once.
type Issuer struct {
	config Config

	mu    sync.Mutex
	names map[string]bool // issued by this life and not ended
}

// New checks c and returns an issuer. It does not read the secret.
func New(c Config) (*Issuer, error) {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Replace == 0 {
		c.Replace = DefaultReplace
	}
	switch {
	case c.Secret == nil:
		return nil, errors.New("secret_file: missing; \"mayfly seal\" writes it")
	case c.Replace < day:
		return nil, fmt.Errorf("replace %v: want a day or more", c.Replace)
	case c.Owner == "":
		return nil, errors.New("owner: missing; it is the installation's id")
	case strings.ContainsFunc(c.User, func(r rune) bool { return r <= ' ' || r > '~' || r == ':' }):
		return nil, fmt.Errorf("user %q: want a name without spaces and colons", c.User)
	}
	return &Issuer{config: c, names: map[string]bool{}}, nil
}

// Close does nothing.
func (i *Issuer) Close() {}

// Age is for how many days the secret has been the same, and whether it should
// have been replaced by now.
func (i *Issuer) Age() (days int, late bool, err error) {
	_, since, err := i.read()
	if err != nil {
		return 0, false, err
	}
	age := i.config.Now().Sub(since)
	return max(int(age/day), 0), age > i.config.Replace, nil
}

func (i *Issuer) read() (creds.Secret, time.Time, error) {
	secret, since, err := i.config.Secret()
	switch {
	case err != nil:
		return creds.Secret{}, time.Time{}, fmt.Errorf("secret_file: %w", err)
	case since.IsZero():
		return creds.Secret{}, time.Time{}, errors.New("secret_file: not sealed: write it with \"mayfly seal\", which notes the day, and remove the other")
	case secret.IsZero():
		return creds.Secret{}, time.Time{}, errors.New("secret_file: sealed nothing")
	}
	return secret, since, nil
}

// CheckScope implements creds.ScopeChecker: such a secret cannot be narrowed.
// Which requests it is for is the business of the rule.
func (i *Issuer) CheckScope(scope json.RawMessage) error {
	var s struct{}
	d := json.NewDecoder(strings.NewReader(string(scope)))
	d.DisallowUnknownFields()
	if len(scope) == 0 {
		return nil
	}
	if err := d.Decode(&s); err != nil {
		return fmt.Errorf("%w: a secret that is not made for the job has no scope; narrow it by requests: under broker: %w", creds.ErrBadScope, err)
	}
	if d.More() {
		return fmt.Errorf("%w: more than one value", creds.ErrBadScope)
	}
	return nil
}

// Issue implements creds.Issuer. The lease is withheld from the job. It ends with
// the grant in the sense that the gateway adds the secret no longer.
func (i *Issuer) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	l, err := i.issue(ctx, name, g)
	if err != nil {
		return creds.Lease{}, fmt.Errorf("lease %s: %w", name, err)
	}
	return l, nil
}

func (i *Issuer) issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	if err := checkName(name); err != nil {
		return creds.Lease{}, err
	}
	if err := i.CheckScope(g.Scope); err != nil {
		return creds.Lease{}, err
	}
	expires := g.Expires.UTC().Truncate(time.Second)
	if !expires.After(i.config.Now()) {
		return creds.Lease{}, fmt.Errorf("grant ends at %s, which is over", expires.Format(time.RFC3339))
	}
	if ctx.Err() != nil {
		return creds.Lease{}, context.Cause(ctx)
	}
	secret, since, err := i.read()
	if err != nil {
		return creds.Lease{}, err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.names[name] {
		return creds.Lease{}, errors.New("issued already")
	}
	i.names[name] = true
	facts := map[string]string{
		"since": since.UTC().Format(time.DateOnly), "days": strconv.Itoa(max(int(i.config.Now().Sub(since)/day), 0)),
	}
	if i.config.User != "" {
		facts["username"] = i.config.User
	}
	return creds.Lease{
		Values: map[string]creds.Secret{valueSecret: secret}, Facts: facts,
		ByName: true, Withheld: true, ExpiresAt: expires,
	}, nil
}

// Revoke implements creds.Issuer: it is creds.ErrNotRevocable, with what an
// auditor should know. The gateway has ended the only way to the secret before.
func (i *Issuer) Revoke(_ context.Context, name string, _ []byte) error {
	if err := checkName(name); err != nil {
		return err
	}
	i.mu.Lock()
	delete(i.names, name)
	i.mu.Unlock()
	since := "on a day that cannot be read now"
	if _, at, err := i.read(); err == nil {
		since = fmt.Sprintf("on %s, %d days ago", at.UTC().Format(time.DateOnly), max(int(i.config.Now().Sub(at)/day), 0))
	}
	return fmt.Errorf("lease %s: %w: a static secret, set %s, is as good as before, until it is replaced at its service; the job never held it", name, creds.ErrNotRevocable, since)
}

// Probe implements creds.Issuer. There is never a proof.
func (i *Issuer) Probe(_ context.Context, name string, _ []byte) (creds.Proof, error) {
	return creds.Proof{}, fmt.Errorf("probe lease %s: %w: a static secret is not tried, since nothing ended it", name, creds.ErrNotRevocable)
}

// List implements creds.Issuer: there is nothing to find.
func (i *Issuer) List(context.Context) ([]creds.Info, error) {
	return nil, fmt.Errorf("list leases: %w: a static secret is lent and not made", errors.ErrUnsupported)
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
