package vault

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"strconv"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// Keys of the metadata of a token, which the server's own audit shows too.
const (
	metaOwner   = "mayfly_installation"
	metaName    = "mayfly_lease"
	metaExpires = "mayfly_expires"
)

// Values that are not fields of a secret.
const (
	valueToken    = "vault_token"
	valueWrapping = "wrapping_token"
)

// A handle is what Revoke and Probe need: the login, and what hangs on it.
type handle struct {
	Login    string   `json:"login"`
	Token    string   `json:"token"`
	Accessor string   `json:"accessor"` // of Token
	Leases   []string `json:"leases,omitempty"`
	Wrapping string   `json:"wrapping,omitempty"`
	Unleased string   `json:"unleased,omitempty"` // path whose secret lives on
}

// Issue implements creds.Issuer. If it fails half way the lease has the handle of
// what there is, and nothing else.
func (i *Issuer) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	if err := checkName(name); err != nil {
		return creds.Lease{}, err
	}
	scope, err := i.parseScope(g.Scope)
	if err != nil {
		return creds.Lease{}, err
	}
	// One second for the way there and the server's rounding.
	expires := g.Expires.UTC().Truncate(time.Second)
	if expires.Sub(i.config.Now()) < 2*time.Second {
		return creds.Lease{}, fmt.Errorf("lease %s: grant ends at %s, which is too soon", name, expires.Format(time.RFC3339))
	}
	if err := i.take(name); err != nil {
		return creds.Lease{}, err
	}
	m := &minting{Issuer: i, name: name, grant: g, scope: scope, expires: expires}
	for _, step := range []func(context.Context) error{m.login, m.child, m.read} {
		if err = step(ctx); err != nil {
			break
		}
	}
	lease := creds.Lease{}
	if errors.Is(err, creds.ErrBadScope) && m.handle.Login != "" {
		// That word promises that nothing was issued.
		if undo := i.end(ctx, m.handle); undo != nil {
			err = fmt.Errorf("%v, and cannot be taken back yet: %w", err, undo)
		}
	}
	if m.handle.Login != "" {
		h, bad := json.Marshal(m.handle)
		lease.Handle, err = h, errors.Join(err, bad)
	}
	if err != nil {
		return lease, fmt.Errorf("lease %s: %w", name, err)
	}
	lease.Values, lease.Facts, lease.ExpiresAt = m.values, m.facts(), m.expires
	return lease, nil
}

// take keeps a name from being issued twice by one life of the agent; the agent
// gives no name again in another.
func (i *Issuer) take(name string) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.names[name] {
		return fmt.Errorf("lease %s: issued already", name)
	}
	i.names[name] = true
	return nil
}

// A minting is one Issue on its way.
type minting struct {
	*Issuer
	name    string
	grant   creds.Grant
	scope   Scope
	expires time.Time
	jti     string
	handle  handle
	values  map[string]creds.Secret
}

// login gets the token that the server gives to the job's identity.
func (m *minting) login(ctx context.Context) error {
	asked := m.config.Now()
	identity, err := m.config.Sign(ctx, m.grant.Subject, m.name)
	if err != nil {
		return fmt.Errorf("identity: %w", err)
	}
	login, duration, err := m.enter(ctx, m.scope.Role, identity)
	if err != nil {
		return err
	}
	m.handle.Login, m.jti = login, identity.ID
	m.config.Trace("vault.login")
	if end := asked.Add(duration).UTC().Truncate(time.Second); duration > 0 && end.Before(m.expires) {
		m.expires = end // all ends with the login
	}
	if m.expires.Sub(m.config.Now()) < 2*time.Second {
		return fmt.Errorf("login of role %s lives %v, which is too short: raise its token_ttl", m.scope.Role, duration)
	}
	return nil
}

// enter logs in with an identity, at a role of the jwt method.
func (i *Issuer) enter(ctx context.Context, role string, identity Identity) (string, time.Duration, error) {
	a, err := i.do(ctx, call{
		method: http.MethodPost, path: "auth/" + i.config.mount() + "/login",
		body: map[string]string{"role": role, "jwt": identity.Token.Reveal()},
	})
	switch {
	case refused(err, http.StatusBadRequest), refused(err, http.StatusForbidden):
		return "", 0, fmt.Errorf("login at role %s refused: see its bound_claims, bound_audiences and the keys of auth/%s: %w", role, i.config.mount(), err)
	case err != nil:
		return "", 0, fmt.Errorf("login at role %s: %w", role, err)
	case a.Auth == nil || a.Auth.Token == "":
		return "", 0, fmt.Errorf("login at role %s: no token in the answer", role)
	}
	return a.Auth.Token, time.Duration(a.Auth.Duration) * time.Second, nil
}

