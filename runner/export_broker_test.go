package runner

import "github.com/mayfly-ci/mayfly/creds"

// PlaceholderOf is for tests of placeholders.
func PlaceholderOf(value string) string { return placeholder(creds.NewSecret(value)) }
