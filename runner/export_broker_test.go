package runner

import (
	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner/policy"
)

// PlaceholderOf is for tests of placeholders.
func PlaceholderOf(value string) string { return placeholder(creds.NewSecret(value)) }

// Deliver is what a plan makes of the provider's token, and by which ways out.
func Deliver(plan policy.Plan, homes ...string) ([]int, policy.Delivery) { return deliver(plan, homes) }