// child makes the token that ends with the grant, and sees that the server
// knows it: only then is a later refusal a proof.
func (m *minting) child(ctx context.Context) error {
	left := int64(m.expires.Sub(m.config.Now())/time.Second) - 1
	ttl := strconv.FormatInt(left, 10) + "s"
	s := m.grant.Subject
	body := map[string]any{
		"ttl": ttl, "explicit_max_ttl": ttl, "renewable": false, "display_name": m.name,
		"meta": map[string]string{
			metaOwner: m.config.Owner, metaName: m.name, metaExpires: m.expires.Format(time.RFC3339),
			"provider": s.Provider, "repository": s.Repository, "ref": s.Ref, "sha": s.SHA, "job": s.Job, "step": s.Step, "jti": m.jti,
		},
	}
	if m.scope.Policies != nil {
		body["policies"] = m.scope.Policies
	}
	a, err := m.do(ctx, call{method: http.MethodPost, path: "auth/token/create", token: m.handle.Login, body: body})
	switch {
	case refused(err, http.StatusForbidden):
		return fmt.Errorf("a token that ends with the grant: a policy of role %s must let it update auth/token/create: %w", m.scope.Role, err)
	case refused(err, http.StatusBadRequest) && m.scope.Policies != nil:
		return fmt.Errorf("%w: role %s: %w", creds.ErrBadScope, m.scope.Role, err)
	case err != nil:
		return fmt.Errorf("token: %w", err)
	case a.Auth == nil || a.Auth.Token == "" || a.Auth.Accessor == "":
		return errors.New("token: none in the answer")
	}
	m.handle.Token, m.handle.Accessor = a.Auth.Token, a.Auth.Accessor
	m.config.Trace("vault.token")
	if a.Auth.Duration > left+1 || a.Auth.Duration == 0 || a.Auth.Orphan {
		return fmt.Errorf("token: given for %d s (orphan %v), asked for %s under the login: the server gives more than it may", a.Auth.Duration, a.Auth.Orphan, ttl)
	}
	if _, err := m.lookup(ctx, m.handle.Token); err != nil {
		return fmt.Errorf("a token must be able to look itself up, or nobody can tell when it is dead: leave it the policy \"default\": %w", err)
	}
	return nil
}

func (i *Issuer) lookup(ctx context.Context, token string) (answer, error) {
	return i.do(ctx, call{method: http.MethodGet, path: "auth/token/lookup-self", token: token})
}

// read asks the secrets engine.
func (m *minting) read(ctx context.Context) error {
	m.values = map[string]creds.Secret{}
	if m.scope.Token {
		m.values[valueToken] = creds.NewSecret(m.handle.Token)
	}
	if m.scope.Path == "" {
		return nil
	}
	c := call{method: http.MethodGet, path: m.scope.Path, token: m.handle.Token}
	if m.scope.Data != nil {
		c.method, c.body = http.MethodPost, m.scope.Data
	}
	a, err := m.do(ctx, c)
	switch {
	case refused(err, http.StatusForbidden), refused(err, http.StatusNotFound), refused(err, http.StatusBadRequest):
		return fmt.Errorf("%w: %s: %w", creds.ErrBadScope, m.scope.Path, err)
	case err != nil:
		return err
	}
	if a.LeaseID != "" {
		m.handle.Leases = append(m.handle.Leases, a.LeaseID)
	}
	m.config.Trace("vault.secret")
	if err := m.revocable(a); err != nil {
		return err
	}
	secret := inner(a.Data)
	for field, raw := range secret {
		text := string(raw)
		var plain string
		if json.Unmarshal(raw, &plain) == nil {
			text = plain
		}
		if text == "" || text == "null" {
			continue // no field: a step that wants it is refused
		}
		if _, taken := m.values[field]; taken {
			return fmt.Errorf("%s has a field %q, as the lease has", m.scope.Path, field)
		}
		m.values[field] = creds.NewSecret(text)
	}
	if len(secret) == 0 {
		return fmt.Errorf("%s: no fields in the answer", m.scope.Path)
	}
	if m.scope.Wrap > 0 {
		return m.wrap(ctx, secret)
	}
	return nil
}

// revocable refuses what could not be seen dead.
func (m *minting) revocable(a answer) error {
	switch {
	case a.LeaseID == "" && !m.scope.Unleased:
		return fmt.Errorf("%w: %s has no lease at the server, so that nothing takes it back: read it with \"unleased: true\" if that is meant", creds.ErrBadScope, m.scope.Path)
	case a.LeaseID == "":
		m.handle.Unleased = m.scope.Path
		return nil
	case m.config.AgentRole == "":
		return fmt.Errorf("%s has a lease, and nobody can see it dead: set agent_role, to a role that may update sys/leases/revoke and sys/leases/lookup", m.scope.Path)
	}
	return nil
}

// inner is the secret in an answer: the key-value engine's second version has
// its own data around it.
func inner(data map[string]json.RawMessage) map[string]json.RawMessage {
	var secret map[string]json.RawMessage
	if len(data) == 2 && data["metadata"] != nil && json.Unmarshal(data["data"], &secret) == nil {
		return secret
	}
	return data
}

// wrap has the server keep the secret for one reader.
func (m *minting) wrap(ctx context.Context, secret map[string]json.RawMessage) error {
	left := min(m.scope.Wrap, int(m.expires.Sub(m.config.Now())/time.Second)-1)
	a, err := m.do(ctx, call{
		method: http.MethodPost, path: "sys/wrapping/wrap", token: m.handle.Token,
		wrap: strconv.Itoa(max(left, 1)) + "s", body: secret,
	})
	if err != nil {
		return fmt.Errorf("wrapping: %w", err)
	}
	if a.Wrap == nil || a.Wrap.Token == "" {
		return errors.New("wrapping: no token in the answer")
	}
	m.handle.Wrapping = a.Wrap.Token
	m.values[valueWrapping] = creds.NewSecret(a.Wrap.Token)
	return nil
}

// facts are for the job and the record.
func (m *minting) facts() map[string]string {
	address := m.config.JobAddress
	if address == "" {
		address = m.config.Address
	}
	facts := map[string]string{
		"vault_addr": address, "namespace": m.config.Namespace, "path": m.scope.Path,
		"accessor": m.handle.Accessor, "jti": m.jti,
	}
	maps.DeleteFunc(facts, func(_, value string) bool { return value == "" })
	return facts
}
