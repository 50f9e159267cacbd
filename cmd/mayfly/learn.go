package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/mayfly-ci/mayfly/configs"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
)

// gatewaySection is the key "gateway" of the configuration.
type gatewaySection struct {
	Names int `yaml:"names"`
	Conns int `yaml:"connections"`
	Learn *struct {
		Repositories []string `yaml:"repositories,required"`
		Private      []string `yaml:"private"`
	} `yaml:"learn"`
}

func gatewayConfig(section configs.Section) (gateway.Config, error) {
	var own gatewaySection
	err := section.Decode(&own)
	return gateway.Config{Names: own.Names, Conns: own.Conns}, err
}

// learningOf is for which jobs the configuration allows mode: audit.
func learningOf(section configs.Section) (runner.Learning, error) {
	var own gatewaySection
	if err := section.Decode(&own); err != nil || own.Learn == nil {
		return runner.Learning{}, err
	}
	var errs []error
	var l runner.Learning
	var patterns []policy.Pattern
	if len(own.Learn.Repositories) == 0 {
		errs = append(errs, section.Errorf("learn", "no repositories: name those whose jobs may learn, or remove the key"))
	}
	for _, text := range own.Learn.Repositories {
		p, err := policy.ParsePattern(text)
		if err != nil {
			errs = append(errs, section.Errorf("learn", "repositories: %w", err))
		}
		patterns = append(patterns, p)
	}
	for _, text := range own.Learn.Private {
		p, err := netip.ParsePrefix(text)
		if a, aerr := netip.ParseAddr(text); aerr == nil {
			p, err = netip.PrefixFrom(a, a.BitLen()), nil
		}
		if err != nil || p.Addr().Is4In6() {
			errs = append(errs, section.Errorf("learn", "private: %q is not an address or a prefix, such as 10.0.0.0/8", text))
		}
		l.Private = append(l.Private, p.Masked())
	}
	l.Allows = func(repository string) bool {
		for _, p := range patterns {
			if p.Match(repository) {
				return true
			}
		}
		return false
	}
	return l, errors.Join(errs...)
}

// checkLearning refuses rules under which no job would run.
func (w *wiring) checkLearning(rules *policy.Policy) error {
	l, err := learningOf(w.config.Gateway)
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range rules.Places() {
		if p.Learns && l.Allows == nil {
			errs = append(errs, fmt.Errorf("%s: mode: audit: the configuration lets no job learn: add its repository to gateway: learn: repositories, or remove the mode", p.Rule))
		}
	}
	return errors.Join(errs...)
}

// learningRules are those that open every name to their jobs.
func learningRules(rules *policy.Policy) []string {
	var all []string
	for _, p := range rules.Places() {
		if p.Learns {
			all = append(all, p.Rule)
		}
	}
	return all
}

// examineLearning warns of what is not enforced.
func (w *wiring) examineLearning() []finding {
	f := finding{"gateway", "enforcement", stateOK, "what no rule allows is refused, for every job"}
	l, err := learningOf(w.config.Gateway)
	rules := learningRules(w.agent.Policy)
	switch {
	case err != nil:
		f.State, f.Detail = stateMissing, err.Error()
	case len(rules) > 0:
		f.State = stateMissing
		f.Detail = "mode: audit in " + strings.Join(rules, ", ") + ": jobs of these rules reach every name; mayfly policy suggest JOB makes rules of what they reached"
	case l.Allows != nil:
		f.Detail += "; the configuration would allow rules with mode: audit (gateway: learn)"
	}
	return []finding{f}
}
