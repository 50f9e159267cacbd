package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/rs/zerolog"

	"github.com/mayfly-ci/mayfly/configs"
	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/postgres"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/local"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/native"
)

// This is the only file that knows every implementation.

// A wiring is an agent's configuration with everything that it names made.
type wiring struct {
	config     *configs.Config
	policyFile string
	agent      runner.Config
	state      *runner.State
	closers    []func() error
}

// wire takes the state for a new life of the agent.
func wire(path string, stderr io.Writer) (*wiring, error) {
	return wireWith(path, stderr, runner.OpenState)
}

// wirePeek reads beside a living agent.
func wirePeek(path string, stderr io.Writer) (*wiring, error) {
	return wireWith(path, stderr, runner.PeekState)
}

// wireBeside takes the state if it is free, and reads beside its owner if not.
func wireBeside(path string, stderr io.Writer) (*wiring, error) {
	return wireWith(path, stderr, func(dir string) (*runner.State, error) {
		state, err := runner.OpenState(dir)
		if errors.Is(err, runner.ErrInUse) {
			return runner.PeekState(dir)
		}
		return state, err
	})
}

func wireWith(path string, stderr io.Writer, open func(string) (*runner.State, error)) (_ *wiring, err error) {
	c, err := configs.Load(path)
	if err == nil {
		err = c.Validate()
	}
	if err != nil {
		return nil, exitError{exitUsage, err}
	}
	w := &wiring{config: c, policyFile: c.Policy}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if w.agent.Log, err = operatorLog(c.Log, stderr); err != nil {
		return nil, exitError{exitUsage, err}
	}
	if w.agent.Policy, err = readPolicy(c.Policy); err != nil {
		return nil, exitError{exitUsage, err}
	}
	if w.state, err = open(c.State); err != nil {
		return nil, err
	}
	w.closers = append(w.closers, w.state.Close)
	w.agent.Slots, w.agent.Drain = c.Slots, c.Drain
	if err := errors.Join(w.parts(), w.record(), w.providers()); err != nil {
		return nil, err
	}
	return w, nil
}

// parts makes the runtimes, the issuers and the gateway.
func (w *wiring) parts() error {
	return errors.Join(w.runtimes(), w.issuers(), w.gateway())
}

func (w *wiring) runtimes() error {
	w.agent.Runtimes = map[string]sandbox.Runtime{}
	for name, section := range w.config.Runtimes {
		if section.Type != "native" {
			return exitError{exitUsage, section.Errorf("type", "runtime %q: this agent has native", section.Type)}
		}
		var own struct {
			Unprivileged bool     `yaml:"unprivileged"`
			FirstID      uint32   `yaml:"first_id"`
			Cgroup       string   `yaml:"cgroup"`
			Base         []string `yaml:"base"`
			Hide         []string `yaml:"hide"`
		}
		if err := section.Decode(&own); err != nil {
			return exitError{exitUsage, err}
		}
		program, err := guest.Binary()
		if err != nil {
			return err
		}
		runtime, err := native.New(native.Config{
			StateDir: filepath.Join(w.state.Dir, "boxes-"+name), Owner: w.state.Owner, Guest: program,
			FirstID: own.FirstID, CgroupParent: own.Cgroup, Base: own.Base, Hide: own.Hide,
			Unprivileged: own.Unprivileged,
		})
		if err != nil {
			return section.Errorf("", "%w", err)
		}
		w.agent.Runtimes[name] = runtime
	}
	return nil
}

func (w *wiring) issuers() error {
	w.agent.Issuers = map[string]creds.Issuer{}
	for name, section := range w.config.Issuers {
		if section.Type != "postgres" {
			return exitError{exitUsage, section.Errorf("type", "issuer %q: this agent has postgres", section.Type)}
		}
		var own postgres.Config
		if err := section.Decode(&own); err != nil {
			return exitError{exitUsage, err}
		}
		own.PasswordFile, own.RootCA = section.Path(own.PasswordFile), section.Path(own.RootCA)
		own.Owner = w.state.Owner
		issuer, err := postgres.New(own)
		if err != nil {
			return exitError{exitUsage, section.Errorf("", "%w", err)}
		}
		w.agent.Issuers[name] = issuer
		w.closers = append(w.closers, func() error { issuer.Close(); return nil })
	}
	return nil
}

