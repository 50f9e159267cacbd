package gitea

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"github.com/mayfly-ci/mayfly/creds"
)

func openHandle(sealed []byte) (handle, error) {
	var h handle
	if err := json.Unmarshal(sealed, &h); err != nil || h.Token == "" || h.ID <= 0 {
		return handle{}, errors.New("handle: not one of this issuer") // its text is a secret
	}
	return h, nil
}

// Revoke implements creds.Issuer. The name is all it takes.
func (i *Issuer) Revoke(ctx context.Context, name string, sealed []byte) error {
	err := checkName(name)
	if err == nil && sealed != nil {
		_, err = openHandle(sealed)
	}
	if err == nil {
		err = i.remove(ctx, name)
	}
	if err != nil {
		return fmt.Errorf("revoke lease %s: %w", name, err)
	}
	return nil
}

// remove deletes a token. One that is not there is gone.
func (i *Issuer) remove(ctx context.Context, name string) error {
	status, err := i.asBot(ctx, http.MethodDelete, "/"+i.prefix()+name, nil, nil)
	if err == nil && status != http.StatusNoContent && status != http.StatusNotFound {
		err = fmt.Errorf("token: answer %d", status)
	}
	if err == nil {
		i.config.Trace("gitea.deleted")
	}
	return err
}

// Probe implements creds.Issuer.
func (i *Issuer) Probe(ctx context.Context, name string, sealed []byte) (creds.Proof, error) {
	how, refusal, err := i.probe(ctx, name, sealed)
	if err != nil {
		return creds.Proof{}, fmt.Errorf("probe lease %s: %w", name, err)
	}
	return creds.Proof{At: i.config.Now(), How: how + " at " + i.config.URL, Refusal: refusal}, nil
}

func (i *Issuer) probe(ctx context.Context, name string, sealed []byte) (how, refusal string, _ error) {
	if err := checkName(name); err != nil {
		return "", "", err
	}
	if sealed != nil {
		h, err := openHandle(sealed)
		if err != nil {
			return "", "", err
		}
		refusal, err := i.use(ctx, h.Token)
		return fmt.Sprintf("GET /api/v1/user with the token (id %d)", h.ID), refusal, err
	}
	names, err := i.leases(ctx)
	if err == nil && slices.Contains(names, name) {
		err = creds.ErrStillValid
	}
	return "no use tried, the token is not known; looked for its name among the tokens of " + i.config.User, "no token of that name", err
}

// List implements creds.Issuer.
func (i *Issuer) List(ctx context.Context) ([]creds.Info, error) {
	names, err := i.leases(ctx)
	if err != nil {
		return nil, fmt.Errorf("list leases: %w", err)
	}
	infos := make([]creds.Info, 0, len(names))
	for _, name := range names {
		infos = append(infos, creds.Info{Name: name, Owner: i.config.Owner})
	}
	return infos, nil
}
