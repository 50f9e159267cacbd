package policy

import (
	"fmt"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

func suggested() providers.Job {
	return providers.Job{Trust: providers.TrustBranch, Subject: creds.Subject{
		Provider: "gitea", Repository: "acme/app", Ref: "refs/heads/main", Event: "push", Workflow: "ci.yml",
	}}
}

// TestSuggestion: what a job did becomes the least policy that lets it do so.
func TestSuggestion(t *testing.T) {
	t.Parallel()
	got, err := Suggest(suggested(), []Use{
		{Name: "git.example", Port: 443, Protocol: egress.HTTPS, Verdict: egress.Learned, Step: "fetch", Method: "GET", Path: "/acme/app.git/info/refs", Executable: "/usr/bin/git"},
		{Name: "git.example", Port: 443, Protocol: egress.HTTPS, Verdict: egress.Learned, Step: "fetch", Method: "POST", Path: "/api/acme/app/x"},
		{Name: "git.example", Port: 443, Protocol: egress.HTTPS, Verdict: egress.Ended, Step: "fetch", Method: "POST", Path: "/api/acme/app/x"},
		{Name: "git.example", Port: 443, Protocol: egress.HTTPS, Verdict: egress.Learned, Step: "fetch", Method: "GET", Path: "/api/acme/app/x"},
		{Name: "git.example", Port: 443, Protocol: egress.HTTPS, Verdict: egress.Ended, Method: "GET", Path: "/api/acme/app/x", WebSocket: true},
		{Name: "db.corp", Port: 5432, Protocol: egress.TCP, Verdict: egress.Learned, Step: "__2", Dialled: "10.0.0.7:5432"},
		{Name: "proxy.example", Port: 443, Protocol: egress.TLS, Verdict: egress.Allowed, Rule: "policy.yaml:7", Step: "a"},
		{Name: "proxy.example", Port: 443, Protocol: egress.TLS, Verdict: egress.Allowed, Rule: "policy.yaml:7", Step: "b"},
		{Name: "new.example", Verdict: egress.Refused, Reason: "no rule allows this name", Step: "b"},
		{Name: "proxy.example", Verdict: egress.Refused, Reason: "no rule allows this name"},
		{Name: "mirror.example", Port: 80, Verdict: egress.Refused, Reason: "no rule for port 80 of this name", Service: "db"},
	})
	if err != nil {
		t.Fatal(err)
	}
	const want = `version: 1
rules:
  - name: suggested
    match:
      provider: "gitea"
      repository: "acme/app"
      ref: "refs/heads/main"
      event: "push"
      workflow: "ci.yml"
      trust: branch
    egress:
      # learned
      - name: "db.corp"
        port: 5432
        protocol: tcp
        resolve: [10.0.0.7]
        purpose: "to be filled in"
      # learned
      - name: "git.example"
        port: 443
        protocol: https
        step: fetch
        purpose: "to be filled in; used by /usr/bin/git"
        requests:
          - {methods: [GET, POST], path: "/api/{repository}/x", websocket: true}
          - {methods: [GET], path: "/{repository}.git/info/refs"}
      # only asked for: the port is a guess
      # refused: no rule allows this name
      - name: "new.example"
        port: 443
        protocol: tls
        step: b
        purpose: "to be filled in"
      # allowed by policy.yaml:7
      - name: "proxy.example"
        port: 443
        protocol: tls
        purpose: "to be filled in"
      # refused: no rule for port 80 of this name
      - name: "mirror.example"
        port: 80
        protocol: http
        service: "db"
        purpose: "to be filled in"
`
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	p, err := Parse([]byte(got), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	plan, err := p.Decide(suggested())
	if err != nil || plan.Egress[1].Rule.Requests[1].Path != "/acme/app.git/info/refs" || plan.Mode != "" {
		t.Errorf("the job gets %+v, %v", plan, err)
	}
}

// TestSuggestionOfNothing: a job that reached nothing needs nothing.
func TestSuggestionOfNothing(t *testing.T) {
	t.Parallel()
	got, err := Suggest(suggested(), nil)
	if err != nil || strings.Contains(got, "egress:\n") {
		t.Errorf("got %q, %v", got, err)
	}
}

// TestSuggestionOfMany: more paths than anybody reads become one, and more names
// are left out aloud.
func TestSuggestionOfMany(t *testing.T) {
	t.Parallel()
	var uses []Use
	for i := range 2 * mostPaths {
		uses = append(uses, Use{Name: "a.example", Port: 80, Protocol: egress.HTTP, Verdict: egress.Learned, Method: "GET", Path: fmt.Sprintf("/p%d", i)})
	}
	for i := range mostUses + 10 {
		uses = append(uses, Use{Name: fmt.Sprintf("b%d.example", i), Port: 443, Protocol: egress.TLS, Verdict: egress.Learned})
	}
	got, err := Suggest(suggested(), uses)
	if err != nil || strings.Count(got, "path:") != 1 || !strings.Contains(got, "{methods: [GET], path: /**}") || strings.Count(got, "left out") != 11 {
		t.Errorf("got %.3000s, %v", got, err)
	}
}

// FuzzSuggestion: whatever a job called things, the policy is one, and has no
// other names than the job's.
func FuzzSuggestion(f *testing.F) {
	f.Add("a.example\"\n      - name: evil.example", "refused", "no\nrule", "build", "/usr/bin/x\"\n#", "GET", "/a b/../{sha}/", "db")
	f.Add("ex.example", "learned", "", "s\n", "\x1b[31m", "get", "/acme/app;x/**/y", "")
	f.Fuzz(func(t *testing.T, name, verdict, reason, step, exe, method, path, service string) {
		got, err := Suggest(suggested(), []Use{{
			Name: name, Port: 8080, Protocol: egress.HTTP, Verdict: egress.Verdict(verdict), Reason: reason, Rule: reason,
			Step: step, Service: service, Executable: exe, Method: method, Path: path, WebSocket: true,
		}})
		if err != nil {
			t.Fatal(err)
		}
		p, err := Parse([]byte(got), "policy.yaml")
		if err != nil {
			t.Fatalf("%v\n%s", err, got)
		}
		plans := p.Plans()
		if len(plans) != 1 || len(plans[0].Egress) > 1 || len(plans[0].Leases) > 0 || plans[0].Mode != "" {
			t.Fatalf("got %+v", plans)
		}
		for _, e := range plans[0].Egress {
			if e.Rule.Name != name || e.Rule.Port != 8080 || len(e.Rule.Resolve) > 0 {
				t.Fatalf("got %+v", e)
			}
		}
	})
}
