package credstest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

func clauses() []clause {
	return []clause{
		{"an issued lease is usable", checkUsable},
		{"a lease ends no later than its grant", checkExpiry},
		{"an expired grant gives nothing usable", checkExpiredGrant},
		{"issuing a name twice fails", checkTwice},
		{"names of full length are different", checkLongNames},
		{"a revoked lease is refused", checkRevoked},
		{"revoking twice is success", checkRevokeTwice},
		{"revoking what never was is success", checkRevokeAbsent},
		{"revoking without a handle works or is ErrNotRevocable", checkRevokeByName},
		{"revoking ends uses in flight", checkHeld},
		{"probing a live lease is ErrStillValid", checkProbeLive},
		{"probing a dead lease is a proof", checkProbeDead},
		{"probing without a handle proves no more than it can", checkProbeByName},
		{"probing while the backend is down is neither", checkProbeDown},
		{"revoking while the backend is down fails", checkRevokeDown},
		{"a lease is listed while it lives", checkList},
		{"a scope that is not understood gives nothing", checkBadScope},
		{"a context that has ended is honoured", checkCancelled},
		{"a context that ends while nobody answers is honoured", checkFrozen},
		{"no secret is printed", checkSecrets},
		{"names do not disturb each other", checkConcurrent},
	}
}

// ends are the clauses that are about the end of a lease at its provider.
func ends() []string {
	return []string{
		"a revoked lease is refused", "revoking twice is success", "revoking without a handle works or is ErrNotRevocable",
		"revoking ends uses in flight", "probing a dead lease is a proof", "probing without a handle proves no more than it can",
		"probing while the backend is down is neither", "revoking while the backend is down fails",
		"a context that ends while nobody answers is honoured", "names do not disturb each other",
	}
}

// outages are the clauses that are about a provider which does not answer.
func outages() []string {
	return []string{
		"probing while the backend is down is neither", "revoking while the backend is down fails",
		"a context that ends while nobody answers is honoured",
	}
}

func checkUsable(ctx context.Context, h Harness) error {
	return h.issue(ctx, func(_ string, l creds.Lease) error {
		if len(l.Values) == 0 {
			return errors.New("lease has no values")
		}
		for key, v := range l.Values {
			if v.IsZero() {
				return fmt.Errorf("value %q is empty", key)
			}
		}
		return nil
	})
}

func checkExpiry(ctx context.Context, h Harness) error {
	name, g := newName(), h.grant()
	l, err := h.Issuer.Issue(ctx, name, g)
	if err == nil && (l.ExpiresAt.IsZero() || l.ExpiresAt.After(g.Expires)) {
		err = fmt.Errorf("lease expires at %v, want a time not after %v", l.ExpiresAt, g.Expires)
	}
	return errors.Join(err, h.end(ctx, name, l))
}

func checkExpiredGrant(ctx context.Context, h Harness) error {
	name, g := newName(), h.grant()
	g.Expires = time.Now().Add(-time.Minute)
	l, err := h.Issuer.Issue(ctx, name, g)
	if err == nil {
		err = h.refused(ctx, l)
	} else {
		err = nil
	}
	return errors.Join(err, h.revokeFailed(ctx, name, l))
}

// revokeFailed is what the agent does after an Issue that failed.
func (h Harness) revokeFailed(ctx context.Context, name string, l creds.Lease) error {
	err := h.Issuer.Revoke(ctx, name, l.Handle)
	if l.Handle == nil && errors.Is(err, creds.ErrNotRevocable) {
		return nil
	}
	return wrap("Revoke after a failed Issue", err)
}

func checkTwice(ctx context.Context, h Harness) error {
	return h.issue(ctx, func(name string, l creds.Lease) error {
		if _, err := h.Issuer.Issue(ctx, name, h.grant()); err == nil {
			return errors.New("second Issue: got nil, want an error")
		}
		return wrap("lease after the second Issue", h.Use(ctx, l))
	})
}

func checkLongNames(ctx context.Context, h Harness) error {
	first := newName()
	second := first[:len(first)-1] + "-"
	a, err := h.Issuer.Issue(ctx, first, h.grant())
	if err != nil {
		return fmt.Errorf("Issue: %w", err)
	}
	b, err := h.Issuer.Issue(ctx, second, h.grant())
	err = errors.Join(wrap("Issue of a name that differs in the last byte", err), h.end(ctx, first, a))
	if err == nil {
		err = wrap("lease after another one was revoked", h.Use(ctx, b))
	}
	return errors.Join(err, h.end(ctx, second, b))
}

