package main

import (
	"fmt"

	"github.com/mayfly-ci/mayfly/configs"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/gvisor"
	"github.com/mayfly-ci/mayfly/sandbox/native"
)

// A gvisorNode is "gvisor" in the section of a native runtime; nil is none.
type gvisorNode struct {
	Runsc    string `yaml:"runsc,required"`
	Platform string `yaml:"platform"`
}

func (n *gvisorNode) config(section configs.Section) (gvisor.Config, error) {
	if n == nil {
		return gvisor.Config{}, nil
	}
	g := gvisor.Config{Runsc: n.Runsc, Platform: n.Platform}
	if err := g.Validate(); err != nil {
		return g, section.Errorf("gvisor", "%w", err)
	}
	return g, nil
}

// checkIsolation looks whether boxes of a runtime can have the wall that a rule
// asks for.
func checkIsolation(p policy.Place, section configs.Section) error {
	if p.Isolation == sandbox.Kernel {
		return nil
	}
	c, err := runtimeConfig(section, false)
	if own, ok := c.(native.Config); err == nil && ok && own.GVisor.Runsc != "" {
		return nil
	}
	return fmt.Errorf("%s: isolation %s: runtime %q has none: add gvisor: {runsc: /path} to its section, which must be of type native", p.Rule, p.Isolation, p.Runtime)
}
