package gitea

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/mayfly-ci/mayfly/creds"
)

// capabilities: we go on beating after a cancellation, and report when the steps
// that run always() are through. Older servers ignore it.
const cancelling = "cancelling"

// A registration is what the store keeps.
type registration struct {
	URL       string `json:"url"`
	UUID      string `json:"uuid"`
	Token     string `json:"token"`
	Ephemeral bool   `json:"ephemeral,omitempty"`
	From      string `json:"from"` // digest of the registration token
	// Idle says of an ephemeral one that it was put away unused. One of an agent
	// that was killed may have a task that nobody knows of, and gets no other.
	Idle bool `json:"idle,omitempty"`
}

func (r registration) identity() identity {
	return identity{UUID: r.UUID, token: creds.NewSecret(r.Token)}
}

// ready makes sure that the server knows this runner, with its labels of today.
func (p *Provider) ready(ctx context.Context) error {
	if p.current == nil {
		r, err := p.kept()
		if err != nil {
			return err
		}
		if r == nil {
			if r, err = p.register(ctx); err != nil {
				return err
			}
		}
		p.current, p.declared = r, false
	}
	if err := p.putAway(false); err != nil {
		return err
	}
	if p.declared {
		return nil
	}
	var out runnerResponse
	in := declareRequest{Version: p.client.agent, Labels: p.config.Labels, Capabilities: []string{cancelling}}
	if _, err := p.client.call(ctx, methodDeclare, p.current.identity(), in, &out); err != nil {
		return p.disowned(err)
	}
	p.declared = true
	return nil
}

// kept is the registration in the store, if it is one of this instance that the
// server has not refused.
func (p *Provider) kept() (*registration, error) {
	b, err := p.config.Store.Load()
	if err != nil || len(b) == 0 {
		return nil, err
	}
	var r registration
	if json.Unmarshal(b, &r) != nil || r.URL != p.config.URL || r.Ephemeral != p.config.Ephemeral {
		return nil, nil // of another instance or version: this one is new
	}
	if r.UUID != p.refused && (r.Idle || !r.Ephemeral) {
		return &r, nil
	}
	if r.Ephemeral {
		return nil, nil // it had its task
	}
	token, err := p.config.Token()
	if err != nil {
		return nil, err
	}
	if digest(token) == r.From {
		return nil, fmt.Errorf("%w %q (%s): somebody deleted it there; to register it again put a new registration token into token_file", errUnregistered, p.config.Runner, r.UUID)
	}
	return nil, nil
}

// register asks for an identity and keeps it. If the agent dies in between, a
// runner that never comes online stays in Gitea's list.
func (p *Provider) register(ctx context.Context) (*registration, error) {
	token, err := p.config.Token()
	if err != nil {
		return nil, fmt.Errorf("registration token: %w", err)
	}
	in := registerRequest{
		Name: p.config.Runner, Token: token.Reveal(), Version: p.client.agent,
		Labels: p.config.Labels, Ephemeral: p.config.Ephemeral, Capabilities: []string{cancelling},
	}
	var out runnerResponse
	if _, err := p.client.call(ctx, methodRegister, identity{}, in, &out); err != nil {
		return nil, err
	}
	if out.Runner.UUID == "" || out.Runner.Token == "" || len(out.Runner.UUID)+len(out.Runner.Token) > 1024 {
		return nil, &callError{method: "Register", err: errors.New("the answer has no identity")}
	}
	p.config.Trace("gitea.registered")
	r := &registration{URL: p.config.URL, UUID: out.Runner.UUID, Token: out.Runner.Token, Ephemeral: p.config.Ephemeral, From: digest(token)}
	if err := p.keep(r); err != nil {
		return nil, err
	}
	p.config.Trace("gitea.kept")
	return r, nil
}

func (p *Provider) keep(r *registration) error {
	b, err := json.Marshal(r)
	if err == nil {
		err = p.config.Store.Save(b)
	}
	if err != nil {
		return fmt.Errorf("registration: %w", err)
	}
	return nil
}

// putAway notes whether the ephemeral registration is in use: before the first
// ask that it is, and when the agent stops asking that it is not.
func (p *Provider) putAway(idle bool) error {
	if !p.config.Ephemeral || p.current == nil || p.current.Idle == idle {
		return nil
	}
	r := *p.current
	r.Idle = idle
	if err := p.keep(&r); err != nil {
		return err
	}
	p.current = &r
	return nil
}

// disowned forgets an identity that the server does not know; ready looks for
// another one.
func (p *Provider) disowned(err error) error {
	if errors.Is(err, errUnregistered) && p.current != nil {
		p.refused, p.current, p.declared, p.tasksVersion = p.current.UUID, nil, false, 0
	}
	return err
}

// Check says whether the instance answers and the registration stands. It takes
// no job and registers nothing.
func (p *Provider) Check(ctx context.Context) (string, error) {
	var pong pingResponse
	if _, err := p.client.call(ctx, methodPing, identity{}, pingRequest{Data: "mayfly"}, &pong); err != nil {
		return "", err
	}
	p.asking.Lock()
	defer p.asking.Unlock()
	r, err := p.kept()
	if err != nil {
		return "", err
	}
	if r == nil {
		_, err := p.config.Token()
		return p.config.URL + " answers; the agent will register when it starts", err
	}
	in := declareRequest{Version: p.client.agent, Labels: p.config.Labels, Capabilities: []string{cancelling}}
	var out runnerResponse
	if _, err := p.client.call(ctx, methodDeclare, r.identity(), in, &out); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s answers; registered as %q", p.config.URL, clip(out.Runner.Name)), nil
}