func checkRevoked(ctx context.Context, h Harness) error {
	return h.issue(ctx, func(name string, l creds.Lease) error {
		if err := h.Issuer.Revoke(ctx, name, l.Handle); err != nil {
			return fmt.Errorf("Revoke: %w", err)
		}
		return h.refused(ctx, l)
	})
}

func checkRevokeTwice(ctx context.Context, h Harness) error {
	return h.issue(ctx, func(name string, l creds.Lease) error {
		for n := range 3 {
			if err := h.Issuer.Revoke(ctx, name, l.Handle); err != nil {
				return fmt.Errorf("Revoke number %d: %w", n+1, err)
			}
		}
		return nil
	})
}

func checkRevokeAbsent(ctx context.Context, h Harness) error {
	return h.revokeFailed(ctx, newName(), creds.Lease{})
}

func checkRevokeByName(ctx context.Context, h Harness) error {
	return h.issue(ctx, func(name string, l creds.Lease) error {
		err := h.Issuer.Revoke(ctx, name, nil)
		switch {
		case err == nil:
			return h.refused(ctx, l)
		case !errors.Is(err, creds.ErrNotRevocable):
			return fmt.Errorf("Revoke without a handle: got %w, want nil or ErrNotRevocable", err)
		case l.ByName:
			return errors.New("lease says ByName, and Revoke ErrNotRevocable")
		}
		return nil
	})
}

func checkHeld(ctx context.Context, h Harness) error {
	if h.Hold == nil {
		return nil
	}
	return h.issue(ctx, func(name string, l creds.Lease) error {
		ended, err := h.Hold(ctx, l)
		if err != nil {
			return fmt.Errorf("hold: %w", err)
		}
		select {
		case err := <-ended:
			return fmt.Errorf("harness: use ended before it was revoked: %w", err)
		default:
		}
		if err := h.Issuer.Revoke(ctx, name, l.Handle); err != nil {
			return fmt.Errorf("Revoke: %w", err)
		}
		select {
		case err := <-ended:
			if err == nil {
				return errors.New("use in flight ended well, want it cut")
			}
			return nil
		case <-time.After(h.patience()):
			return errors.New("use in flight goes on after Revoke")
		}
	})
}

func checkProbeLive(ctx context.Context, h Harness) error {
	return h.issue(ctx, func(name string, l creds.Lease) error {
		p, err := h.Issuer.Probe(ctx, name, l.Handle)
		if h.Endures {
			return wrap("of what nothing ends", unknown(p, err))
		}
		if !errors.Is(err, creds.ErrStillValid) || p != (creds.Proof{}) {
			return fmt.Errorf("Probe: got proof %+v and error %w, want ErrStillValid", p, err)
		}
		return nil
	})
}

func checkProbeDead(ctx context.Context, h Harness) error {
	return h.issue(ctx, func(name string, l creds.Lease) error {
		if err := h.Issuer.Revoke(ctx, name, l.Handle); err != nil {
			return fmt.Errorf("Revoke: %w", err)
		}
		return probed(h.proof(ctx, name, l.Handle))
	})
}

func checkProbeByName(ctx context.Context, h Harness) error {
	return h.issue(ctx, func(name string, l creds.Lease) error {
		if p, err := h.Issuer.Probe(ctx, name, nil); err == nil {
			return fmt.Errorf("Probe of a live lease without a handle: got proof %+v", p)
		}
		if err := h.Issuer.Revoke(ctx, name, l.Handle); err != nil {
			return fmt.Errorf("Revoke: %w", err)
		}
		with, err := h.proof(ctx, name, l.Handle)
		if err != nil || l.Handle == nil {
			return err
		}
		without, err := h.Issuer.Probe(ctx, name, nil)
		switch {
		case errors.Is(err, creds.ErrStillValid):
			return fmt.Errorf("Probe of a dead lease without a handle: %w", err)
		case err != nil:
			return nil // it cannot tell
		case without.How == with.How:
			return fmt.Errorf("Probe with and without a handle both say %q, want the difference told", with.How)
		}
		return probed(without, err)
	})
}

