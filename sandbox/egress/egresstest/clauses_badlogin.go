package egresstest

import (
	"context"
	"errors"
	"fmt"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

func badLogins(b *bench) error {
	r, err := b.git("a")
	if err != nil {
		return err
	}
	db, _, n, err := b.database()
	if err != nil {
		return err
	}
	bad := map[string]egress.Rule{"no lease": rule("git.example", 22, egress.SSH), "no lease, postgres": rule("db.example", 5432, egress.Postgres)}
	change := func(what string, r egress.Rule, f func(r *egress.Rule, in *egress.Injection, s *egress.Session)) {
		in, s := *r.Inject, egress.Session{}
		r.Inject = &in
		if r.Session != nil {
			s = *r.Session
			r.Session = &s
		}
		f(&r, &in, &s)
		bad[what] = r
	}
	change("no host key", r, func(_ *egress.Rule, _ *egress.Injection, s *egress.Session) { s.HostKeys = nil })
	change("a bad host key", r, func(_ *egress.Rule, _ *egress.Injection, s *egress.Session) {
		s.HostKeys = []string{"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5"}
	})
	change("nothing allowed", r, func(_ *egress.Rule, _ *egress.Injection, s *egress.Session) { s.Commands = nil })
	change("a bad command", r, func(_ *egress.Rule, _ *egress.Injection, s *egress.Session) { s.Commands = []string{"a;b"} })
	change("a wildcard", r, func(r *egress.Rule, _ *egress.Injection, _ *egress.Session) { r.Name = "*.git.example" })
	change("a certificate for ssh", r, func(r *egress.Rule, _ *egress.Injection, _ *egress.Session) { r.CA = n.pem })
	change("no user", r, func(_ *egress.Rule, in *egress.Injection, _ *egress.Session) { in.User = "" })
	change("no key", r, func(_ *egress.Rule, in *egress.Injection, _ *egress.Session) { in.Value = db.Inject.Value })
	change("no session", r, func(r *egress.Rule, _ *egress.Injection, _ *egress.Session) { r.Session = nil })
	change("a session of postgres", db, func(x *egress.Rule, _ *egress.Injection, _ *egress.Session) { x.Session = r.Session })
	change("no database", db, func(_ *egress.Rule, in *egress.Injection, _ *egress.Session) { in.Name = "" })
	change("no placeholder", db, func(_ *egress.Rule, in *egress.Injection, _ *egress.Session) { in.Placeholder = "" })
	change("requests", db, func(r *egress.Rule, _ *egress.Injection, _ *egress.Session) {
		r.Requests = []egress.Request{{Methods: []string{"GET"}, Path: "/"}}
	})
	ledger := b.newLedger()
	for what, r := range bad {
		err := b.gateway.Open(context.Background(), "job-1", egress.Opening{Rules: egress.Rules{Allow: []egress.Rule{r}}, Ledger: ledger.write})
		if !errors.Is(err, egress.ErrBadRules) {
			return fmt.Errorf("%s: Open: got %v, want ErrBadRules", what, err)
		}
	}
	return nil
}
