package githubapp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/mayfly-ci/mayfly/creds"
)

func openHandle(sealed []byte) (handle, error) {
	var h handle
	if err := json.Unmarshal(sealed, &h); err != nil || h.Token == "" {
		return handle{}, errors.New("handle: not one of this issuer") // its text is a secret
	}
	return h, nil
}

// Revoke implements creds.Issuer.
func (i *Issuer) Revoke(ctx context.Context, name string, sealed []byte) error {
	err := checkName(name)
	switch {
	case err != nil:
	case sealed == nil:
		err = fmt.Errorf("%w: its handle is lost; the token ends within an hour, and nobody has it", creds.ErrNotRevocable)
	default:
		var h handle
		if h, err = openHandle(sealed); err == nil {
			err = i.end(ctx, h.Token)
		}
	}
	if err != nil {
		return fmt.Errorf("revoke lease %s: %w", name, err)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.names, name)
	return nil
}

// end revokes a token with itself. One that GitHub does not know is gone.
func (i *Issuer) end(ctx context.Context, token string) error {
	err := i.do(ctx, token, http.MethodDelete, "installation/token", nil, nil)
	i.config.Trace("githubapp.revoke")
	if dead(err) {
		return nil
	}
	return err
}

// Probe implements creds.Issuer: it lists the token's repositories with it.
func (i *Issuer) Probe(ctx context.Context, name string, sealed []byte) (creds.Proof, error) {
	if err := checkName(name); err != nil {
		return creds.Proof{}, err
	}
	refusal, err := "", errors.New("its handle is lost, and nobody can try it")
	if sealed != nil {
		var h handle
		if h, err = openHandle(sealed); err == nil {
			refusal, err = i.try(ctx, h.Token)
		}
	}
	if err != nil {
		return creds.Proof{}, fmt.Errorf("probe lease %s: %w", name, err)
	}
	return creds.Proof{At: i.config.Now(), How: "GET installation/repositories with the token at " + i.config.address(), Refusal: refusal}, nil
}

// try uses a token and returns the words of the refusal.
func (i *Issuer) try(ctx context.Context, token string) (string, error) {
	err := i.do(ctx, token, http.MethodGet, "installation/repositories?per_page=1", nil, nil)
	var r *refusal
	switch {
	case err == nil:
		return "", creds.ErrStillValid
	case dead(err) && errors.As(err, &r):
		return r.Error(), nil
	}
	return "", err
}