func checkProbeDown(ctx context.Context, h Harness) error {
	return h.issue(ctx, func(name string, l creds.Lease) error {
		down := func() error {
			return errors.Join(
				unknown(h.Issuer.Probe(ctx, name, l.Handle)),
				wrap("without a handle", unknown(h.Issuer.Probe(ctx, name, nil))))
		}
		if err := while(ctx, h.Down, h.Up, down); err != nil {
			return fmt.Errorf("live lease: %w", err)
		}
		if err := h.Issuer.Revoke(ctx, name, l.Handle); err != nil {
			return fmt.Errorf("Revoke: %w", err)
		}
		return wrap("dead lease", while(ctx, h.Down, h.Up, down))
	})
}

func checkRevokeDown(ctx context.Context, h Harness) error {
	return h.issue(ctx, func(name string, l creds.Lease) error {
		err := while(ctx, h.Down, h.Up, func() error {
			if h.Issuer.Revoke(ctx, name, l.Handle) == nil {
				return errors.New("Revoke: got nil, want an error")
			}
			return nil
		})
		if err != nil {
			return err
		}
		if err := h.Use(ctx, l); err != nil {
			return fmt.Errorf("harness: lease that could not be revoked is refused: %w", err)
		}
		if err := h.Issuer.Revoke(ctx, name, l.Handle); err != nil {
			return fmt.Errorf("Revoke when it is up again: %w", err)
		}
		return h.refused(ctx, l)
	})
}

func checkList(ctx context.Context, h Harness) error {
	return h.issue(ctx, func(name string, l creds.Lease) error {
		live, err := h.find(ctx, name)
		if errors.Is(err, errors.ErrUnsupported) {
			return nil
		}
		if err != nil {
			return err
		}
		if len(live) != 1 || live[0].Owner != h.Owner || !live[0].ExpiresAt.IsZero() && !live[0].ExpiresAt.Equal(l.ExpiresAt) {
			return fmt.Errorf("List: got %+v, want %s once, of owner %s, until %v or until nobody knows when", live, name, h.Owner, l.ExpiresAt)
		}
		if err := h.Issuer.Revoke(ctx, name, l.Handle); err != nil {
			return fmt.Errorf("Revoke: %w", err)
		}
		if dead, err := h.find(ctx, name); err != nil || len(dead) > 0 {
			return fmt.Errorf("List after Revoke: got %+v and error %w, want nothing", dead, err)
		}
		return nil
	})
}

// find lists the leases of one name.
func (h Harness) find(ctx context.Context, name string) ([]creds.Info, error) {
	all, err := h.Issuer.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("List: %w", err)
	}
	var found []creds.Info
	for _, info := range all {
		if info.Name == name {
			found = append(found, info)
		}
	}
	return found, nil
}

func checkBadScope(ctx context.Context, h Harness) error {
	checker, _ := h.Issuer.(creds.ScopeChecker)
	if checker != nil {
		if err := checker.CheckScope(h.Scope); err != nil {
			return fmt.Errorf("CheckScope of a good scope: %w", err)
		}
	}
	bad := append([]json.RawMessage{json.RawMessage(`{"no-issuer-knows-this": true}`), json.RawMessage(`{`)}, h.BadScopes...)
	for _, scope := range bad {
		name, g := newName(), h.grant()
		g.Scope = scope
		l, err := h.Issuer.Issue(ctx, name, g)
		if !errors.Is(err, creds.ErrBadScope) {
			return errors.Join(fmt.Errorf("Issue with scope %s: got %w, want ErrBadScope", scope, err), h.revokeFailed(ctx, name, l))
		}
		if found, err := h.find(ctx, name); len(found) > 0 || err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return fmt.Errorf("List after a refused scope: got %+v and error %w, want nothing", found, err)
		}
		if err := h.revokeFailed(ctx, name, l); err != nil {
			return err
		}
	}
	if checker != nil {
		if err := checker.CheckScope(bad[0]); !errors.Is(err, creds.ErrBadScope) {
			return fmt.Errorf("CheckScope of %s: got %w, want ErrBadScope", bad[0], err)
		}
	}
	return nil
}
