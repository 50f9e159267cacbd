package runner

import (
	"context"
	"fmt"
	"maps"
	"net"
	"net/url"
	"slices"
	"strings"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// The token that the provider gave the job with its payload, as GITHUB_TOKEN is
// one. The agent uses it for what it does for the job itself; the job has a
// placeholder, which the gateway replaces on the way to the provider's host.

// tokenLease is what the ledger calls the token. No lease of a policy has the
// name.
const tokenLease = "(token)"

// payload makes ready what came with the job: the git objects that the agent
// fetches for it, and then what the job itself has of its token. It returns the
// plan with the ways out on which the gateway adds the token.
func (l *life) payload(ctx context.Context, plan policy.Plan) (policy.Plan, error) {
	if err := l.objects(ctx); err != nil {
		return plan, err
	}
	sourcer, ok := l.provider.(providers.Sourcer)
	if !ok {
		return plan, nil
	}
	source, err := sourcer.Source(l.job)
	if err != nil || source.Token.IsZero() {
		return plan, nil // as without a token: nothing is to be hidden
	}
	rules, how := deliver(plan, l.homes(source))
	stand := creds.Secret{}
	switch how {
	case policy.Brokered:
		stand = creds.NewSecret(placeholder(source.Token))
		plan.Egress = withToken(plan.Egress, rules, source.Token, stand)
		if err := l.out.conceal(map[string]creds.Secret{tokenLease: stand}); err != nil {
			return plan, err
		}
		l.replace(source.Token, stand)
	case policy.Withheld:
		l.replace(source.Token, stand)
	}
	s := l.job.Subject
	err = l.audit(ctx, l.log.Job, "token.deliver", s.Repository, nil, "provider", l.turn.provider, "how", string(how), "rule", plan.Rule)
	if err != nil {
		return plan, fmt.Errorf("token of the job: %w", err)
	}
	return plan, nil
}

// homes are where the token is good, as "host:port": what the agent was told of
// the provider, and what the provider says of itself.
func (l *life) homes(source providers.Source) []string {
	github, _ := l.job.Contexts["github"].(map[string]any)
	var all []string
	for _, text := range []any{source.URL, github["server_url"], github["api_url"]} {
		s, _ := text.(string)
		u, err := url.Parse(s)
		if err != nil || u.Hostname() == "" {
			continue
		}
		port := u.Port()
		if port == "" {
			port = map[string]string{"https": "443", "http": "80"}[u.Scheme]
		}
		all = append(all, net.JoinHostPort(strings.ToLower(u.Hostname()), port))
	}
	return all
}

// deliver finds the ways out to the provider, and what becomes of the token:
// where the plan does not say, it is brokered unless the job could not use it
// then.
func deliver(plan policy.Plan, homes []string) (rules []int, how policy.Delivery) {
	how = plan.Token
	for i, e := range plan.Egress {
		if e.Service != "" || !slices.Contains(homes, net.JoinHostPort(e.Rule.Name, fmt.Sprint(e.Rule.Port))) {
			continue
		}
		if e.Rule.Protocol == egress.HTTPS {
			rules = append(rules, i)
		} else if how == "" {
			how = policy.Clear
		}
	}
	if how == "" {
		how = policy.Brokered
	}
	return rules, how
}

// withToken has, for each of the rules, two that put the token where the job wrote
// its placeholder: git writes it as a password, programs that use an API as a
// token. What has none passes as it is, and what has another one does not.
func withToken(all []policy.Egress, rules []int, token, stand creds.Secret) []policy.Egress {
	var out []policy.Egress
	for i, e := range all {
		if !slices.Contains(rules, i) {
			out = append(out, e)
			continue
		}
		for _, as := range []egress.Place{egress.Basic, egress.Bearer} {
			e.Rule.Inject = &egress.Injection{Lease: tokenLease, As: as, Value: token, Placeholder: stand.Reveal(), Pass: true}
			out = append(out, e)
		}
	}
	return out
}

// replace puts stand, or nothing, where the job has the token: among its secrets,
// in its context, and in the variables of its containers, which were evaluated
// when images were asked for.
func (l *life) replace(token, stand creds.Secret) {
	real, place := token.Reveal(), stand.Reveal()
	l.job.Secrets = maps.Clone(l.job.Secrets)
	for name, v := range l.job.Secrets {
		switch {
		case v.Reveal() != real:
		case place == "":
			delete(l.job.Secrets, name)
		default:
			l.job.Secrets[name] = stand
		}
	}
	l.job.Contexts = maps.Clone(l.job.Contexts)
	if github, ok := l.job.Contexts["github"].(map[string]any); ok {
		github = maps.Clone(github)
		if _, ok := github["token"]; ok {
			github["token"] = stand
		}
		l.job.Contexts["github"] = github
	}
	in := func(env map[string]string) {
		for k, v := range env {
			env[k] = strings.ReplaceAll(v, real, place)
		}
	}
	if l.own != nil {
		in(l.own.Env)
		in(l.own.Options.Env)
	}
	for _, s := range l.services {
		in(s.Env)
		in(s.Options.Env)
		s.Options.Health.Command = strings.ReplaceAll(s.Options.Health.Command, real, place)
	}
}
