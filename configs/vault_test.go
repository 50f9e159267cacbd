package configs

import (
	"os"
	"testing"

	"github.com/mayfly-ci/mayfly/runner/policy"
)

// TestExampleVault: the leases of the policy are of an issuer that is there.
// What its section says, cmd/mayfly reads.
func TestExampleVault(t *testing.T) {
	t.Parallel()
	c, err := Load("agent-vault.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if c.Issuers["identity"].Type != "oidc" || c.Issuers["bao"].Type != "vault" {
		t.Errorf("issuers: got %+v", c.Issuers)
	}
	src, err := os.ReadFile(c.Policy)
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Parse(src, c.Policy)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Grants()) != 3 {
		t.Errorf("grants: got %+v, want 3", p.Grants())
	}
	for _, g := range p.Grants() {
		if c.Issuers[g.Issuer].Type != "vault" {
			t.Errorf("lease %s: issuer %s is not of the example", g.Lease, g.Issuer)
		}
	}
}
