package configs

import (
	"os"
	"testing"

	"github.com/mayfly-ci/mayfly/runner/policy"
)

// TestExampleIssuers: each issuer of the examples is in use, and each lease is of
// one. What the sections say, cmd/mayfly reads.
func TestExampleIssuers(t *testing.T) {
	t.Parallel()
	for _, file := range []string{"agent-issuers.yaml", "agent-vault.yaml", "agent-aws.yaml", "agent-githubapp.yaml", "agent-kubernetes.yaml"} {
		exampleIssuers(t, file)
	}
}

func exampleIssuers(t *testing.T, file string) {
	t.Helper()
	c, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	src, err := os.ReadFile(c.Policy)
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Parse(src, c.Policy)
	if err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{}
	for _, g := range p.Grants() {
		if used[g.Issuer] = true; c.Issuers[g.Issuer].Type == "" {
			t.Errorf("%s: lease %s: issuer %s is not of the example", file, g.Lease, g.Issuer)
		}
	}
	for name, section := range c.Issuers {
		if !used[name] && section.Type != "oidc" {
			t.Errorf("%s: issuer %s: no lease is of it", file, name)
		}
	}
}
