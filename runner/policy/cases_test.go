package policy

import (
	"slices"
	"strings"
	"testing"
)

const casesPolicy = `version: 1
rules:
  - name: main
    match: {ref: refs/heads/main, trust: protected}
    narrow: true
    egress:
      - {name: "*.corp.example", port: 443, protocol: tls}
      - {name: git.corp, port: 9418, protocol: tcp, step: checkout}
    leases:
      - {name: db, issuer: db, step: migrate, env: {P: password}}
      - name: npm
        issuer: npm
        broker: [{name: registry.example, port: 443, as: bearer, value: secret}]
  - name: learn
    match: {ref: refs/heads/learn, trust: protected}
    mode: audit
  - name: release
    match: {ref: refs/tags/v1, trust: protected}
    leases:
      - name: key
        issuer: npm
        step: publish
        uses: 2
        requires: {steps: [test], environment: production}
        broker: [{name: registry.example, port: 443, as: bearer, value: secret}]
`

// Each expectation is tried as it is, and turned into one that does not hold.
func TestTry(t *testing.T) {
	t.Parallel()
	p, err := Parse([]byte(casesPolicy), "p.yaml")
	if err != nil {
		t.Fatal(err)
	}
	const onMain = "job: {ref: refs/heads/main, trust: protected, steps: [checkout, migrate]}, "
	const onLearn = "job: {ref: refs/heads/learn, trust: protected}, "
	const fork = "job: {ref: refs/heads/main, trust: fork}, "
	const onTag = "job: {ref: refs/tags/v1, trust: protected, steps: [test, publish]"
	const released = onTag + ", environment: production}, "
	for _, c := range []struct {
		text string
		want string // differences, joined; "" is a case that holds
	}{
		{fork + "denied: true", ""},
		{onMain + "denied: true", "- denied|+ rule p.yaml:3 main"},
		{fork + "rule: main", `- rule main: trust is "fork", it wants protected|+ denied by policy: no rule`},
		{onMain + "rule: none", "- rule none, which the policy does not have|+ rule p.yaml:3 main"},
		{onMain + "rule: main, leases: [{name: db, step: migrate}, {name: npm}]", ""},
		{onMain + "rule: main, leases: [{name: db}]", "- lease db|+ lease db, only in step migrate"},
		{onMain + "rule: main, leases: [{name: npm, step: migrate}]", "- lease npm, only in step migrate|+ lease npm"},
		{onMain + "rule: main, leases: [{name: aws}]", "- lease aws"},
		{"job: {ref: refs/heads/main, trust: protected, steps: [checkout]}, rule: main, leases: [{name: db, step: migrate}]", "- lease db, only in step migrate: the job has no such step"},
		{onMain + "rule: main, not: {leases: [{name: db, step: checkout}, {name: npmm}]}", ""},
		{onMain + "rule: main, not: {leases: [{name: db}]}", "+ lease db, only in step migrate, which may not be"},
		{onMain + "rule: main, not: {leases: [{name: npm, step: checkout}]}", "+ lease npm, which may not be"},
		{onMain + "rule: main, egress: [{name: a.corp.example, port: 443}, {name: git.corp, port: 9418, protocol: tcp, step: checkout}]", ""},
		{onMain + "rule: main, egress: [{name: a.b.corp.example, port: 443}]", "- egress a.b.corp.example:443"},
		{onMain + "rule: main, egress: [{name: a.corp.example, port: 443, protocol: https}]", "- egress a.corp.example:443 https|+ egress *.corp.example:443 tls"},
		{onMain + "rule: main, egress: [{name: git.corp, port: 9418}]", "- egress git.corp:9418|+ egress git.corp:9418 tcp, only in step checkout"},
		{onMain + "rule: main, not: {egress: [{name: git.corp, port: 9418, step: migrate}, {name: git.corp, port: 22}]}", ""},
		{onMain + "rule: main, not: {egress: [{name: git.corp, port: 9418}]}", "+ egress git.corp:9418 tcp, only in step checkout, which may not be"},
		{onMain + "rule: main, not: {egress: [{name: x.corp.example, port: 443}]}", "+ egress *.corp.example:443 tls, which may not be"},
		{onMain + `rule: main, not: {egress: [{name: "*.corp.example", port: 443}]}`, "+ egress *.corp.example:443 tls, which may not be"},
		{onMain + "rule: main, not: {egress: [{name: registry.example, port: 443}]}", "+ egress registry.example:443 https, which may not be"},
		{onMain + "rule: main, only: true, leases: [{name: npm}, {name: db, step: migrate}], egress: [{name: a.corp.example, port: 443}, {name: git.corp, port: 9418, step: checkout}, {name: registry.example, port: 443}]", ""},
		{onMain + "rule: main, only: true, leases: [{name: npm}]", "+ lease db, only in step migrate|+ egress *.corp.example:443 tls|+ egress git.corp:9418 tcp, only in step checkout|+ egress registry.example:443 https"},
		{onLearn + "rule: learn, not: {egress: [{name: a.example, port: 1}]}", "+ mode: audit opens every name, a.example:1 as well"},
		{onLearn + "rule: learn, only: true", "+ mode: audit, which opens every name"},
		{onMain + "rule: main, narrow: n.yaml, only: true, egress: [{name: git.corp, port: 9418, step: checkout}]", ""},
		{released + "rule: release, leases: [{name: key, step: publish}]", ""},
		{released + "rule: release, leases: [{name: key, step: publish, uses: 2, requires: [environment, steps]}]", ""},
		{released + "rule: release, leases: [{name: key, step: publish, uses: 3}]", "- lease key, only in step publish for 3 uses|+ lease key, only in step publish for 2 uses"},
		{released + "rule: release, leases: [{name: key, step: publish, requires: [steps]}]", `- lease key, only in step publish, which requires ["steps"]|+ lease key, only in step publish, which requires ["steps" "environment"]`},
		{onTag + ", environment: staging}, rule: release, leases: [{name: key, step: publish}]", "- lease key, only in step publish: environment production is required, and the job was released for staging"},
		{onTag + "}, rule: release, leases: [{name: key, step: publish}]", "- lease key, only in step publish: environment production is required, and the provider does not say"},
		{onLearn + "rule: learn, narrow: n.yaml", "- rule p.yaml:14 learn does not say narrow: true"},
	} {
		cases, err := ParseCases([]byte("version: 1\ncases:\n  - {name: it, "+c.text+"}\n"), "t.yaml")
		if err != nil {
			t.Errorf("%s: %v", c.text, err)
			continue
		}
		v := p.Try(cases[0], []byte("version: 1\nleases: []\negress: [{name: git.corp, port: 9418, step: checkout}]\n"))
		var want []string
		if c.want != "" {
			want = strings.Split(c.want, "|")
		}
		same := slices.EqualFunc(v.Differences, want, strings.HasPrefix)
		if !same || v.OK != (c.want == "") {
			t.Errorf("%s: got %v %q, want %q", c.text, v.OK, v.Differences, want)
		}
	}
	denied, err := ParseCases([]byte("version: 1\ncases:\n  - {name: it, "+onMain+"denied: true, narrow: n.yaml}\n"), "t.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if v := p.Try(denied[0], []byte("version: 1\nleases: [more]\n")); !v.OK || v.Rule != "" {
		t.Errorf("a file that asks for more: got %+v, want it denied", v)
	}
}

