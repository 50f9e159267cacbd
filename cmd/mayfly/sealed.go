package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/configs"
	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/gitea"
	"github.com/mayfly-ci/mayfly/creds/oauth2"
	"github.com/mayfly-ci/mayfly/creds/ssh"
	"github.com/mayfly-ci/mayfly/creds/static"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/outbound"
	"github.com/mayfly-ci/mayfly/runner/policy"
)

// runSeal writes a secret so that only this installation can read it, for one
// section of the configuration. It works beside a living agent.
func runSeal(c *call) error {
	var rotate, forget bool
	o, err := c.flags("seal", 2, func(fs *flag.FlagSet) {
		fs.BoolVar(&rotate, "rotate", false, "make a new key, and seal all that the agent has with it; the agent must not run")
		fs.BoolVar(&forget, "forget", false, "remove the keys before the newest, after a rotation; the agent must not run")
	})
	if err != nil {
		return err
	}
	if (rotate || forget) && len(o.args) == 0 {
		return c.rotate(o, rotate, forget)
	}
	if len(o.args) != 2 || rotate || forget {
		return usageError(`want "mayfly seal ISSUER FILE", and the secret on the standard input`)
	}
	cfg, err := configs.Load(o.config)
	if err != nil {
		return exitError{exitUsage, err}
	}
	secret, err := readInput()
	if err != nil {
		return exitError{exitUsage, err}
	}
	state, err := runner.OpenState(cfg.State)
	if errors.Is(err, runner.ErrInUse) {
		state, err = runner.PeekState(cfg.State)
	}
	if err != nil {
		return err
	}
	text, err := state.Seal(o.args[0], secret, time.Now())
	if err == nil {
		err = writeSealed(o.args[1], text)
	}
	if err := errors.Join(err, state.Close()); err != nil {
		return err
	}
	more := ""
	if _, ok := cfg.Issuers[o.args[0]]; !ok { // it may follow, since the file has to be there first
		more = ", of which " + o.config + " has none yet: no other can open it"
	}
	_, err = fmt.Fprintf(c.stdout, "%s: sealed for issuer %s of this installation%s\n", o.args[1], o.args[0], more)
	return err
}

// maxSealed is what a secret may have, in bytes: configs.ReadSecret takes as much
// in its sealed form.
const maxSealed = 32 << 10

// readInput takes off the newline that editors and echo put at the end.
func readInput() (creds.Secret, error) {
	b, err := io.ReadAll(io.LimitReader(os.Stdin, maxSealed+1))
	text := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
	switch {
	case err != nil:
		return creds.Secret{}, fmt.Errorf("standard input: %w", err)
	case len(b) > maxSealed:
		return creds.Secret{}, fmt.Errorf("standard input: larger than %d bytes", maxSealed)
	case text == "":
		return creds.Secret{}, errors.New("standard input: empty; want the secret")
	}
	return creds.NewSecret(text), nil
}

// writeSealed replaces a file that an agent may be reading. It is on disk when it
// returns: keys that opened the one before may be removed then.
func writeSealed(path, text string) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*") // mode 0600
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	_, err = f.WriteString(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, errors.Join(err, os.Remove(f.Name())))
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// sealed reads a secret of an issuer each time that it is asked, opened if it is
// sealed. The file need not be there yet.
func (w *wiring) sealed(issuer, path string) func() (runner.Sealed, error) {
	if w.sealedFiles == nil {
		w.sealedFiles = map[string]string{}
	}
	w.sealedFiles[path] = issuer
	return func() (runner.Sealed, error) {
		text, err := configs.ReadSecret(path)
		if err != nil {
			return runner.Sealed{}, err
		}
		return w.state.Unseal(issuer, text)
	}
}

// secret is sealed, of which the day does not matter.
func (w *wiring) secret(issuer, path string) func() (creds.Secret, error) {
	read := w.sealed(issuer, path)
	return func() (creds.Secret, error) {
		s, err := read()
		return s.Secret, err
	}
}

func (w *wiring) giteaTokens(name string, section configs.Section, way *outbound.Exit) (closingIssuer, error) {
	var own struct {
		URL          string   `yaml:"url,required"`
		JobURL       string   `yaml:"job_url"`
		CAFile       string   `yaml:"ca_file"`
		Insecure     bool     `yaml:"insecure"`
		User         string   `yaml:"user,required"`
		PasswordFile string   `yaml:"password_file,required"`
		Scopes       []string `yaml:"scopes,required"`
	}
	if err := section.Decode(&own); err != nil {
		return nil, err
	}
	return gitea.New(gitea.Config{
		Out: way.HTTP, URL: own.URL, JobURL: own.JobURL, CAFile: section.Path(own.CAFile), Insecure: own.Insecure,
		User: own.User, Password: w.secret(name, section.Path(own.PasswordFile)), Scopes: own.Scopes, Owner: w.state.Owner,
	})
}

