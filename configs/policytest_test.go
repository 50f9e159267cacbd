package configs

import (
	"os"
	"testing"

	"github.com/mayfly-ci/mayfly/runner/policy"
)

// TestExamplePolicyTest tries the example's cases at the example's policy, and
// every rule of it.
func TestExamplePolicyTest(t *testing.T) {
	t.Parallel()
	src, err := os.ReadFile("policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Parse(src, "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if src, err = os.ReadFile("policy-test.yaml"); err != nil {
		t.Fatal(err)
	}
	cases, err := policy.ParseCases(src, "policy-test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	tried := map[string]bool{}
	for _, c := range cases {
		v := p.Try(c, nil)
		if !v.OK {
			t.Errorf("%s %s: %q", v.At, v.Name, v.Differences)
		}
		tried[v.Rule] = true
	}
	for _, rule := range p.Rules() {
		if !tried[rule] {
			t.Errorf("no case is for %s", rule)
		}
	}
}
