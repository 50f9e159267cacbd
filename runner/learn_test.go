package runner_test

import (
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

const learningPolicy = `version: 1
rules:
  - {name: learns, match: {trust: local, workflow: new.yml}, mode: audit}
  - {name: all, match: {trust: local}}
`

// TestLearning: a job learns if its rule and the operator say so, and then every
// record of it says so too; if the operator does not it is refused, and no other
// job learns.
func TestLearning(t *testing.T) {
	t.Parallel()
	rules, err := policy.Parse([]byte(learningPolicy), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	private := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}
	for _, tt := range []struct {
		name, workflow string
		allows         func(string) bool
		want           providers.Conclusion
		learns         bool
	}{
		{"both say so", "new.yml", func(r string) bool { return r == "acme/app" }, providers.Success, true},
		{"the operator means another", "new.yml", func(r string) bool { return r == "acme/other" }, providers.Refused, false},
		{"the operator says nothing", "new.yml", nil, providers.Refused, false},
		{"the policy says nothing", "old.yml", func(string) bool { return true }, providers.Success, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			opened := map[string]egress.Opening{}
			tell := func(name string, o egress.Opening) {
				line := egress.Line{Gateway: name, Network: "tcp", Name: "new.example", Port: 8443, Protocol: egress.TLS, Verdict: egress.Learned}
				if o.Learn == nil {
					line.Verdict, line.Protocol, line.Reason = egress.Refused, "", "no rule"
				}
				if err := o.Ledger(line); err != nil {
					t.Error(err)
				}
			}
			j := job(providers.Step{Run: "print ran"})
			j.Subject.Workflow = tt.workflow
			w.offers <- j
			a := w.agent(func(c *runner.Config) {
				c.Policy, c.Learn = rules, runner.Learning{Allows: tt.allows, Private: private}
				c.Gateway = remembering{(*worldGateway)(w), &sync.Mutex{}, opened, tell}
			})
			ctx := lifetime(t)
			if err := a.Run(ctx, ctx); err != nil {
				t.Errorf("run: %v", err)
			}
			if r := <-w.results; r.Conclusion != tt.want {
				t.Fatalf("got %+v, want %s", r, tt.want)
			}
			for name, o := range opened {
				if got := o.Learn != nil && slices.Equal(o.Learn.Private, private); got != tt.learns {
					t.Errorf("gateway %s: learns is %v, want %v", name, got, tt.learns)
				}
			}
			marked := 0
			for _, e := range w.events {
				if e.Detail["mode"] == egress.ModeAudit {
					marked++
				}
			}
			refused := tt.want == providers.Refused // a decision about learning is marked as well
			if want := tt.learns || refused; (marked == len(w.events)) != want || !want && marked > 0 {
				t.Errorf("%d of %d events are marked, want all: %v", marked, len(w.events), want)
			}
			for _, text := range []string{
				"mayfly: mode audit: this job may reach names that no rule allows",
				"mayfly: learned: no rule allows this yet; a rule that would allow it: - {name: new.example, port: 8443, protocol: tls}\n",
			} {
				if strings.Contains(w.shown(), text) != tt.learns {
					t.Errorf("log: got %q, want %q in it: %v", w.shown(), text, tt.learns)
				}
			}
			w.clean()
		})
	}
}