func TestParseCasesRefuses(t *testing.T) {
	t.Parallel()
	const job = "job: {trust: fork}"
	for _, c := range []struct{ cases, want string }{
		{"[]", "t.yaml:2:8: no cases: nothing would be tested"},
		{"[{name: a, " + job + "}]", "t.yaml:2:9: nothing is expected: say rule: NAME, or denied: true"},
		{"[{name: a, " + job + ", denied: false}]", "denied: false says nothing"},
		{"[{name: a, " + job + ", rule: r, only: false}]", "only: false says nothing"},
		{"[{name: a, " + job + ", denied: true, rule: r}]", "remove rule, or denied"},
		{"[{name: a, " + job + ", denied: true, only: true}]", "remove only, or denied"},
		{"[{name: a, " + job + ", denied: true, not: {leases: [{name: x}]}}]", "remove not, or denied"},
		{"[{name: a, " + job + ", rule: r, not: {}}]", "nothing is named: add leases or egress"},
		{"[{name: a, " + job + ", rule: r, leases: []}]", "an empty list expects nothing: say only: true"},
		{"[{name: a, job: {ref: x}, rule: r}]", `key "trust" is missing`},
		{"[{name: a, job: {trust: forks}, rule: r}]", `unknown trust "forks"`},
		{"[{name: a, job: {trust: fork, repo: x}, rule: r}]", `t.yaml:2:38: unknown key "repo"`},
		{"[{name: a, " + job + ", rule: r, egress: [{name: x.example}]}]", `key "port" is missing`},
		{"[{name: a, " + job + ", rule: r}, {name: a, " + job + ", rule: r}]", "a case of this name is already at t.yaml:2:9"},
	} {
		_, err := ParseCases([]byte("version: 1\ncases: "+c.cases+"\n"), "t.yaml")
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %s", c.cases, err, c.want)
		}
	}
	if _, err := ParseCases([]byte("version: 2\ncases: []\n"), "t.yaml"); err == nil || !strings.Contains(err.Error(), "version 2 is not supported") {
		t.Errorf("version 2: got %v", err)
	}
}

func FuzzParseCases(f *testing.F) {
	p, err := Parse([]byte(casesPolicy), "p.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte("version: 1\ncases:\n  - {name: a, job: {trust: protected, ref: refs/heads/main}, rule: main, only: true, not: {egress: [{name: \"*.a.b\", port: 1}]}}\n"))
	f.Fuzz(func(t *testing.T, src []byte) {
		cases, err := ParseCases(src, "t.yaml")
		if err != nil {
			return
		}
		for _, c := range cases {
			if v := p.Try(c, src); v.OK != (len(v.Differences) == 0) {
				t.Errorf("%+v", v)
			}
		}
	})
}