func (w *wiring) gateway() error {
	var own struct {
		Names int `yaml:"names"`
		Conns int `yaml:"connections"`
	}
	if err := w.config.Gateway.Decode(&own); err != nil {
		return exitError{exitUsage, err}
	}
	g, err := gateway.New(gateway.Config{Names: own.Names, Conns: own.Conns})
	w.agent.Gateway = g
	return err
}

func (w *wiring) record() error {
	record, err := audit.OpenFile(filepath.Join(w.state.Dir, "audit"), audit.FileOptions{})
	if err != nil {
		return err
	}
	w.agent.Audit = record
	w.closers = append(w.closers, record.Close)
	return nil
}

func (w *wiring) providers() error {
	w.agent.Providers = map[string]providers.Provider{}
	for name, section := range w.config.Providers {
		if section.Type != local.Name {
			return exitError{exitUsage, section.Errorf("type", "provider %q: this agent has local", section.Type)}
		}
		var own struct {
			Dir          string   `yaml:"dir,required"`
			Labels       []string `yaml:"labels"`
			Repositories string   `yaml:"repositories"`
		}
		if err := section.Decode(&own); err != nil {
			return exitError{exitUsage, err}
		}
		p, err := local.New(local.Config{Dir: section.Path(own.Dir), Labels: own.Labels, Repositories: section.Path(own.Repositories)})
		if err != nil {
			return err
		}
		w.agent.Providers[name] = p
	}
	return nil
}

// close lets go of everything, newest first.
func (w *wiring) close() {
	for len(w.closers) > 0 {
		last := len(w.closers) - 1
		if err := w.closers[last](); err != nil {
			w.agent.Log.Error().Err(err).Msg("close")
		}
		w.closers = w.closers[:last]
	}
}

// wireExec is the agent of "mayfly exec": the issuers and the runtime of the
// configuration if this machine has one, and the state of this run.
func wireExec(path string, state *runner.State, rules *policy.Policy, log zerolog.Logger) (runner.Config, func(), error) {
	c := configs.Default(state.Dir)
	if _, err := os.Stat(path); err == nil || path != defaultConfig {
		loaded, err := configs.Load(path)
		if err == nil {
			err = loaded.Validate()
		}
		if err != nil {
			return runner.Config{}, nil, exitError{exitUsage, err}
		}
		c = loaded
	}
	w := &wiring{config: c, state: state, agent: runner.Config{Policy: rules, Log: log}}
	if err := errors.Join(w.parts(), w.record()); err != nil {
		w.close()
		return runner.Config{}, nil, err
	}
	return w.agent, w.close, nil
}

func readPolicy(path string) (*policy.Policy, error) {
	src, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	return policy.Parse(src, path)
}

func operatorLog(c configs.Log, to io.Writer) (zerolog.Logger, error) {
	level, err := zerolog.ParseLevel(c.Level)
	if err != nil {
		return zerolog.Nop(), fmt.Errorf("log level: %w", err)
	}
	if c.Format == "console" {
		return consoleLog(to).Level(level), nil
	}
	return zerolog.New(to).Level(level).With().Timestamp().Logger(), nil
}

func consoleLog(to io.Writer) zerolog.Logger {
	return zerolog.New(zerolog.ConsoleWriter{Out: to, TimeFormat: "15:04:05.000"}).With().Timestamp().Logger()
}

// peek opens the state of the configured agent for reading.
func peek(path string) (*runner.State, error) {
	c, err := configs.Load(path)
	if err != nil {
		return nil, exitError{exitUsage, err}
	}
	return runner.PeekState(c.State)
}
