package credstest

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// methods are one call of each method. Issue tries for the name other.
func (h Harness) methods(name, other string, l creds.Lease) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"Issue":  func(ctx context.Context) error { _, err := h.Issuer.Issue(ctx, other, h.grant()); return err },
		"Revoke": func(ctx context.Context) error { return h.Issuer.Revoke(ctx, name, l.Handle) },
		"Probe":  func(ctx context.Context) error { _, err := h.Issuer.Probe(ctx, name, l.Handle); return err },
		"List":   func(ctx context.Context) error { _, err := h.Issuer.List(ctx); return err },
	}
}

// checkCancelled calls everything with a context that is over.
func checkCancelled(ctx context.Context, h Harness) error {
	return h.issue(ctx, func(name string, l creds.Lease) error {
		over, cancel := context.WithCancelCause(ctx)
		cancel(errors.New("test is over"))
		other := newName()
		for method, call := range h.methods(name, other, l) {
			if err := h.inTime(method, func() error { return call(over) }); err != nil {
				return err
			}
		}
		if err := h.leftover(ctx, other); err != nil {
			return err
		}
		return wrap("lease after calls that were cancelled", h.Use(ctx, l))
	})
}

// leftover revokes what an Issue that was cut short may have made.
func (h Harness) leftover(ctx context.Context, name string) error {
	err := h.revokeFailed(ctx, name, creds.Lease{})
	found, listErr := h.find(ctx, name)
	if errors.Is(listErr, errors.ErrUnsupported) {
		return err
	}
	if len(found) > 0 {
		err = errors.Join(err, fmt.Errorf("List after Issue was cut short and revoked: got %+v, want nothing", found))
	}
	return errors.Join(err, listErr)
}

// inTime wants an error, soon. A method that does not come back is left alone:
// nobody can end it.
func (h Harness) inTime(method string, call func() error) error {
	done := make(chan error, 1)
	start := time.Now()
	go func() { done <- call() }()
	select {
	case err := <-done:
		if err == nil {
			return fmt.Errorf("%s: got nil, want an error since its context ended", method)
		}
		return nil
	case <-time.After(h.patience()):
		return fmt.Errorf("%s: still running after %v, want it back when its context ends", method, time.Since(start))
	}
}

// checkFrozen lets contexts end while a backend does not answer.
func checkFrozen(ctx context.Context, h Harness) error {
	return h.issue(ctx, func(name string, l creds.Lease) error {
		other := newName()
		err := while(ctx, h.Freeze, h.Thaw, func() error {
			short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
			defer cancel()
			calls := h.methods(name, other, l)
			broken := make(chan error, len(calls))
			for method, call := range calls {
				go func() { broken <- h.inTime(method, func() error { return call(short) }) }()
			}
			var errs []error
			for range calls {
				errs = append(errs, <-broken)
			}
			return errors.Join(errs...)
		})
		if err != nil {
			return err
		}
		if err := h.leftover(ctx, other); err != nil {
			return err
		}
		if err := h.Issuer.Revoke(ctx, name, l.Handle); err != nil {
			return fmt.Errorf("Revoke afterwards: %w", err)
		}
		return h.refused(ctx, l)
	})
}

// checkSecrets provokes errors and looks for the secret in everything that may
// be written down. Lease.Handle may not: the journal seals it.
func checkSecrets(ctx context.Context, h Harness) error {
	return h.issue(ctx, func(name string, l creds.Lease) error {
		var seen printed
		open := l
		open.Handle = nil
		seen.add(open, &open)
		_, err := h.Issuer.Issue(ctx, name, h.grant())
		seen.add(err)
		g := h.grant()
		for _, scope := range h.BadScopes {
			g.Scope = scope
			_, err := h.Issuer.Issue(ctx, newName(), g)
			seen.add(err)
		}
		probe := func() {
			for _, handle := range [][]byte{l.Handle, nil, []byte(string(l.Handle) + "x")} {
				p, err := h.Issuer.Probe(ctx, name, handle)
				seen.add(p, err)
			}
		}
		list := func() {
			infos, err := h.Issuer.List(ctx)
			seen.add(infos, err)
		}
		probe()
		list()
		down := func() error {
			probe()
			list()
			seen.add(h.Issuer.Revoke(ctx, name, l.Handle))
			return nil
		}
		if h.Inside {
			err = down()
		} else {
			err = while(ctx, h.Down, h.Up, down)
		}
		if err != nil {
			return err
		}
		seen.add(h.Issuer.Revoke(ctx, name, l.Handle))
		probe()
		return seen.leak(l)
	})
}

// printed is everything in the forms in which it could be written down.
type printed []string

func (p *printed) add(values ...any) {
	for _, v := range values {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%d", "%x"} {
			*p = append(*p, fmt.Sprintf(verb, v))
		}
		if j, err := json.Marshal(v); err == nil {
			*p = append(*p, string(j))
		}
		if err, ok := v.(error); ok && err != nil {
			p.add(err.Error(), errors.Unwrap(err))
		}
	}
}

func (p *printed) leak(l creds.Lease) error {
	secrets := map[string]string{"handle": string(l.Handle)}
	for key, v := range l.Values {
		secrets["value "+key] = v.Reveal()
	}
	for what, secret := range secrets {
		if len(secret) < 8 {
			continue
		}
		inJSON, err := json.Marshal(secret)
		if err != nil {
			return err
		}
		for form, text := range map[string]string{
			"plain": secret, "base64": base64.StdEncoding.EncodeToString([]byte(secret)),
			"hex": hex.EncodeToString([]byte(secret)), "URL": url.QueryEscape(secret), "JSON": strings.Trim(string(inJSON), `"`),
		} {
			for _, out := range *p {
				if strings.Contains(out, text) {
					return fmt.Errorf("%s is printed in its %s form: %s", what, form, strings.ReplaceAll(out, text, creds.Placeholder))
				}
			}
		}
	}
	return nil
}

// checkConcurrent runs whole lives of leases beside each other.
func checkConcurrent(ctx context.Context, h Harness) error {
	const lives = 8
	errs := make([]error, lives)
	var wg sync.WaitGroup
	for n := range lives {
		wg.Go(func() {
			errs[n] = h.issue(ctx, func(name string, l creds.Lease) error {
				if err := h.Issuer.Revoke(ctx, name, l.Handle); err != nil {
					return fmt.Errorf("Revoke: %w", err)
				}
				if err := h.refused(ctx, l); err != nil {
					return err
				}
				return probed(h.proof(ctx, name, l.Handle))
			})
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
