package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/mayfly-ci/mayfly/configs"
	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/local"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// runConfig reads a configuration and everything that it names, and touches
// nothing: no backend is asked and no state is taken.
func runConfig(c *call) error {
	o, err := c.flags("config", 2, nil)
	if err != nil {
		return err
	}
	if len(o.args) != 2 || o.args[0] != "check" {
		return usageError("want: mayfly config check FILE")
	}
	cfg, err := configs.Load(o.args[1])
	if err != nil {
		return exitError{exitUsage, err}
	}
	rules, perr := readPolicy(cfg.Policy)
	if err := errors.Join(cfg.Validate(), perr); err != nil {
		return exitError{exitUsage, err}
	}
	if err := checkNames(cfg, rules); err != nil {
		return exitError{exitUsage, err}
	}
	warnings := idle(cfg, rules)
	text := fmt.Sprintf("%s is good: %d slots, policy %s\n", o.args[1], cfg.Slots, rules.Digest())
	facts := map[string]any{"file": o.args[1], "slots": cfg.Slots, "policy": rules.Digest(), "warnings": warnings}
	if cfg.Warm.Boxes > 0 {
		text += warmText(cfg, rules) + "\n"
		facts["warm"] = cfg.Warm.Boxes * runner.Classes(rules)
	}
	for _, w := range warnings {
		text += "warning: " + w + "\n"
	}
	return c.print(o, facts, text)
}

// idle is what the policy says and the configuration makes meaningless.
func idle(cfg *configs.Config, rules *policy.Policy) []string {
	warnings := append([]string{}, rules.Warnings()...)
	for _, p := range rules.Places() {
		if p.Keeps && cfg.Keep == 0 {
			warnings = append(warnings, p.Rule+": keep-on-failure: no box is kept, for the configuration has keep: 0")
		}
	}
	for _, rule := range learningRules(rules) {
		warnings = append(warnings, rule+": mode: audit: its jobs reach every name, and nothing is refused")
	}
	return warnings
}

// checkNames looks for names in the policy that the configuration does not
// have, and lets every issuer judge the scopes that it would be asked for.
func checkNames(cfg *configs.Config, rules *policy.Policy) error {
	w := &wiring{config: cfg, state: &runner.State{Owner: "config-check"}}
	defer w.close()
	if err := w.outbound(nil); err != nil { // nothing is connected
		return err
	}
	errs := []error{w.issuers()}
	for name, section := range cfg.Providers {
		errs = append(errs, w.checkProvider(name, section))
	}
	for _, section := range cfg.Runtimes {
		_, err := runtimeConfig(section, false)
		errs = append(errs, err)
	}
	_, gerr := gatewayConfig(cfg.Gateway)
	_, qerr := quotasOf(cfg.Quotas)
	return errors.Join(append(errs, gerr, qerr, w.checkRules(rules))...)
}

// checkRules looks for the runtimes that the policy names, and lets the issuers
// judge what it would have them asked for.
func (w *wiring) checkRules(rules *policy.Policy) error {
	errs := []error{checkWarm(w.config, rules), w.checkLearning(rules)}
	for _, p := range rules.Places() {
		section, ok := w.config.Runtimes[p.Runtime]
		if !ok {
			errs = append(errs, fmt.Errorf("%s: runtime %q is not in the configuration", p.Rule, p.Runtime))
		} else if p.Image != "" && section.Type == "native" {
			errs = append(errs, checkImage(p, section))
		} else if err := allowImage(section, p.Image); err != nil {
			errs = append(errs, fmt.Errorf("%s: runtime %q: %w", p.Rule, p.Runtime, err))
		}
		if ok {
			errs = append(errs, checkIsolation(p, section))
		}
	}
	for _, g := range rules.Grants() {
		issuer, ok := w.agent.Issuers[g.Issuer]
		if !ok {
			errs = append(errs, fmt.Errorf("%s: lease %s: issuer %q is not in the configuration", g.Rule, g.Lease, g.Issuer))
			continue
		}
		errs = append(errs, checkWithheld(issuer, g), checkLife(issuer, g), checkAsks(issuer, g))
		if checker, ok := issuer.(creds.ScopeChecker); ok {
			if err := checker.CheckScope(g.Scope); err != nil {
				errs = append(errs, fmt.Errorf("%s: lease %s: %w", g.Rule, g.Lease, err))
			}
		}
	}
	return errors.Join(errs...)
}

// checkAsks refuses tokens of an issuer that gives none, and leases that nobody can
// use.
func checkAsks(issuer creds.Issuer, g policy.Grant) error {
	_, asked := issuer.(creds.Asker)
	switch {
	case g.Asks && !asked:
		return fmt.Errorf("%s: lease %s: tool %s: issuer %q gives no identity tokens: name one of type oidc", g.Rule, g.Lease, policy.GitHubOIDC, g.Issuer)
	case asked && !g.Asks:
		return fmt.Errorf("%s: lease %s: what issuer %q gives is asked for: add tools: [%s]", g.Rule, g.Lease, g.Issuer, policy.GitHubOIDC)
	}
	return nil
}

