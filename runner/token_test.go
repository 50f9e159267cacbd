package runner_test

import (
	"slices"
	"testing"

	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// TestDeliver: the provider's token is brokered, unless the job reaches the
// provider where the gateway cannot add it, or the policy says otherwise.
func TestDeliver(t *testing.T) {
	t.Parallel()
	way := func(name string, port uint16, p egress.Protocol) policy.Egress {
		return policy.Egress{Rule: egress.Rule{Name: name, Port: port, Protocol: p}}
	}
	service := way("git.example", 443, egress.TLS)
	service.Service = "db"
	for name, tt := range map[string]struct {
		plan  policy.Plan
		rules []int
		how   policy.Delivery
	}{
		"no way":            {policy.Plan{}, nil, policy.Brokered},
		"a way seen into":   {policy.Plan{Egress: []policy.Egress{way("x.example", 443, egress.HTTPS), way("git.example", 443, egress.HTTPS)}}, []int{1}, policy.Brokered},
		"another port":      {policy.Plan{Egress: []policy.Egress{way("git.example", 8443, egress.HTTPS)}}, nil, policy.Brokered},
		"a closed one":      {policy.Plan{Egress: []policy.Egress{way("git.example", 443, egress.TLS)}}, nil, policy.Clear},
		"a service's":       {policy.Plan{Egress: []policy.Egress{service}}, nil, policy.Brokered},
		"closed, and asked": {policy.Plan{Options: policy.Options{Token: policy.Brokered}, Egress: []policy.Egress{way("git.example", 443, egress.TLS)}}, nil, policy.Brokered},
		"in clear":          {policy.Plan{Options: policy.Options{Token: policy.Clear}, Egress: []policy.Egress{way("git.example", 443, egress.HTTPS)}}, []int{0}, policy.Clear},
		"withheld":          {policy.Plan{Options: policy.Options{Token: policy.Withheld}}, nil, policy.Withheld},
	} {
		rules, how := runner.Deliver(tt.plan, "git.example:443")
		if !slices.Equal(rules, tt.rules) || how != tt.how {
			t.Errorf("%s: got %v %s, want %v %s", name, rules, how, tt.rules, tt.how)
		}
	}
}
