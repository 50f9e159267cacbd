package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/configs"
	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/oidc"
	"github.com/mayfly-ci/mayfly/creds/postgres"
	"github.com/mayfly-ci/mayfly/creds/vault"
	"github.com/mayfly-ci/mayfly/runner/outbound"
)

const typeOIDC = "oidc"

// issuers makes those that mint leases, and before them the identity that they
// may log in with.
func (w *wiring) issuers() error {
	w.agent.Issuers = map[string]creds.Issuer{}
	for name, section := range w.config.Issuers {
		if section.Type != typeOIDC {
			continue
		}
		if w.identity != nil {
			return exitError{exitUsage, section.Errorf("type", "issuer %q: there is another one of type oidc; an agent has one identity", name)}
		}
		identity, err := w.identityOf(name, section)
		if err != nil {
			return exitError{exitUsage, err}
		}
		w.identity = identity
		leases := oidc.NewLeases(identity)
		w.agent.Issuers[name] = leases
		w.closers = append(w.closers, func() error { leases.Close(); return nil })
	}
	for name, section := range w.config.Issuers {
		if section.Type == typeOIDC {
			continue
		}
		issuer, err := w.issuer(name, section)
		if err != nil {
			return exitError{exitUsage, err}
		}
		w.agent.Issuers[name] = issuer
		w.closers = append(w.closers, func() error { issuer.Close(); return nil })
	}
	return nil
}

// A closingIssuer keeps connections.
type closingIssuer interface {
	creds.Issuer
	Close()
}

func (w *wiring) issuer(name string, section configs.Section) (issuer closingIssuer, err error) {
	issuerOf, ok := w.makers()[section.Type]
	if !ok {
		types := strings.Join(slices.Sorted(maps.Keys(w.makers())), ", ")
		return nil, section.Errorf("type", "issuer %q: this agent has %s, and oidc for its identity", section.Type, types)
	}
	if issuer, err = issuerOf(name, section, w.out.For("issuer "+name)); err != nil {
		return nil, section.Errorf("", "%w", err)
	}
	return issuer, nil
}

// A maker makes an issuer, which leaves this machine by way and no other.
type maker func(name string, section configs.Section, way *outbound.Exit) (closingIssuer, error)

// makers are all types that mint leases.
func (w *wiring) makers() map[string]maker {
	return map[string]maker{
		"aws": w.aws, "gitea": w.giteaTokens, "githubapp": githubApp, "kubernetes": w.kubernetes, "oauth2": w.oauth2,
		"postgres": w.postgres, "ssh": w.sshCertificates, "static": w.staticSecret, "vault": w.vault,
	}
}

func (w *wiring) postgres(_ string, section configs.Section, way *outbound.Exit) (closingIssuer, error) {
	var own postgres.Config
	if err := section.Decode(&own); err != nil {
		return nil, err
	}
	own.PasswordFile, own.RootCA = section.Path(own.PasswordFile), section.Path(own.RootCA)
	own.Owner = w.state.Owner
	made, err := postgres.New(own)
	if err != nil {
		return nil, err
	}
	made.Way = postgres.Way{Dial: way.DialContext, Roots: w.out.Roots()}
	return made, nil
}

// vault logs in with the agent's identity.
func (w *wiring) vault(_ string, section configs.Section, way *outbound.Exit) (closingIssuer, error) {
	var own struct {
		Address    string `yaml:"address,required"`
		JobAddress string `yaml:"job_address"`
		Namespace  string `yaml:"namespace"`
		CAFile     string `yaml:"ca_file"`
		Insecure   bool   `yaml:"insecure"`
		Mount      string `yaml:"mount"`
		Role       string `yaml:"role"`
		AgentRole  string `yaml:"agent_role"`
		Audience   string `yaml:"audience"`
	}
	if err := section.Decode(&own); err != nil {
		return nil, err
	}
	mint, err := w.identityFor(own.Audience, own.Address)
	if err != nil {
		return nil, err
	}
	return vault.New(vault.Config{
		Address: own.Address, JobAddress: own.JobAddress, Namespace: own.Namespace, CAFile: section.Path(own.CAFile), Insecure: own.Insecure,
		Mount: own.Mount, Role: own.Role, AgentRole: own.AgentRole, Owner: w.state.Owner,
		Out: way.HTTP,
		Sign: func(_ context.Context, s creds.Subject, lease string) (vault.Identity, error) {
			t, err := mint(s, lease)
			return vault.Identity{Token: t.Value, ID: t.ID}, err
		},
	})
}

// identityFor signs who asks for a lease. fallback is the audience if none is
// written.
func (w *wiring) identityFor(audience, fallback string) (func(s creds.Subject, lease string) (oidc.Token, error), error) {
	if w.identity == nil {
		return nil, errors.New("no identity to log in with: the configuration needs an issuer of type oidc too")
	}
	if audience == "" {
		audience = fallback
	}
	return func(s creds.Subject, lease string) (oidc.Token, error) {
		return w.identity.Mint(s, audience, map[string]string{"lease": lease})
	}, nil
}

func (w *wiring) identityOf(name string, section configs.Section) (*oidc.Issuer, error) {
	var own struct {
		URL       string        `yaml:"url,required"`
		Algorithm string        `yaml:"algorithm"`
		Lifetime  time.Duration `yaml:"lifetime"`
		Rotate    time.Duration `yaml:"rotate"`
		Subject   string        `yaml:"subject"`
	}
	if err := section.Decode(&own); err != nil {
		return nil, err
	}
	identity, err := oidc.New(oidc.Config{
		URL: own.URL, Algorithm: own.Algorithm, Lifetime: own.Lifetime, Rotate: own.Rotate, Subject: own.Subject,
		Owner: w.state.Owner, Store: w.state.Safe("issuer-" + name), Facts: runnerFacts,
	})
	if err != nil {
		return nil, section.Errorf("", "%w", err)
	}
	return identity, nil
}

// runnerFacts are what tokens say of this agent.
func runnerFacts() map[string]string {
	host, err := os.Hostname()
	if err != nil {
		return nil
	}
	return map[string]string{"runner": host}
}

// runOIDC writes what providers verify the agent's identity with, for any web
// server.
func runOIDC(c *call) error {
	o, err := c.flags("oidc", 2, nil)
	if err != nil {
		return err
	}
	if len(o.args) != 2 || o.args[0] != "export" {
		return usageError(`want "mayfly oidc export DIR"`)
	}
	w, err := wireBeside(o.config, c.stderr)
	if err != nil {
		return err
	}
	defer w.close()
	if w.identity == nil {
		return usageError("%s has no issuer of type oidc", o.config)
	}
	documents, err := w.identity.Documents()
	if err != nil {
		return err
	}
	for path, b := range documents {
		if err := export(filepath.Join(o.args[1], path), b); err != nil {
			return err
		}
	}
	next, err := w.identity.NextKey()
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(c.stdout, "written; the next key signs from %s: export again then, within its time (rotate)\n", next.UTC().Format(time.DateOnly))
	return err
}

// export replaces a file that a web server may be reading.
func export(path string, b []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Chmod(0o644), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}

// examineIdentity looks at the keys, and makes the first.
func (w *wiring) examineIdentity() []finding {
	if w.identity == nil {
		return nil
	}
	f := finding{"identity", "keys", stateOK, ""}
	next, err := w.identity.NextKey()
	if f.Detail = "the next one signs from " + next.UTC().Format(time.DateOnly) + " and is published"; err != nil {
		f.State, f.Detail = stateMissing, err.Error()
	}
	return []finding{f}
}
