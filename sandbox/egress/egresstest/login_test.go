package egresstest_test

import (
	"context"
	"errors"
	"slices"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
)

// loginMutants are broken in what they do about logins.
func loginMutants() map[string]mutation {
	sessions := func(change func(all []egress.Rule, s *egress.Session)) mutation {
		return of(rules(func(all []egress.Rule) []egress.Rule {
			for i, r := range all {
				if r.Session != nil {
					s := *r.Session
					change(all, &s)
					all[i].Session = &s
				}
			}
			return all
		}))
	}
	withoutEnd := of(lines(func(next egress.Ledger, l egress.Line) error {
		if l.Verdict == egress.Ended {
			return nil
		}
		return next(l)
	}))
	return map[string]mutation{
		"ssh: a command runs with the lease's key, with two lines": withoutEnd,
		"ssh: what no rule allows does not arrive":                 sessions(func(_ []egress.Rule, s *egress.Session) { s.Commands = []string{"*"} }),
		"ssh: the destination has a host key of its rule": sessions(func(all []egress.Rule, s *egress.Session) {
			for _, r := range all {
				s.HostKeys = append(slices.Clone(s.HostKeys), r.Session.HostKeys...)
			}
		}),
		"ssh: two rules of one host have their own keys": of(rules(func(all []egress.Rule) []egress.Rule {
			for i := range all {
				all[i].Inject = all[0].Inject
			}
			return all
		})),
		"ssh: a child's commands end with it": of(broken{close: func(ctx context.Context, next egress.Gateway, name string) error {
			if name == "job-1-step-1" {
				return nil
			}
			return next.Close(ctx, name)
		}}),
		"the host key of a box is its own": func(c *gateway.Config) broken {
			return broken{hostKey: func(next egress.Host, _ string) ([]byte, error) { return next.HostKey("job-1") }}
		},
		"postgres: a session begins with the placeholder, with two lines": withoutEnd,
		"postgres: user, database and password are the lease's": of(rules(func(all []egress.Rule) []egress.Rule {
			for _, r := range all {
				in := *r.Inject
				in.User, r.Inject = "postgres", &in
				all = append(all, r)
			}
			return all
		})),
		"postgres: the destination owns its name": of(rules(func(all []egress.Rule) []egress.Rule {
			together := ""
			for _, r := range all {
				together += r.CA
			}
			for i := range all {
				all[i].CA = together
			}
			return all
		})),
		"https: a credential is given away as often as it has uses": of(each(anyUses)),
		"a login is made as often as its lease has uses":            of(each(anyUses)),
		"postgres: a session is cancelled by its own box": of(each(func(r *egress.Rule) {
			r.Protocol, r.CA, r.Inject = egress.TCP, "", nil
		})),
		"a login without a lease, or a host key, is refused": of(broken{open: func(next egress.Gateway, name string, o egress.Opening) error {
			if err := next.Open(context.Background(), name, o); !errors.Is(err, egress.ErrBadRules) {
				return err
			}
			return nil
		}}),
	}
}

// anyUses forgets how often a credential may be used.
func anyUses(r *egress.Rule) {
	if r.Inject != nil {
		in := *r.Inject
		in.Uses, r.Inject = 0, &in
	}
}
