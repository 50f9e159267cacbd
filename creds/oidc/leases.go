package oidc

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

const (
	maxNameBytes = 40 // the contract's
	maxAudiences = 16
	// maxAsked bounds the tokens of one lease: each is masked in the job's log. A
	// tool asks once for each thing that it logs in to.
	maxAsked = 100
)

// errUnknown is the refusal of a lease that is dead.
var errUnknown = errors.New("no lease of this name: it was never issued, has ended, or was revoked")

// Leases are the creds.Issuer of an identity: a lease is the right of a job to ask
// for tokens, for the audiences of its scope and until it ends. A token that was
// given is good for its seconds of life, whatever becomes of the lease.
//
// The rights are in memory alone, so that the death of the agent ends all of them.
// Leases may be used by several goroutines at once.
type Leases struct {
	issuer *Issuer
	mu     sync.Mutex
	rights map[string]*right
}

// A right is a lease.
type right struct {
	subject   creds.Subject
	audiences []string
	expires   time.Time
	asked     int
}

// NewLeases are those of an issuer.
func NewLeases(i *Issuer) *Leases {
	return &Leases{issuer: i, rights: map[string]*right{}}
}

// Close ends all of them.
func (l *Leases) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	clear(l.rights)
}

// scope is the section of the policy: who shall accept the tokens.
type scope struct {
	Audiences []string `json:"audiences"`
}

func parseScope(b json.RawMessage) (scope, error) {
	var s scope
	d := json.NewDecoder(strings.NewReader(string(b)))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return s, fmt.Errorf("%w: want {audiences: [who accepts the tokens]}: %w", creds.ErrBadScope, err)
	}
	if d.More() {
		return s, fmt.Errorf("%w: more than one value", creds.ErrBadScope)
	}
	if len(s.Audiences) == 0 || len(s.Audiences) > maxAudiences {
		return s, fmt.Errorf("%w: audiences: 1 to %d are needed; a token for anybody is everybody's", creds.ErrBadScope, maxAudiences)
	}
	for i, a := range s.Audiences {
		bad := a == "" || len(a) > 255 || strings.ContainsFunc(a, func(r rune) bool { return r <= ' ' || r > '~' })
		if bad || slices.Contains(s.Audiences[:i], a) {
			return s, fmt.Errorf("%w: audience %q: want printable ASCII without blanks, 255 bytes at most, once", creds.ErrBadScope, a)
		}
	}
	return s, nil
}

// CheckScope implements creds.ScopeChecker.
func (l *Leases) CheckScope(b json.RawMessage) error {
	_, err := parseScope(b)
	return err
}

// Issue implements creds.Issuer. No token is made yet.
func (l *Leases) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	lease, err := l.issue(ctx, name, g)
	if err != nil {
		return creds.Lease{}, fmt.Errorf("lease %s: %w", name, err)
	}
	return lease, nil
}

func (l *Leases) issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	if name == "" || len(name) > maxNameBytes || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return creds.Lease{}, fmt.Errorf("name %q: want 1 to %d bytes of [a-z0-9-]", name, maxNameBytes)
	}
	s, err := parseScope(g.Scope)
	if err != nil {
		return creds.Lease{}, err
	}
	expires := g.Expires.UTC().Truncate(time.Second)
	if !expires.After(l.issuer.config.Now()) {
		return creds.Lease{}, fmt.Errorf("grant ends at %s, which is over", expires.Format(time.RFC3339))
	}
	if ctx.Err() != nil {
		return creds.Lease{}, context.Cause(ctx)
	}
	if g.Subject.Job == "" {
		return creds.Lease{}, errors.New("no job: the agent asks for no token of its own here")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.rights[name] != nil {
		return creds.Lease{}, errors.New("issued already")
	}
	l.rights[name] = &right{subject: g.Subject, audiences: s.Audiences, expires: expires}
	return creds.Lease{
		Values: map[string]creds.Secret{creds.RequestToken: creds.NewSecret(rand.Text() + rand.Text())},
		Facts:  map[string]string{"issuer": l.issuer.config.URL},
		Handle: creds.Handle("{}"), ByName: true, ExpiresAt: expires,
	}, nil
}

// Ask implements creds.Asker. Without an audience it is the one of the scope, if
// that has one alone.
func (l *Leases) Ask(ctx context.Context, name, audience string) (creds.Answer, error) {
	if ctx.Err() != nil {
		return creds.Answer{}, context.Cause(ctx)
	}
	l.mu.Lock()
	defer l.mu.Unlock() // a token is made under a right, or not at all
	r, err := l.right(name)
	if err != nil {
		return creds.Answer{}, err
	}
	if audience == "" && len(r.audiences) == 1 {
		audience = r.audiences[0]
	}
	if !slices.Contains(r.audiences, audience) {
		return creds.Answer{}, fmt.Errorf("%w: tokens are for the audience %s", creds.ErrBadScope, strings.Join(r.audiences, " or "))
	}
	if r.asked >= maxAsked {
		return creds.Answer{}, fmt.Errorf("%w: %d tokens were given already, and no more are", creds.ErrBadScope, maxAsked)
	}
	t, err := l.issuer.Mint(r.subject, audience, map[string]string{"lease": name})
	if err != nil {
		return creds.Answer{}, err
	}
	r.asked++
	return creds.Answer{Value: t.Value, ID: t.ID, Audience: audience, ExpiresAt: t.Expires}, nil
}

// right is the one of a name, while it lasts. The caller holds mu.
func (l *Leases) right(name string) (*right, error) {
	r := l.rights[name]
	if r == nil || !l.issuer.config.Now().Before(r.expires) {
		return nil, errUnknown
	}
	return r, nil
}

// Revoke implements creds.Issuer.
func (l *Leases) Revoke(ctx context.Context, name string, _ []byte) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.rights, name)
	return nil
}

// Probe implements creds.Issuer: it asks as the job would. Without a handle the
// lease may be one of an earlier life, which has ended with it.
func (l *Leases) Probe(ctx context.Context, name string, handle []byte) (creds.Proof, error) {
	if ctx.Err() != nil {
		return creds.Proof{}, context.Cause(ctx)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	_, err := l.right(name)
	if err == nil {
		return creds.Proof{}, creds.ErrStillValid
	}
	how := "asked this agent for a token under " + name
	if handle == nil {
		how += ", which it does not remember to have issued"
	}
	return creds.Proof{At: l.issuer.config.Now().UTC(), How: how, Refusal: err.Error()}, nil
}

// List implements creds.Issuer.
func (l *Leases) List(ctx context.Context) ([]creds.Info, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []creds.Info
	for name, r := range l.rights {
		all = append(all, creds.Info{Name: name, Owner: l.issuer.config.Owner, ExpiresAt: r.expires})
	}
	return all, nil
}
