package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/mayfly-ci/mayfly/configs"
	"github.com/mayfly-ci/mayfly/runner/policy"
)

// tried is what became of a file of tests.
type tried struct {
	Policy string           `json:"policy"` // its digest
	Cases  []policy.Verdict `json:"cases"`
	Failed int              `json:"failed"`
	// Untested are the rules that decided about no case.
	Untested []string `json:"untested,omitempty"`
}

// testPolicy is "mayfly policy test FILE".
func (c *call) testPolicy() error {
	var path string
	o, err := c.flags("policy", 2, func(fs *flag.FlagSet) {
		fs.StringVar(&path, "policy", "", "policy file (default: the one of the configuration)")
	})
	if err != nil {
		return err
	}
	if len(o.args) != 2 {
		return usageError("want: mayfly policy test FILE [--policy FILE]")
	}
	rules, err := policyOf(o, path)
	if err != nil {
		return exitError{exitUsage, err}
	}
	t, err := tryAll(rules, o.args[1])
	if err != nil {
		return exitError{exitUsage, err}
	}
	if err := c.print(o, t, t.text()); err != nil {
		return err
	}
	if t.Failed > 0 {
		return exitError{exitNo, nil}
	}
	return nil
}

// policyOf is the policy that a flag names, or the one of the configuration.
func policyOf(o *options, path string) (*policy.Policy, error) {
	if path == "" {
		cfg, err := configs.Load(o.config)
		if err != nil {
			return nil, err
		}
		path = cfg.Policy
	}
	return readPolicy(path)
}

// tryAll tries every case of a file. What a case names lies beside the file.
func tryAll(rules *policy.Policy, path string) (*tried, error) {
	src, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	cases, err := policy.ParseCases(src, path)
	if err != nil {
		return nil, err
	}
	t := &tried{Policy: rules.Digest(), Untested: rules.Rules()}
	for _, one := range cases {
		var narrow []byte
		if one.Narrow != "" {
			if narrow, err = os.ReadFile(beside(path, one.Narrow)); err != nil {
				return nil, fmt.Errorf("%s: narrow: %w", one.At, err)
			}
		}
		v := rules.Try(one, narrow)
		if !v.OK {
			t.Failed++
		}
		t.Cases = append(t.Cases, v)
		t.Untested = slices.DeleteFunc(t.Untested, func(rule string) bool { return rule == v.Rule })
	}
	return t, nil
}

// beside is a path that a file names.
func beside(file, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(filepath.Dir(file), path)
}

// text is one line for each case, and what differs.
func (t *tried) text() string {
	var b strings.Builder
	for _, v := range t.Cases {
		if v.OK {
			fmt.Fprintf(&b, "ok    %s\n", v.Name)
			continue
		}
		fmt.Fprintf(&b, "FAIL  %s  (%s)\n", v.Name, v.At)
		for _, d := range v.Differences {
			fmt.Fprintf(&b, "      %s\n", d)
		}
	}
	for _, rule := range t.Untested {
		fmt.Fprintf(&b, "note  no case is for %s\n", rule)
	}
	fmt.Fprintf(&b, "%d cases, %d failed\n", len(t.Cases), t.Failed)
	return b.String()
}
