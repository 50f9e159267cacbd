package runner

import (
	"net/http"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner/policy"
)

// PlaceholderOf is for tests of placeholders.
func PlaceholderOf(value string) string { return placeholder(creds.NewSecret(value)) }

// Deliver is what a plan makes of the provider's token, and by which ways out.
func Deliver(plan policy.Plan, homes ...string) ([]int, policy.Delivery) { return deliver(plan, homes) }

// NewDoor is what answers the programs of a lease that asks for identity tokens.
func NewDoor(asker creds.Asker, lease string, token creds.Secret, conceal func(creds.Secret), record func(err error, detail []string) error) http.Handler {
	give := askFor(asker, lease, conceal, func(s string) string { return s })
	return &door{path: oidcPath, scheme: "Bearer", token: token, give: give, record: record}
}
