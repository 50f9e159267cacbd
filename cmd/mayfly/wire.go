package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	goruntime "runtime"
	"time"

	"github.com/rs/zerolog"

	"github.com/mayfly-ci/mayfly/configs"
	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/oidc"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/gitea"
	"github.com/mayfly-ci/mayfly/providers/local"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/runner/gitcache"
	"github.com/mayfly-ci/mayfly/runner/outbound"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/containerd"
	"github.com/mayfly-ci/mayfly/sandbox/docker"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/native"
	"github.com/mayfly-ci/mayfly/sandbox/wall"
)

// This file and issuers.go are the only ones that know every implementation.

// A wiring is an agent's configuration with everything that it names made.
type wiring struct {
	config     *configs.Config
	weak       bool // an ordinary user's boxes do, where the configuration does not say
	policyFile string
	agent      runner.Config
	identity   *oidc.Issuer // nil if the configuration has none
	state      *runner.State
	out        *outbound.Way
	// authorities of the way out, as PEM; "" is the system's.
	authorities string
	closers     []func() error
	sealedFiles map[string]string // that issuers read, by path: whose
}

// wire takes the state for a new life of the agent.
func wire(path string, stderr io.Writer) (*wiring, error) {
	return wireWith(path, stderr, runner.OpenState)
}

// wirePeek reads beside a living agent.
func wirePeek(path string, stderr io.Writer) (*wiring, error) {
	return wireWith(path, stderr, func(dir string) (*runner.State, error) {
		state, err := runner.PeekState(dir)
		return state, neverRun(err, dir)
	})
}

// wireBeside takes the state if it is free, and reads beside its owner, or without
// the service manager's key, if not.
func wireBeside(path string, stderr io.Writer) (*wiring, error) {
	return wireWith(path, stderr, func(dir string) (*runner.State, error) {
		state, err := runner.OpenState(dir)
		if errors.Is(err, runner.ErrInUse) || errors.Is(err, runner.ErrKeyElsewhere) {
			return runner.PeekState(dir)
		}
		return state, err
	})
}

func wireWith(path string, stderr io.Writer, open func(string) (*runner.State, error)) (_ *wiring, err error) {
	c, err := load(path)
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
	if w.state, err = open(c.State); errors.Is(err, runner.ErrInUse) {
		return nil, fmt.Errorf("%w: stop that one first; jobs, audit and reap --dry-run work beside it", err)
	} else if err != nil {
		return nil, err
	}
	w.closers = append(w.closers, w.state.Close)
	w.agent.Slots, w.agent.Keep, w.agent.Drain, w.agent.Warm = c.Slots, c.Keep, c.Drain, runner.Warm{Boxes: c.Warm.Boxes, Age: c.Warm.Age}
	if w.agent.Quotas, err = quotasOf(c.Quotas); err != nil {
		return nil, exitError{exitUsage, err}
	}
	if err := w.record(); err != nil {
		return nil, err
	}
	return w, errors.Join(w.parts(), w.providers())
}

// parts makes the way out, and the runtimes, the issuers and the gateway, which
// use it.
func (w *wiring) parts() error {
	if err := w.outbound(w.agent.Audit); err != nil {
		return err
	}
	return errors.Join(w.runtimes(), w.issuers(), w.gateway())
}

func (w *wiring) runtimes() error {
	w.agent.Runtimes = map[string]sandbox.Runtime{}
	program, err := guest.Binary()
	if err != nil {
		return err
	}
	for name, section := range w.config.Runtimes {
		c, err := runtimeConfig(section, w.weak)
		if err != nil {
			return exitError{exitUsage, err}
		}
		var runtime interface {
			sandbox.Runtime
			Close() error
		}
		state := filepath.Join(w.state.Dir, "boxes-"+name)
		switch c := c.(type) {
		case native.Config:
			c.StateDir, c.Owner, c.Guest = state, w.state.Owner, program
			c.Images.Out = w.out.For("images " + name).HTTP
			runtime, err = native.New(c)
		case docker.Config:
			c.StateDir, c.Owner, c.Guest = state, w.state.Owner, program
			runtime, err = docker.New(c)
		case containerd.Config:
			c.StateDir, c.Owner, c.Guest = state, w.state.Owner, program
			c.Ask = []string{"/proc/self/exe", containerd.AskArg}
			c.Images.Out = w.out.For("images " + name).HTTP
			runtime, err = containerd.New(c)
		}
		if err != nil {
			return exitError{exitUsage, fmt.Errorf("sandbox %s: %w", name, err)}
		}
		w.agent.Runtimes[name] = runtime
		if w.state.Owned() { // else a living agent makes its next box in what Close would remove
			w.closers = append(w.closers, runtime.Close)
		}
	}
	return nil
}