// checkImage looks whether boxes of a native runtime may be made of an image.
func checkImage(p policy.Place, section configs.Section) error {
	c, err := nativeConfig(section, false)
	if err == nil && c.Unprivileged {
		err = errors.New("boxes of an unprivileged runtime have the host's base and no image")
	}
	if err == nil {
		err = c.Images.CheckName(p.Image)
	}
	if err != nil {
		return fmt.Errorf("%s: image %s: %w", p.Rule, p.Image, err)
	}
	return nil
}

// allowImage refuses an image that a runtime over an engine would. What is wrong
// with the section itself is said elsewhere.
func allowImage(section configs.Section, image string) error {
	if image == "" {
		return nil
	}
	switch section.Type {
	case "docker":
		if c, err := dockerConfig(section); err == nil {
			return c.Images.Allow(image)
		}
	case "containerd":
		if c, err := containerdConfig(section); err == nil {
			return c.Images.Allow(image)
		}
	}
	return nil
}

// checkProvider makes no spool, as the agent would.
func (w *wiring) checkProvider(name string, section configs.Section) error {
	if section.Type == local.Name {
		_, err := localConfig(section)
		return err
	}
	_, err := w.provider(name, section)
	return err
}

// jobFile is what "policy explain" reads: the facts that rules are about.
type jobFile struct {
	Provider    string          `json:"provider"`
	Repository  string          `json:"repository"`
	Ref         string          `json:"ref"`
	SHA         string          `json:"sha"`
	Workflow    string          `json:"workflow"`
	Event       string          `json:"event"`
	Environment string          `json:"environment"`
	Job         string          `json:"job"`
	Actor       string          `json:"actor"`
	Trust       providers.Trust `json:"trust"`
	Steps       []string        `json:"steps"` // ids
}

func runPolicy(c *call) error {
	if len(c.args) > 0 && c.args[0] == "suggest" {
		return c.suggest()
	}
	if len(c.args) > 0 && c.args[0] == "test" {
		return c.testPolicy()
	}
	var jobPath, policyPath, narrowPath string
	o, err := c.flags("policy", 1, func(fs *flag.FlagSet) {
		fs.StringVar(&jobPath, "job", "", "JSON file with the facts of a job: provider, repository, ref, event, trust, …")
		fs.StringVar(&policyPath, "policy", "", "policy file (default: the one of the configuration)")
		fs.StringVar(&narrowPath, "narrow", "", "file of the repository ("+policy.NarrowFile+") that takes from the plan")
	})
	if err != nil {
		return err
	}
	if len(o.args) != 1 || o.args[0] != "explain" || jobPath == "" {
		return usageError("want: mayfly policy explain --job FILE [--policy FILE], mayfly policy test FILE, or mayfly policy suggest JOB")
	}
	rules, err := policyOf(o, policyPath)
	if err != nil {
		return exitError{exitUsage, err}
	}
	job, err := readJob(jobPath)
	if err != nil {
		return exitError{exitUsage, err}
	}
	e := rules.Explain(job)
	if err := narrowed(&e, narrowPath); err != nil {
		return exitError{exitUsage, err}
	}
	if err := c.print(o, e, explain(e)); err != nil {
		return err
	}
	if e.Plan == nil {
		return exitError{exitNo, nil}
	}
	return nil
}

// narrowed takes from the plan what a file of the repository says.
func narrowed(e *policy.Explanation, path string) error {
	if path == "" || e.Plan == nil {
		return nil
	}
	if !e.Plan.Narrows {
		return fmt.Errorf("%s: the rule does not say narrow: true, so that no file of a repository counts", e.Plan.Rule)
	}
	src, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	plan, err := e.Plan.Narrow(src, path)
	if err != nil {
		e.Plan, e.Refused = nil, err.Error()
		return nil
	}
	e.Plan = &plan
	return nil
}

func readJob(path string) (providers.Job, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return providers.Job{}, err
	}
	var f jobFile
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return providers.Job{}, fmt.Errorf("%s: %w", path, err)
	}
	job := providers.Job{
		Subject: creds.Subject{
			Provider: f.Provider, Repository: f.Repository, Ref: f.Ref, SHA: f.SHA,
			Workflow: f.Workflow, Event: f.Event, Job: f.Job, Origin: creds.Origin{Environment: f.Environment, Actor: f.Actor},
		},
		Trust: f.Trust,
	}
	for _, id := range f.Steps {
		job.Steps = append(job.Steps, providers.Step{ID: id})
	}
	return job, nil
}

