package egresstest_test

import (
	"context"
	"errors"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// serveMutants are broken in what they do about the agent's own names.
func serveMutants() map[string]mutation {
	return map[string]mutation{
		"a served name is answered in its box, with two lines": of(lines(func(next egress.Ledger, l egress.Line) error {
			if l.Verdict == egress.Ended {
				l.Request.Status = 0
			}
			return next(l)
		})),
		"a served name goes with what opened it": of(broken{close: func(ctx context.Context, next egress.Gateway, name string) error {
			if name == "job-1-step-1" {
				return nil
			}
			return next.Close(ctx, name)
		}}),
		"a served name is opened by no rule": of(broken{open: func(next egress.Gateway, name string, o egress.Opening) error {
			if err := next.Open(context.Background(), name, o); !errors.Is(err, egress.ErrBadRules) {
				return err
			}
			return nil
		}}),
	}
}