// runtimeConfig is what the section says of a runtime: a native.Config, a
// docker.Config or a containerd.Config. weak is whether it is for an ordinary user if the section does
// not say.
func runtimeConfig(section configs.Section, weak bool) (any, error) {
	switch section.Type {
	case "native":
		return nativeConfig(section, weak)
	case "docker":
		return dockerConfig(section)
	case "containerd":
		return containerdConfig(section)
	}
	return nil, section.Errorf("type", "runtime %q: this agent has native, docker and containerd", section.Type)
}

func (w *wiring) gateway() error {
	c, err := gatewayConfig(w.config.Gateway)
	if err != nil {
		return exitError{exitUsage, err}
	}
	if own, ok := w.config.Monitor.AddrPort(); ok {
		c.Never = append(c.Never, own) // also for "mayfly exec" beside the agent
	}
	c.Parent, c.Roots = w.parent(), w.out.Roots()
	if w.agent.Learn, err = learningOf(w.config.Gateway); err != nil {
		return exitError{exitUsage, err}
	}
	if w.agent.Gateway, err = gateway.New(c); err != nil {
		return err
	}
	w.agent.Canary, err = wall.Listen(context.Background())
	if err == nil {
		w.closers = append(w.closers, w.agent.Canary.Close)
	}
	return err
}

// gitCache is for an agent that takes jobs: its directory has one owner.
func (w *wiring) gitCache() error {
	if w.config.GitCache.Dir == "" {
		return nil
	}
	c := w.gitCacheConfig()
	log := w.agent.Log
	c.Note = func(e gitcache.Event) {
		line := log.Info().Str("repository", e.Repository).Str("tier", e.Tier).Int64("bytes", e.Size).Dur("took", e.Took)
		if e.Err != nil {
			line.Err(e.Err).Msg("git cache not filled: jobs of the repository fetch all")
			return
		}
		line.Msg("git cache filled")
	}
	c.Out, c.Authorities = w.out.For("git cache").Relay, w.authorities
	cache, err := gitcache.New(c)
	if err != nil {
		return exitError{exitUsage, err}
	}
	w.agent.Git = cache
	w.closers = append(w.closers, cache.Close)
	return nil
}

func (w *wiring) gitCacheConfig() gitcache.Config {
	c := w.config.GitCache
	return gitcache.Config{Dir: c.Dir, Size: c.Size, Age: c.Age, Time: c.Time}
}

func (w *wiring) auditDir() string { return filepath.Join(w.state.Dir, "audit") }

func (w *wiring) record() error {
	record, err := audit.OpenFile(w.auditDir(), audit.FileOptions{})
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
		p, err := w.provider(name, section)
		if err != nil {
			return err
		}
		w.agent.Providers[name] = p
	}
	return nil
}

func (w *wiring) provider(name string, section configs.Section) (providers.Provider, error) {
	switch section.Type {
	case typeGitea:
		p, err := w.gitea(name, section)
		if err != nil {
			return nil, exitError{exitUsage, err}
		}
		return p, nil
	case local.Name:
		c, err := localConfig(section)
		if err != nil {
			return nil, exitError{exitUsage, err}
		}
		c.Provider = name
		return local.New(c)
	}
	return nil, exitError{exitUsage, section.Errorf("type", "provider %q: this agent has local and gitea", section.Type)}
}

