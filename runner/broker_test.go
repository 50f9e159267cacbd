package runner_test

import (
	"context"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

const brokerPolicy = `version: 1
rules:
  - name: all
    match: {trust: [local]}
    leases:
      - name: job
        issuer: pg
        env: {TOKEN: password, NAME: username}
        broker: [{name: api.example, port: 443, as: basic, value: password, user: username, requests: [{methods: [GET], path: "/{repository}/**"}]}]
      - name: deploy
        issuer: pg
        step: deploy
        uses: 2
        files: {deploy.key: password}
        broker: [{name: deploy.example, port: 443, as: header, header: x-token, value: password, foreign: strip, absent: pass}]
`

// observed is the gateway of a world, with all that was ever opened.
type observed struct {
	*worldGateway
	opened map[string]egress.Opening
}

func (g *observed) Open(ctx context.Context, name string, o egress.Opening) error {
	g.mu.Lock()
	g.opened[name[strings.LastIndex(name, "-")+1:]] = o
	g.mu.Unlock()
	return g.worldGateway.Open(ctx, name, o)
}

// TestBroker: the gateway has the credential and the job a placeholder, which is
// another one each time; the rules open behind the lease and close before it
// is revoked.
func TestBroker(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	g := &observed{(*worldGateway)(w), map[string]egress.Opening{}}
	r := w.run(lifetime(t), func(c *runner.Config) {
		withPolicy(t, brokerPolicy)(c)
		c.Gateway = g
	}, providers.Step{Run: "env TOKEN\nenv NAME"}, providers.Step{ID: "deploy", Run: "print two"}, providers.Step{Run: "print three"})
	if r.Conclusion != providers.Success {
		t.Fatalf("got %+v; log:\n%s", r, w.shown())
	}
	want := []string{
		"claim", "box.pull", "open", "box.create", "attach", "box.probe", "authority", "issue", "open", "box.run",
		"issue", "open", "box.run", "close", "revoke", "probe", "box.run", "box.probe",
		"close", "revoke", "probe", "box.destroy", "close", "log.close", "complete",
	}
	if got := w.happened(); !slices.Equal(got, want) {
		t.Errorf("order:\n got %v\nwant %v", got, want)
	}
	if got := g.opened["gw"].Terminate; !slices.Equal(got, []string{"api.example", "deploy.example"}) {
		t.Errorf("the authority is for %v", got)
	}
	for name, want := range map[string]egress.Injection{
		"job":    {Lease: "job", As: egress.Basic, User: "u"},
		"deploy": {Lease: "deploy", As: egress.Header, Name: "X-Token", Strip: true, Pass: true, Uses: 2},
	} {
		o := g.opened[name]
		if len(o.Rules.Allow) != 1 || o.Parent == "" || o.Rules.Allow[0].Inject == nil {
			t.Fatalf("lease %s: opened %+v", name, o)
		}
		in := *o.Rules.Allow[0].Inject
		value, place := in.Value.Reveal(), in.Placeholder
		if in.Value, in.Placeholder = want.Value, ""; in != want {
			t.Errorf("lease %s: got %+v, want %+v", name, in, want)
		}
		if !strings.HasPrefix(value, "pw-mf-") || len(place) != len(value) || strings.Contains(place, "pw-mf-") {
			t.Errorf("lease %s: placeholder %q of %q", name, place, value)
		}
		shown := w.shown()
		if name == "deploy" {
			shown = strings.Join(w.deploy, "\n")
		}
		if !strings.Contains(shown, place+"\n") {
			t.Errorf("lease %s: the job has %q, want the placeholder %s", name, shown, place)
		}
	}
	if q := g.opened["job"].Rules.Allow[0].Requests; len(q) != 1 || q[0].Path != "/acme/app/**" {
		t.Errorf("requests of the job's rule: %+v", q)
	}
	if f := w.deploy; len(f) != 3 || f[0] != "" || f[1] == "" || f[2] != "" {
		t.Errorf("the file of the step's placeholder when each step ran: %q", f)
	}
	w.clean()
}

// TestBrokerFails: what fails around the rules fails the job, and leaves nothing.
func TestBrokerFails(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(string) string{
		"a value that is not issued": func(s string) string { return strings.Replace(s, "value: password", "value: token", 1) },
		"a user that is not issued":  func(s string) string { return strings.Replace(s, "user: username", "user: login", 1) },
		"the value in another field": func(s string) string {
			return strings.Replace(s, "TOKEN: password, NAME: username", "TOKEN: dsn", 1)
		},
		"uses of a lease of which the job has a part": func(s string) string {
			s = strings.Replace(s, "as: basic, value: password", "as: basic, value: dsn", 1)
			return strings.Replace(s, "issuer: pg", "issuer: pg\n        uses: 9", 1)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			text := change(brokerPolicy)
			r := w.run(lifetime(t), func(c *runner.Config) {
				withPolicy(t, text)(c)
				c.Issuers = map[string]creds.Issuer{"pg": withDSN{(*worldIssuer)(w)}}
			}, providers.Step{Run: "print one"})
			if r.Conclusion == providers.Success || strings.Contains(r.Reason, "pw-mf-") || strings.Contains(w.shown(), "one") {
				t.Errorf("got %+v; log:\n%s", r, w.shown())
			}
			w.clean()
		})
	}
}