// explain renders an explanation for people.
func explain(e policy.Explanation) string {
	var b strings.Builder
	for _, t := range e.Trials {
		if t.Matched {
			fmt.Fprintf(&b, "matches   %s\n", t.Rule)
			continue
		}
		fmt.Fprintf(&b, "no match  %s\n", t.Rule)
		for _, m := range t.Mismatches {
			fmt.Fprintf(&b, "            %s is %q, the rule wants %s\n", m.Field, m.Got, strings.Join(m.Want, " or "))
		}
	}
	if e.Refused != "" {
		fmt.Fprintf(&b, "\nrefused: %s\n", e.Refused)
		return b.String()
	}
	if e.Plan == nil {
		b.WriteString("\nrefused: no rule matches, so nothing is granted\n")
		return b.String()
	}
	p := e.Plan
	where := p.Runtime
	if p.Image != "" {
		where += ", image " + p.Image
	}
	if p.Isolation != "" {
		where += ", isolation " + string(p.Isolation)
	}
	fmt.Fprintf(&b, "\ngranted by %s\n  runtime %s, at most %v\n", p.Rule, where, p.Timeout)
	if p.Mode != "" {
		fmt.Fprintf(&b, "  mode %s: any other name too, where the agent's configuration lets jobs learn; each is written down\n", p.Mode)
	}
	switch {
	case p.Narrowed != "":
		fmt.Fprintf(&b, "  narrowed by the repository's file, %s\n", p.Narrowed)
	case p.Narrows:
		fmt.Fprintf(&b, "  the repository may take from this by %s on its protected default branch (--narrow FILE shows how)\n", policy.NarrowFile)
	}
	for _, x := range p.Egress {
		fmt.Fprintf(&b, "  egress  %s:%d %s%s\n", x.Rule.Name, x.Rule.Port, x.Rule.Protocol, onlyIn(x.Step))
		for _, r := range x.Rule.Requests {
			fmt.Fprintf(&b, "            %s %s%s\n", strings.Join(r.Methods, ", "), r.Path, bounds(r))
		}
	}
	for _, l := range p.Leases {
		fmt.Fprintf(&b, "  lease   %s from %s for at most %v%s\n", l.Name, l.Issuer, l.TTL, onlyIn(l.Step))
		if l.Requires != nil {
			fmt.Fprintf(&b, "          requires %s\n", l.Requires)
		}
		if l.Uses > 0 {
			fmt.Fprintf(&b, "          at most %d requests or logins have it, counted at the gateway\n", l.Uses)
		}
		for _, t := range l.Tools {
			fmt.Fprintf(&b, "          %s\n", toolText(t, l))
		}
		for _, x := range l.Broker {
			in := x.Rule.Inject
			if s := x.Rule.Session; s != nil || x.Rule.Protocol == egress.Postgres {
				fmt.Fprintf(&b, "          its %s logs in at %s:%d by %s%s\n", x.Value, x.Rule.Name, x.Rule.Port, x.Rule.Protocol, session(s))
				continue
			}
			fmt.Fprintf(&b, "          its %s is added to requests to %s:%d as %s, and the job has a placeholder\n",
				x.Value, x.Rule.Name, x.Rule.Port, strings.TrimSpace(string(in.As)+" "+in.Name))
		}
	}
	if p.Token != "" {
		fmt.Fprintf(&b, "  token   of the provider: %s\n", p.Token)
	}
	if len(p.Egress)+len(p.Leases)+len(p.Mode) == 0 {
		b.WriteString("  no way out and no credentials\n")
	}
	for _, u := range p.Unmet {
		fmt.Fprintf(&b, "  not granted: %s, since %s is false: %s\n", u.What, u.At, u.When)
	}
	for _, step := range e.AbsentSteps {
		fmt.Fprintf(&b, "  the job has no step %s: what is only for that is never given\n", step)
	}
	return b.String()
}

// toolText is what a program finds of a lease by itself.
func toolText(t policy.Tool, l policy.Lease) string {
	switch t {
	case policy.GitHubOIDC:
		return fmt.Sprintf("tokens of it are asked for as GitHub's are (%s), only for %s", t, l.Scope)
	case policy.AWSContainer:
		return "AWS's tools are given it where they ask in a container"
	}
	return fmt.Sprintf("%s finds it by itself", t)
}

// bounds is what else a request must be.
func bounds(r egress.Request) string {
	text := ""
	add := func(set bool, format string, args ...any) {
		if set {
			text += fmt.Sprintf(", "+format, args...)
		}
	}
	add(r.Query != nil, "query keys %q", r.Query)
	add(r.ContentTypes != nil, "content %s", strings.Join(r.ContentTypes, " or "))
	add(r.Sent > 0, "at most %d bytes sent", r.Sent)
	add(r.Received > 0, "at most %d bytes received", r.Received)
	add(r.Count > 0, "%d times", r.Count)
	add(r.Rate > 0, "%d a minute", r.Rate)
	add(r.WebSocket, "also as a WebSocket")
	return text
}

// session is what an SSH login is for.
func session(s *egress.Session) string {
	if s == nil {
		return ", and the job has a placeholder"
	}
	what := slices.Clone(s.Commands)
	if s.Shell {
		what = append(what, "a shell")
	}
	if s.SFTP {
		what = append(what, "sftp")
	}
	return " for " + strings.Join(what, ", ")
}

func onlyIn(step string) string {
	if step == "" {
		return ""
	}
	if step == policy.PullStep {
		return ", only to pull the image"
	}
	return ", only in step " + step
}