const typeGitea = "gitea"

// gitea is one registration at one instance. Nothing is asked.
func (w *wiring) gitea(name string, section configs.Section) (*gitea.Provider, error) {
	var own struct {
		URL       string        `yaml:"url,required"`
		TokenFile string        `yaml:"token_file"`
		Name      string        `yaml:"name"`
		Labels    []string      `yaml:"labels,required"`
		Ephemeral bool          `yaml:"ephemeral"`
		RootCA    string        `yaml:"ca_file"`
		Insecure  bool          `yaml:"insecure"`
		Poll      time.Duration `yaml:"poll"`
	}
	if err := section.Decode(&own); err != nil {
		return nil, err
	}
	c := gitea.Config{
		URL: own.URL, RootCA: section.Path(own.RootCA), Insecure: own.Insecure, Provider: name, Runner: own.Name,
		Labels: own.Labels, Ephemeral: own.Ephemeral, Poll: own.Poll, Version: version, Store: w.state.Safe("provider-" + name),
		Out: w.out.ForPoller("provider " + name).HTTP,
	}
	if own.TokenFile != "" {
		c.Token = func() (creds.Secret, error) { return configs.ReadSecret(section.Path(own.TokenFile)) }
	}
	p, err := gitea.New(c)
	if err != nil {
		return nil, section.Errorf("", "%w", err)
	}
	return p, nil
}

func localConfig(section configs.Section) (local.Config, error) {
	var own struct {
		Dir          string   `yaml:"dir,required"`
		Labels       []string `yaml:"labels"`
		Repositories string   `yaml:"repositories"`
	}
	err := section.Decode(&own)
	if err == nil {
		if bad := providers.CheckLabels(own.Labels, goruntime.GOARCH); bad != nil {
			err = section.Errorf("labels", "%w", bad)
		}
	}
	return local.Config{Dir: section.Path(own.Dir), Labels: own.Labels, Repositories: section.Path(own.Repositories)}, err
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
// configuration if this machine has one for us, and the state of this run,
// which belongs to the wiring from now on.
func wireExec(path string, state *runner.State, rules *policy.Policy, log zerolog.Logger) (_ *wiring, err error) {
	w := &wiring{
		state: state, weak: os.Geteuid() != 0, policyFile: "built-in",
		agent: runner.Config{Policy: rules, Log: log}, closers: []func() error{state.Close},
	}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	if noConfig(path) {
		w.config = configs.Default(state.Dir)
	} else {
		if w.config, err = load(path); err == nil {
			err = w.config.Validate()
		}
		if err != nil {
			return nil, exitError{exitUsage, err}
		}
	}
	if err := w.record(); err != nil {
		return nil, err
	}
	return w, w.parts()
}

// noConfig says whether this machine has no configuration that the user may
// read. One that was asked for by name must be there.
func noConfig(path string) bool {
	if path != defaultConfig {
		return false
	}
	f, err := os.Open(path)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission)
	}
	return f.Close() != nil
}

// load reads a configuration. The state is absolute then, since parts of it stand
// in the names of what the runtime makes, and so is what boxes see of the host.
func load(path string) (*configs.Config, error) {
	c, err := configs.Load(path)
	if err == nil {
		c.State, err = filepath.Abs(c.State)
	}
	if err == nil && c.GitCache.Dir != "" {
		c.GitCache.Dir, err = filepath.Abs(c.GitCache.Dir)
	}
	return c, err
}

func readPolicy(path string) (*policy.Policy, error) {
	src, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	return policy.Parse(src, path)
}

// peek opens the state of the configured agent for reading.
func peek(path string) (*runner.State, error) {
	c, err := load(path)
	if err != nil {
		return nil, exitError{exitUsage, err}
	}
	state, err := runner.PeekState(c.State)
	return state, neverRun(err, c.State)
}

// neverRun says what a state that is not there means.
func neverRun(err error, dir string) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: no agent has run with the state directory %s yet", err, dir)
	}
	return err
}
