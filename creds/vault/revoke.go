package vault

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// lastTimeout bounds the end of the agent's own login when the context has ended;
// set 2026-11-24.
const lastTimeout = 2 * time.Second

func openHandle(sealed []byte) (handle, error) {
	var h handle
	if err := json.Unmarshal(sealed, &h); err != nil || h.Login == "" {
		return handle{}, errors.New("handle: not one of this issuer") // its text is a secret
	}
	return h, nil
}

// Revoke implements creds.Issuer. What the engine made ends first and while we
// wait, so that a database that refuses is heard; then the login, and with it
// the token and what a job made under it. One that fails does not keep the other.
func (i *Issuer) Revoke(ctx context.Context, name string, sealed []byte) (err error) {
	if err := checkName(name); err != nil {
		return err
	}
	if sealed == nil {
		err = i.revokeByName(ctx, name)
	} else {
		var h handle
		if h, err = openHandle(sealed); err == nil {
			err = i.end(ctx, h)
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

func (i *Issuer) end(ctx context.Context, h handle) error {
	var errs []error
	if len(h.Leases) > 0 && i.config.AgentRole != "" {
		errs = append(errs, i.asAgent(ctx, func(token string) error { return i.endLeases(ctx, token, h.Leases) }))
		i.config.Trace("vault.revoke.leases")
	}
	if h.Wrapping != "" {
		// Read, it is used up. 400 says that it is already.
		_, err := i.do(ctx, call{method: http.MethodPost, path: "sys/wrapping/unwrap", token: h.Wrapping})
		if err != nil && !refused(err, http.StatusBadRequest) && !refused(err, http.StatusForbidden) {
			errs = append(errs, err)
		}
	}
	errs = append(errs, i.endToken(ctx, h.Login))
	i.config.Trace("vault.revoke.login")
	return errors.Join(errs...)
}

// endLeases revokes each and waits for the engine. A lease that the server does
// not know is gone.
func (i *Issuer) endLeases(ctx context.Context, token string, leases []string) error {
	var errs []error
	for _, id := range leases {
		_, err := i.do(ctx, call{
			method: http.MethodPut, path: "sys/leases/revoke", token: token,
			body: map[string]any{"lease_id": id, "sync": true},
		})
		if refused(err, http.StatusForbidden) {
			err = fmt.Errorf("a policy of role %s must let it update sys/leases/revoke: %w", i.config.AgentRole, err)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s still lives: %w", id, err))
		}
	}
	return errors.Join(errs...)
}

// endToken revokes a token by itself. One that the server refuses is dead; one
// that may not revoke itself is not.
func (i *Issuer) endToken(ctx context.Context, token string) error {
	_, err := i.do(ctx, call{method: http.MethodPost, path: "auth/token/revoke-self", token: token})
	if !refused(err, http.StatusForbidden) {
		return err
	}
	if _, look := i.lookup(ctx, token); !refused(look, http.StatusForbidden) {
		return errors.Join(fmt.Errorf("a token must be able to revoke itself: leave its role the policy \"default\": %w", err), look)
	}
	return nil
}

// asAgent does something with a login of the agent's own, which ends with it.
func (i *Issuer) asAgent(ctx context.Context, do func(token string) error) error {
	identity, err := i.config.Sign(ctx, creds.Subject{}, "")
	if err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	token, _, err := i.enter(ctx, i.config.AgentRole, identity)
	if err != nil {
		return fmt.Errorf("as the agent: %w", err)
	}
	err = do(token)
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastTimeout)
	defer cancel()
	// It expires by itself if this fails, and nobody has it.
	_ = i.endToken(last, token)
	return err
}

// An owned token is one that List found.
type owned struct {
	accessor string
	info     creds.Info
}

// owned are all tokens of this installation. errors.ErrUnsupported says that the
// agent's role is not for that.
func (i *Issuer) owned(ctx context.Context, token string) ([]owned, error) {
	a, err := i.do(ctx, call{method: "LIST", path: "auth/token/accessors", token: token})
	if refused(err, http.StatusForbidden) {
		return nil, fmt.Errorf("%w: role %s may not list auth/token/accessors", errors.ErrUnsupported, i.config.AgentRole)
	}
	if refused(err, http.StatusNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var accessors []string
	if err := json.Unmarshal(a.Data["keys"], &accessors); err != nil {
		return nil, fmt.Errorf("accessors: %w", err)
	}
	var found []owned
	for _, accessor := range accessors {
		a, err := i.do(ctx, call{
			method: http.MethodPost, path: "auth/token/lookup-accessor", token: token,
			body: map[string]string{"accessor": accessor},
		})
		if unknownAccessor(err) {
			continue // it ended meanwhile
		}
		if refused(err, http.StatusForbidden) {
			return nil, fmt.Errorf("%w: role %s may not update auth/token/lookup-accessor: %w", errors.ErrUnsupported, i.config.AgentRole, err)
		}
		if err != nil {
			return nil, err
		}
		var meta map[string]string
		_ = json.Unmarshal(a.Data["meta"], &meta) // a token without any is nobody's
		if meta[metaOwner] != i.config.Owner || checkName(meta[metaName]) != nil {
			continue
		}
		expires, _ := time.Parse(time.RFC3339, meta[metaExpires])
		found = append(found, owned{accessor, creds.Info{Name: meta[metaName], Owner: meta[metaOwner], ExpiresAt: expires}})
	}
	return found, nil
}

func unknownAccessor(err error) bool {
	return refused(err, http.StatusNotFound) || err != nil && strings.Contains(err.Error(), "invalid accessor")
}

// List implements creds.Issuer. It looks at every token of the server, which is
// what the reaper and the doctor do now and then.
func (i *Issuer) List(ctx context.Context) ([]creds.Info, error) {
	if i.config.AgentRole == "" {
		return nil, fmt.Errorf("list leases: %w: no agent_role", errors.ErrUnsupported)
	}
	var infos []creds.Info
	err := i.asAgent(ctx, func(token string) error {
		found, err := i.owned(ctx, token)
		for _, o := range found {
			infos = append(infos, o.info)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list leases: %w", err)
	}
	return infos, nil
}

// revokeByName finds the token by its metadata. What the engine made goes with
// it, unseen, since its name was in the handle.
func (i *Issuer) revokeByName(ctx context.Context, name string) error {
	if i.config.AgentRole == "" {
		return fmt.Errorf("%w: its handle is lost, and there is no agent_role to find it", creds.ErrNotRevocable)
	}
	err := i.asAgent(ctx, func(token string) error {
		found, err := i.named(ctx, token, name)
		for _, o := range found {
			_, end := i.do(ctx, call{
				method: http.MethodPost, path: "auth/token/revoke-accessor", token: token,
				body: map[string]string{"accessor": o.accessor},
			})
			if end != nil && !unknownAccessor(end) {
				err = errors.Join(err, end)
			}
		}
		return err
	})
	if errors.Is(err, errors.ErrUnsupported) {
		return fmt.Errorf("%w: %w", creds.ErrNotRevocable, err)
	}
	return err
}

func (i *Issuer) named(ctx context.Context, token, name string) ([]owned, error) {
	found, err := i.owned(ctx, token)
	return slices.DeleteFunc(found, func(o owned) bool { return o.info.Name != name }), err
}
