package vault

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/mayfly-ci/mayfly/creds"
)

// Probe implements creds.Issuer. It uses the login and the token and wants both
// refused, and wants the server to know no more of what the engine made. It
// does not use the engine's credential at its own server.
func (i *Issuer) Probe(ctx context.Context, name string, sealed []byte) (creds.Proof, error) {
	if err := checkName(name); err != nil {
		return creds.Proof{}, err
	}
	var how, said []string
	var err error
	if sealed == nil {
		how, said, err = i.absent(ctx, name)
	} else {
		var h handle
		if h, err = openHandle(sealed); err == nil {
			how, said, err = i.dead(ctx, h)
		}
	}
	if err != nil {
		return creds.Proof{}, fmt.Errorf("probe lease %s: %w", name, err)
	}
	return creds.Proof{At: i.config.Now(), How: strings.Join(how, "; ") + " at " + i.config.Address, Refusal: strings.Join(said, "; ")}, nil
}

// dead tries all that a handle names.
func (i *Issuer) dead(ctx context.Context, h handle) (how, said []string, _ error) {
	for _, t := range [][2]string{{"login", h.Login}, {"token " + h.Accessor, h.Token}} {
		what, token := t[0], t[1]
		if token == "" {
			continue // it was never made
		}
		_, err := i.lookup(ctx, token)
		if err == nil {
			return nil, nil, fmt.Errorf("%s: %w", what, creds.ErrStillValid)
		}
		// It could look itself up when it was made.
		if !refused(err, http.StatusForbidden) {
			return nil, nil, err
		}
		how, said = append(how, "lookup-self with the "+what), append(said, words(err))
	}
	if h.Wrapping != "" {
		_, err := i.do(ctx, call{method: http.MethodPost, path: "sys/wrapping/lookup", body: map[string]string{"token": h.Wrapping}})
		if err == nil {
			return nil, nil, fmt.Errorf("wrapping token: %w", creds.ErrStillValid)
		}
		if !refused(err, http.StatusBadRequest) && !refused(err, http.StatusForbidden) {
			return nil, nil, err
		}
		how, said = append(how, "lookup of the wrapping token"), append(said, words(err))
	}
	if h.Unleased != "" {
		how = append(how, "the secret at "+h.Unleased+" has no lease and is as good as before")
	}
	if len(h.Leases) == 0 {
		return how, said, nil
	}
	if i.config.AgentRole == "" {
		return nil, nil, errors.New("what the engine made cannot be looked up: set agent_role again")
	}
	err := i.asAgent(ctx, func(token string) error {
		for _, id := range h.Leases {
			words, err := i.goneLease(ctx, token, id)
			if err != nil {
				return err
			}
			how, said = append(how, "lookup of the lease "+id+" (its credential was not tried)"), append(said, words)
		}
		return nil
	})
	return how, said, err
}

// goneLease wants the server to say that it does not know the lease.
func (i *Issuer) goneLease(ctx context.Context, token, id string) (string, error) {
	_, err := i.do(ctx, call{
		method: http.MethodPost, path: "sys/leases/lookup", token: token, body: map[string]string{"lease_id": id},
	})
	switch {
	case err == nil:
		return "", fmt.Errorf("lease %s: %w", id, creds.ErrStillValid)
	case refused(err, http.StatusBadRequest) && strings.Contains(err.Error(), "invalid lease"):
		return words(err), nil
	}
	return "", err
}

// absent looks for the name among all tokens.
func (i *Issuer) absent(ctx context.Context, name string) (how, said []string, _ error) {
	if i.config.AgentRole == "" {
		return nil, nil, errors.New("its handle is lost, and there is no agent_role to look for it")
	}
	err := i.asAgent(ctx, func(token string) error {
		found, err := i.named(ctx, token, name)
		if err == nil && len(found) > 0 {
			err = fmt.Errorf("token %s: %w", found[0].accessor, creds.ErrStillValid)
		}
		return err
	})
	return []string{"no login tried, the token is not known; looked for it among all accessors, and not for what the engine made under it"},
		[]string{"no token of that name"}, err
}

// words are those of the server.
func words(err error) string {
	var r *refusal
	if errors.As(err, &r) {
		return r.Error()
	}
	return ""
}
