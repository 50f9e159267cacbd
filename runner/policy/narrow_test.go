package policy_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner/policy"
)

const wide = `version: 1
rules:
  - name: wide
    match: {trust: branch}
    narrow: true
    timeout: 30m
    limits: {memory: 2GiB, log: 1MiB}
    egress:
      - {name: a.corp, port: 443, protocol: tls}
      - {name: db.corp, port: 5432, protocol: tcp, resolve: [10.0.0.7], step: migrate}
      - {name: "*.pages.corp", port: 443, protocol: tls}
      - {name: few.corp, port: 443, protocol: https, requests: [{methods: [GET], path: /x, count: 3}]}
    leases:
      - {name: db, issuer: pg, ttl: 20m, env: {A: password}}
      - {name: api, issuer: pg, env: {B: password}}
`

func plan(t *testing.T) policy.Plan {
	t.Helper()
	p, err := policy.Parse([]byte(wide), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	got, err := p.Decide(providers.Job{Trust: providers.TrustBranch})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

func ways(p policy.Plan) string {
	var all []string
	for _, e := range p.Egress {
		all = append(all, strings.TrimSpace(e.Rule.Name+" "+e.Step))
	}
	return strings.Join(all, ", ")
}

// TestNarrow: what is named stays as the agent's policy has it, all else goes.
func TestNarrow(t *testing.T) {
	t.Parallel()
	const everything = "a.corp, db.corp migrate, *.pages.corp, few.corp"
	for _, c := range []struct{ file, ways, leases string }{
		{"", everything, "db, api"},
		{"egress: []", "", "db, api"},
		{"leases: []", everything, ""},
		{"leases: [api]", everything, "api"},
		{"egress: [{name: a.corp, port: 443}]", "a.corp", "db, api"},
		{"egress: [{name: a.corp, port: 443, step: build}]", "a.corp build", "db, api"},
		{"egress: [{name: db.corp, port: 5432, step: migrate}]", "db.corp migrate", "db, api"},
		{"egress: [{name: docs.pages.corp, port: 443}, {name: few.corp, port: 443, step: one}]", "docs.pages.corp, few.corp one", "db, api"},
		{`egress: [{name: "*.pages.corp", port: 443}]`, "*.pages.corp", "db, api"},
	} {
		before := plan(t)
		got, err := before.Narrow([]byte("version: 1\n"+c.file), policy.NarrowFile)
		if err != nil {
			t.Errorf("%s: %v", c.file, err)
			continue
		}
		var leases []string
		for _, l := range got.Leases {
			leases = append(leases, l.Name)
		}
		if ways(got) != c.ways || strings.Join(leases, ", ") != c.leases || !strings.HasPrefix(got.Narrowed, "sha256:") {
			t.Errorf("%s: ways %q, leases %q, digest %q", c.file, ways(got), leases, got.Narrowed)
		}
		if ways(before) != everything || len(before.Leases) != 2 {
			t.Errorf("%s: the plan itself was changed", c.file)
		}
	}
	got, err := plan(t).Narrow([]byte("version: 1\ntimeout: 5m\nlimits: {memory: 1GiB, log: 64KiB}"), policy.NarrowFile)
	if err != nil || got.Timeout != 5*time.Minute || got.Limits.Memory != 1<<30 || got.LogBytes != 64<<10 || got.Leases[0].TTL != 5*time.Minute {
		t.Errorf("limits: %+v, %v", got, err)
	}
	if got, err = plan(t).Narrow([]byte("version: 1\ntimeout: 5h"), policy.NarrowFile); err != nil || got.Timeout != 30*time.Minute {
		t.Errorf("a longer time: %v, %v; want the plan's", got.Timeout, err)
	}
}

// TestNeverWiden: what the plan does not have cannot be had.
func TestNeverWiden(t *testing.T) {
	t.Parallel()
	for file, want := range map[string]string{
		"egress: [{name: b.corp, port: 443}]":                                                  "no rule of the agent's policy covers b.corp:443",
		"egress: [{name: a.corp, port: 444}]":                                                  "covers a.corp:444",
		"egress: [{name: a.corp, port: 443, service: s}]":                                      "covers a.corp:443",
		"egress: [{name: db.corp, port: 5432}]":                                                "covers db.corp:5432",
		"egress: [{name: db.corp, port: 5432, step: other}]":                                   "covers db.corp:5432",
		"egress: [{name: x.y.pages.corp, port: 443}]":                                          "covers x.y.pages.corp",
		"egress: [{name: pages.corp, port: 443}]":                                              "covers pages.corp",
		`egress: [{name: "*.a.corp", port: 443}]`:                                              "covers *.a.corp",
		"egress: [{name: a.corp, port: 443, protocol: tcp}]":                                   "unknown key",
		"egress: [{name: a.corp, port: 443, resolve: [10.0.0.1]}]":                             "unknown key",
		"egress: [{name: a.corp, port: 443}, {name: a.corp, port: 443}]":                       "twice",
		"egress: [{name: few.corp, port: 443, step: a}, {name: few.corp, port: 443, step: b}]": "counted",
		"leases: [root]":         "no lease root",
		"limits: {memory: 3GiB}": "only be smaller",
		"limits: {pids: 10}":     "names no limit for pids",
		"image: debian":          "unknown key",
		"version: 2":             "",
		"egress: [":              "",
	} {
		got, err := plan(t).Narrow([]byte("version: 1\n"+file), policy.NarrowFile)
		if !errors.Is(err, policy.ErrDenied) || !strings.Contains(err.Error(), want) || got.Narrowed != "" {
			t.Errorf("%s: %v, want a refusal with %q", file, err, want)
		}
	}
}

// TestNarrowWhatIsLeftOut: a file may name what the policy grants on a condition that
// is false for this job. The job runs, without it.
func TestNarrowWhatIsLeftOut(t *testing.T) {
	t.Parallel()
	text := strings.NewReplacer("port: 5432,", `port: 5432, when: job.ref == "refs/heads/main",`, "name: api,", `name: api, when: job.ref == "refs/heads/main",`).Replace(wide)
	p, err := policy.Parse([]byte(text), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for ref, want := range map[string]string{"refs/heads/main": "a.corp, db.corp migrate: db, api", "refs/heads/x": "a.corp: db"} {
		job := providers.Job{Trust: providers.TrustBranch}
		job.Subject.Ref = ref
		plan, err := p.Decide(job)
		if err != nil {
			t.Fatal(err)
		}
		got, err := plan.Narrow([]byte("version: 1\nleases: [db, api]\negress: [{name: a.corp, port: 443}, {name: db.corp, port: 5432, step: migrate}]"), policy.NarrowFile)
		var leases []string
		for _, l := range got.Leases {
			leases = append(leases, l.Name)
		}
		if has := ways(got) + ": " + strings.Join(leases, ", "); err != nil || has != want {
			t.Errorf("%s: %q, %v; want %q", ref, has, err, want)
		}
		for _, more := range []string{"leases: [root]", "egress: [{name: db.corp, port: 5432}]", "egress: [{name: db.corp, port: 5433, step: migrate}]"} {
			if _, err := plan.Narrow([]byte("version: 1\n"+more), policy.NarrowFile); !errors.Is(err, policy.ErrDenied) {
				t.Errorf("%s: %s: %v, want a refusal", ref, more, err)
			}
		}
	}
}