// oauth2 asks in the agent's own name, or with exchange: in that of the job.
func (w *wiring) oauth2(name string, section configs.Section, way *outbound.Exit) (closingIssuer, error) {
	var own struct {
		Token         string   `yaml:"token_url,required"`
		Revocation    string   `yaml:"revocation_url,required"`
		Introspection string   `yaml:"introspection_url"`
		Use           string   `yaml:"use_url"`
		CAFile        string   `yaml:"ca_file"`
		Insecure      bool     `yaml:"insecure"`
		ClientID      string   `yaml:"client_id,required"`
		SecretFile    string   `yaml:"client_secret_file,required"`
		Post          bool     `yaml:"post"`
		Scopes        []string `yaml:"scopes,required"`
		Audiences     []string `yaml:"audiences"`
		Exchange      string   `yaml:"exchange"`
	}
	if err := section.Decode(&own); err != nil {
		return nil, err
	}
	c := oauth2.Config{
		Endpoints: oauth2.Endpoints{Token: own.Token, Revocation: own.Revocation, Introspection: own.Introspection, Use: own.Use},
		CAFile:    section.Path(own.CAFile), Out: way.HTTP, Insecure: own.Insecure, ClientID: own.ClientID, Post: own.Post,
		ClientSecret: w.secret(name, section.Path(own.SecretFile)), Scopes: own.Scopes, Audiences: own.Audiences, Owner: w.state.Owner,
	}
	if own.Exchange != "" {
		if w.identity == nil {
			return nil, section.Errorf("exchange", "no identity to exchange: the configuration needs an issuer of type oidc too")
		}
		c.Sign = func(_ context.Context, s creds.Subject, lease string) (oauth2.Identity, error) {
			t, err := w.identity.Mint(s, own.Exchange, map[string]string{"lease": lease})
			return oauth2.Identity{Token: t.Value, ID: t.ID}, err
		}
	}
	return oauth2.New(c)
}

func (w *wiring) sshCertificates(name string, section configs.Section, way *outbound.Exit) (closingIssuer, error) {
	var own struct {
		CA         string        `yaml:"ca_private_key_file,required"`
		Principals []string      `yaml:"principals,required"`
		Extensions []string      `yaml:"extensions"`
		Address    string        `yaml:"address,required"`
		KnownHosts string        `yaml:"known_hosts,required"`
		User       string        `yaml:"user"`
		List       string        `yaml:"krl_file"`
		Publish    []string      `yaml:"publish"`
		Longest    time.Duration `yaml:"longest"`
	}
	if err := section.Decode(&own); err != nil {
		return nil, err
	}
	return ssh.New(ssh.Config{
		CA: w.secret(name, section.Path(own.CA)), Principals: own.Principals, Extensions: own.Extensions,
		Address: own.Address, KnownHosts: section.Path(own.KnownHosts), User: own.User, Dial: way.DialContext,
		List: section.Path(own.List), Publish: own.Publish, Longest: own.Longest,
		Owner: w.state.Owner, Store: w.state.Safe("issuer-" + name),
	})
}

// publishLists gives servers a list before the first revocation: they refuse
// every key while they have none.
func (w *wiring) publishLists(ctx context.Context) {
	for name, issuer := range w.agent.Issuers {
		if i, ok := issuer.(*ssh.Issuer); ok {
			if err := i.Published(ctx); err != nil {
				w.agent.Log.Error().Err(err).Str("issuer", name).Msg("list of revoked certificates")
			}
		}
	}
}

// examineSSH reads the key, and says what servers must trust.
func examineSSH(name string, issuer creds.Issuer) []finding {
	i, ok := issuer.(*ssh.Issuer)
	if !ok {
		return nil
	}
	f := finding{"issuer " + name, "authority", stateOK, ""}
	line, err := i.Authority()
	if f.Detail = "TrustedUserCAKeys: " + line; err != nil {
		f.State, f.Detail = stateMissing, err.Error()
	}
	return []finding{f}
}

func (w *wiring) staticSecret(name string, section configs.Section, _ *outbound.Exit) (closingIssuer, error) {
	var own struct {
		SecretFile string        `yaml:"secret_file,required"`
		User       string        `yaml:"user"`
		Replace    time.Duration `yaml:"replace"`
	}
	if err := section.Decode(&own); err != nil {
		return nil, err
	}
	read := w.sealed(name, section.Path(own.SecretFile))
	return static.New(static.Config{
		Secret: func() (creds.Secret, time.Time, error) {
			s, err := read()
			return s.Secret, s.Since, err
		},
		User: own.User, Replace: own.Replace, Owner: w.state.Owner,
	})
}

// checkWithheld refuses a policy that would give a job what its issuer lets no
// job have.
func checkWithheld(issuer creds.Issuer, g policy.Grant) error {
	if _, ok := issuer.(*static.Issuer); !ok || len(g.Clear) == 0 {
		return nil
	}
	for _, field := range g.Clear {
		if field == "secret" {
			return fmt.Errorf("%s: lease %s: the job would hold a static secret: name it under broker, and not under clear", g.Rule, g.Lease)
		}
	}
	return nil
}

// examineStatic counts the days of a secret that nothing ends.
func examineStatic(name string, issuer creds.Issuer) []finding {
	i, ok := issuer.(*static.Issuer)
	if !ok {
		return nil
	}
	f := finding{"issuer " + name, "age", stateOK, ""}
	days, late, err := i.Age()
	f.Detail = fmt.Sprintf("a secret that nothing ends, the same for %d days", days)
	if late {
		f.State = stateMissing
		f.Detail += ": replace it at its service, and seal the new one"
	}
	if err != nil {
		f.State, f.Detail = stateMissing, err.Error()
	}
	return []finding{f}
}

// warnOfStatic does the same in the log.
func (w *wiring) warnOfStatic() {
	for name, issuer := range w.agent.Issuers {
		for _, f := range examineStatic(name, issuer) {
			w.agent.Log.Warn().Str("issuer", name).Str("detail", f.Detail).Msg("static secret")
		}
	}
}
