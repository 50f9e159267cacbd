package egresstest_test

import (
	"context"
	"errors"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// httpsMutants are broken in what they do about requests.
func httpsMutants() map[string]mutation {
	requests := func(change func(*egress.Request)) mutation {
		return of(each(func(r *egress.Rule) {
			r.Requests = append([]egress.Request(nil), r.Requests...)
			for i := range r.Requests {
				change(&r.Requests[i])
			}
		}))
	}
	return map[string]mutation{
		"https: requests pass under the job's authority, each with two lines": of(lines(func(next egress.Ledger, l egress.Line) error {
			if l.Verdict == egress.Ended {
				return nil
			}
			return next(l)
		})),
		"https: server name and host are the rule's, of each request": unchecked(egress.HTTPS),
		"https: the destination owns its name":                        unchecked(egress.HTTPS),
		"an authority is one job's, for its names and its time": of(broken{open: func(next egress.Gateway, name string, o egress.Opening) error {
			o.Expires = time.Time{}
			return next.Open(context.Background(), name, o)
		}}),
		"a child terminates only what the authority was made for": of(broken{open: func(next egress.Gateway, name string, o egress.Opening) error {
			if err := next.Open(context.Background(), name, o); !errors.Is(err, egress.ErrBadRules) {
				return err
			}
			return nil
		}}),
		"requests: what none of them allows does not arrive": requests(func(r *egress.Request) { r.Query, r.ContentTypes = nil, nil }),
		"requests: a child's rules are for its requests alone": of(broken{close: func(ctx context.Context, next egress.Gateway, name string) error {
			if name == "job-1-step-1" {
				return nil
			}
			return next.Close(ctx, name)
		}}),
		"requests: bounds hold":                      requests(func(r *egress.Request) { r.Sent = 0 }),
		"an upgrade passes only where the rule says": requests(func(r *egress.Request) { r.WebSocket = true }),
		"a wildcard spans one label":                 of(adds("a.b.web.example", 443)),
		"inject: the destination gets the credential, and the box never has it": of(each(func(r *egress.Rule) {
			if r.Inject != nil {
				in := *r.Inject
				in.Strip = true
				r.Inject = &in
			}
		})),
		"inject: a placeholder elsewhere is refused, also when its rule is gone": of(broken{open: func(next egress.Gateway, name string, o egress.Opening) error {
			if name == "job-1-lease" {
				return nil
			}
			return next.Open(context.Background(), name, o)
		}}),
		"no line holds a path that may be secret, or a query": of(lines(func(next egress.Ledger, l egress.Line) error {
			if l.Request.Method != "" {
				l.Reason = "GET /hooks/T0123456789SECRET"
			}
			return next(l)
		})),
	}
}
