package main

import (
	"fmt"

	"github.com/mayfly-ci/mayfly/configs"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/containerd"
	"github.com/mayfly-ci/mayfly/sandbox/docker"
	"github.com/mayfly-ci/mayfly/sandbox/gvisor"
	"github.com/mayfly-ci/mayfly/sandbox/native"
)

// A gvisorNode is "gvisor" in the section of a runtime; nil is none.
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
	if err != nil {
		return nil // it is said where the runtimes are made
	}
	var kernel gvisor.Config
	switch c := c.(type) {
	case native.Config:
		kernel = c.GVisor
	case docker.Config:
		kernel = c.GVisor
	case containerd.Config:
		kernel = c.GVisor
	}
	if kernel.Runsc == "" {
		return fmt.Errorf("%s: isolation %s: runtime %q has none: add gvisor: {runsc: /path} to its section", p.Rule, p.Isolation, p.Runtime)
	}
	return nil
}
