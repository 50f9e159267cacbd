// Package credstest is the conformance suite of creds.Issuer: one subtest per
// clause of the contract. It also has a fake issuer whose provider is a
// directory, for tests of what uses issuers.
package credstest

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// A Harness is an issuer and what the suite needs to judge it.
type Harness struct {
	Issuer creds.Issuer
	Owner  string // installation id that the issuer was made with

	Scope     json.RawMessage   // of a grant that works
	BadScopes []json.RawMessage // each to be refused; an unknown key is tried in any case

	// Lasts is how long grants are; 0 is ten minutes. For providers that give
	// nothing shorter.
	Lasts time.Duration

	// Lag is how long the provider may go on accepting what was revoked: the agent
	// probes again until then. 0 is not at all.
	Lag time.Duration

	// Use really uses the lease, as a job would: nil if the provider accepts it.
	Use func(ctx context.Context, l creds.Lease) error

	// Hold starts a use that lasts (a session). The channel gets its end. nil
	// if the provider knows no such thing.
	Hold func(ctx context.Context, l creds.Lease) (ended <-chan error, err error)

	// Endures says that nothing ends a lease at its provider, so that Revoke is
	// ErrNotRevocable and Probe no proof. Clauses about an end do not apply.
	Endures bool

	// Inside says that the provider is the issuer itself, which is never down.
	// Clauses about a backend that does not answer do not apply, and Down, Up,
	// Freeze and Thaw are not called.
	Inside bool

	// Down takes the backend down so that it answers nobody; Up undoes it.
	Down, Up func(ctx context.Context) error

	// Freeze makes the backend accept requests and not answer them; Thaw
	// undoes it.
	Freeze, Thaw func(ctx context.Context) error

	// soon is how long a method may take to come back after its context ended,
	// which is spent only by one that does not; 0 is most of a clause.
	soon time.Duration
}

// A clause is one sentence of the contract. Its check returns what breaks it.
type clause struct {
	name  string
	check func(ctx context.Context, h Harness) error
}

// clauseTimeout bounds a clause, set for the slowest server seen by a factor
// of twenty.
const clauseTimeout = 2 * time.Minute

func (h Harness) patience() time.Duration { return cmp.Or(h.soon, clauseTimeout*3/4) }

// Run checks that the issuer of factory keeps the contract. The factory is
// called once for each clause; its backend may be shared, since names are not.
func Run(t *testing.T, factory func(t *testing.T) Harness) {
	t.Helper()
	for _, c := range clauses() {
		t.Run(strings.ReplaceAll(c.name, " ", "_"), func(t *testing.T) {
			h := factory(t)
			if h.Endures && slices.Contains(ends(), c.name) || h.Inside && slices.Contains(outages(), c.name) {
				return
			}
			ctx, cancel := context.WithTimeout(t.Context(), clauseTimeout)
			defer cancel()
			if err := c.check(ctx, h); err != nil {
				t.Errorf("%s: %v", c.name, err)
			}
		})
	}
	if os.Getenv(envTimes) != "" {
		t.Run("times", func(t *testing.T) { times(t, factory(t)) })
	}
}

// newName returns a name that nobody had before, as long as names get.
func newName() string {
	name := "ct-" + strings.ToLower(rand.Text()+rand.Text())
	return name[:40]
}

func (h Harness) grant() creds.Grant {
	lasts := h.Lasts
	if lasts == 0 {
		lasts = 10 * time.Minute
	}
	return creds.Grant{
		Subject: creds.Subject{
			Provider: "local", Repository: "o/it's \"röd\"; drop", Ref: "refs/heads/main", SHA: strings.Repeat("a", 40),
			Workflow: "ci", Event: "push", Job: "build", Step: "s", Origin: creds.Origin{JobID: "mf-1", RunID: "17", Actor: "o'neill"},
		},
		Scope: h.Scope, Expires: time.Now().Add(lasts),
	}
}

// issue mints a lease that works and hands it to do. The lease is revoked
// afterwards, whatever do did.
func (h Harness) issue(ctx context.Context, do func(name string, l creds.Lease) error) (err error) {
	name := newName()
	var l creds.Lease
	defer func() {
		err = errors.Join(err, wrap("revoke at the end", h.end(context.WithoutCancel(ctx), name, l)))
	}()
	if l, err = h.Issuer.Issue(ctx, name, h.grant()); err != nil {
		return fmt.Errorf("Issue: %w", err)
	}
	if err := h.Use(ctx, l); err != nil {
		return fmt.Errorf("a new lease is not usable: %w", err)
	}
	return do(name, l)
}

// end revokes a lease, or wants to hear that it cannot be.
func (h Harness) end(ctx context.Context, name string, l creds.Lease) error {
	err := h.Issuer.Revoke(ctx, name, l.Handle)
	if !h.Endures || err != nil && !errors.Is(err, creds.ErrNotRevocable) {
		return err
	}
	if err == nil {
		return errors.New("Revoke: got nil of what nothing ends, want ErrNotRevocable")
	}
	return nil
}

// while runs do between begin and end.
func while(ctx context.Context, begin, end func(context.Context) error, do func() error) (err error) {
	if err := begin(ctx); err != nil {
		return fmt.Errorf("harness: %w", err)
	}
	defer func() { err = errors.Join(err, wrap("harness", end(context.WithoutCancel(ctx)))) }()
	return do()
}

func wrap(what string, err error) error {
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// refused says whether the provider refuses the lease.
func (h Harness) refused(ctx context.Context, l creds.Lease) error {
	return h.settled(func() error {
		if h.Use(ctx, l) == nil {
			return fmt.Errorf("use: %w", creds.ErrStillValid)
		}
		return nil
	})
}

// proof probes as the agent does: again while the lease is still valid.
func (h Harness) proof(ctx context.Context, name string, handle []byte) (p creds.Proof, err error) {
	err = h.settled(func() error {
		p, err = h.Issuer.Probe(ctx, name, handle)
		return err
	})
	return p, err
}

// settled tries again for as long as the provider lags behind.
func (h Harness) settled(try func() error) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(h.Lag); ; <-tick.C {
		if err := try(); !errors.Is(err, creds.ErrStillValid) || time.Now().After(end) {
			return err
		}
	}
}

// probed tells a proof from the lack of one.
func probed(p creds.Proof, err error) error {
	switch {
	case err != nil:
		return fmt.Errorf("Probe: got %w, want a proof", err)
	case p.At.IsZero() || p.How == "" || p.Refusal == "":
		return fmt.Errorf("Probe: got %+v, want time, way and refusal", p)
	}
	return nil
}

// unknown is what Probe has to say when nobody can say.
func unknown(p creds.Proof, err error) error {
	if err == nil || errors.Is(err, creds.ErrStillValid) || p != (creds.Proof{}) {
		return fmt.Errorf("Probe: got proof %+v and error %w, want no proof and another error than ErrStillValid", p, err)
	}
	return nil
}
