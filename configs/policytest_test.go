package configs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner/policy"
)

// TestExamplePolicyTest tries the examples' cases at the examples' policies, and
// every rule of them.
func TestExamplePolicyTest(t *testing.T) {
	t.Parallel()
	for file, test := range map[string]string{"policy.yaml": "policy-test.yaml", "policy-release.yaml": "policy-release-test.yaml"} {
		p := parsed(t, file)
		src, err := os.ReadFile(test)
		if err != nil {
			t.Fatal(err)
		}
		cases, err := policy.ParseCases(src, test)
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
}

func parsed(t *testing.T, file string) *policy.Policy {
	t.Helper()
	src, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Parse(src, file)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// TestForksGetNoCredential: no example gives a fork a lease, and none gives anything
// to a tier that the agent does not know.
func TestForksGetNoCredential(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("policy*.yaml")
	if err != nil || len(files) < 8 {
		t.Fatalf("got %d policies, %v", len(files), err)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "-test.yaml") {
			continue
		}
		p := parsed(t, file)
		for _, event := range []string{"push", "pull_request", "pull_request_target", "workflow_run", "release"} {
			for _, ref := range []string{"refs/heads/main", "refs/tags/v1.2.3", "refs/pull/1/head"} {
				j := providers.Job{Subject: creds.Subject{
					Origin:   creds.Origin{Actor: "mallory"},
					Provider: "gitea", Repository: "acme/app", Ref: ref, Event: event, Workflow: "release.yml", Job: "x",
					SHA: "0123456789abcdef0123456789abcdef01234567",
				}}
				j.Trust = providers.TrustFork
				if plan, err := p.Decide(j); err == nil && len(plan.Leases) > 0 {
					t.Errorf("%s: %s gives a fork %d leases on %s of %s", file, plan.Rule, len(plan.Leases), event, ref)
				}
				for _, tier := range []providers.Trust{"", "unknown", "*"} {
					j.Trust = tier
					if plan, err := p.Decide(j); err == nil {
						t.Errorf("%s: %s lets a job of tier %q run", file, plan.Rule, tier)
					}
				}
			}
		}
	}
}