// TestBrokerKey: the job has placeholders of all parts of a key of AWS, one of
// which is a fact.
func TestBrokerKey(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	g := &observed{(*worldGateway)(w), map[string]egress.Opening{}}
	r := w.run(lifetime(t), func(c *runner.Config) {
		withPolicy(t, strings.Replace(brokerPolicy, "as: basic, value: password, user: username,",
			"as: aws-sigv4, value: password, with: {key_id: username, session: dsn, regions: [r], services: [s3]},", 1))(c)
		c.Issuers, c.Gateway = map[string]creds.Issuer{"pg": withDSN{(*worldIssuer)(w)}}, g
	}, providers.Step{Run: "env NAME\nenv TOKEN"})
	if r.Conclusion != providers.Success {
		t.Fatalf("got %+v; log:\n%s", r, w.shown())
	}
	in := *g.opened["job"].Rules.Allow[0].Inject
	s := *in.Signing
	if s.KeyID.Reveal() != "u" || !strings.HasPrefix(s.Session.Reveal(), "postgres://u:pw-") || s.PlaceSession == "" || s.PlaceID == "" || s.Regions[0] != "r" {
		t.Errorf("the gateway has %+v", s)
	}
	if got := w.shown(); got != s.PlaceID+"\n"+in.Placeholder+"\n" {
		t.Errorf("the job has %q", got)
	}
	w.clean()
}

// TestBrokerCertificate: the gateway has a certificate and its key.
func TestBrokerCertificate(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	g := &observed{(*worldGateway)(w), map[string]egress.Opening{}}
	r := w.run(lifetime(t), func(c *runner.Config) {
		withPolicy(t, strings.Replace(brokerPolicy, "as: basic, value: password, user: username,",
			"as: client-certificate, value: password, with: {certificate: username},", 1))(c)
		c.Gateway = g
	}, providers.Step{Run: "env TOKEN"})
	if r.Conclusion != providers.Success {
		t.Fatalf("got %+v; log:\n%s", r, w.shown())
	}
	in := *g.opened["job"].Rules.Allow[0].Inject
	if in.Chain != "u" || !strings.HasPrefix(in.Value.Reveal(), "pw-mf-") || strings.Contains(w.shown(), "pw-mf-") {
		t.Errorf("the gateway has the chain %q", in.Chain)
	}
	w.clean()
}

// withDSN is an issuer that gives its password twice.
type withDSN struct{ *worldIssuer }

func (i withDSN) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	l, err := i.worldIssuer.Issue(ctx, name, g)
	l.Values["dsn"] = creds.NewSecret("postgres://u:" + l.Values["password"].Reveal() + "@h/db")
	return l, err
}

// TestPlaceholder: programs take a placeholder for what it stands for.
func TestPlaceholder(t *testing.T) {
	t.Parallel()
	for value, pattern := range map[string]string{
		"ghp_16C7e42F292c6912E7710c838347Ae178B4a": `^ghp_[0-9][0-9][A-Z][0-9][a-z][A-Za-z0-9]{31}$`,
		"glpat-Ab3_xY-9z1QwErTy0Zx7":               `^glpat-[A-Z][a-z][0-9]_[a-z][A-Z]-[0-9][a-z][0-9][A-Za-z0-9]{10}$`,
		"AKIAIOSFODNN7EXAMPLE":                     `^AKIA[A-Z]{8}\d[A-Z]{7}$`,
		"3f2504e04f8911d39a0c0305e82c3301aabbccdd": `^[0-9a-f]{40}$`,
		"3f2504e0-4f89-11d3-9a0c-0305e82c3301":     `^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`,
		"short-1":                                  `^[a-z]{5}-\d[a-z0-9]{10}$`,
	} {
		a, b := runner.PlaceholderOf(value), runner.PlaceholderOf(value)
		if ok := regexp.MustCompile(pattern).MatchString(a); !ok || a == value || a == b {
			t.Errorf("%s: got %s and %s, want what %s matches", value, a, b, pattern)
		}
	}
}

// TestBrokerInThePolicy: what it says is in the plan, and warned of.
func TestBrokerInThePolicy(t *testing.T) {
	t.Parallel()
	p, err := policy.Parse([]byte(strings.Replace(brokerPolicy, "issuer: pg", "issuer: pg\n        clear: [password]", 1)), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if got := p.Warnings(); len(got) != 1 || !strings.Contains(got[0], "lease job: password is brokered, and the job gets it in clear") {
		t.Errorf("warnings: %q", got)
	}
	w := newWorld(t)
	w.run(lifetime(t), func(c *runner.Config) { c.Policy = p }, providers.Step{Run: "env TOKEN"})
	if got := w.shown(); got != "***\n" {
		t.Errorf("in clear, and so masked: got %q", got)
	}
}
