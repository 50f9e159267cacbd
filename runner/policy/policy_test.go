package policy

import (
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/txtar"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
)

var update = flag.Bool("update", false, "write the golden parts of testdata/*.txtar")

// job is a job as the golden files write it.
type job struct {
	creds.Subject
	Trust   providers.Trust `json:"trust"`
	Timeout string          `json:"timeout"`
	Steps   []string        `json:"steps"`
}

func readJob(t *testing.T, src []byte) providers.Job {
	t.Helper()
	var j job
	dec := json.NewDecoder(strings.NewReader(string(src)))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&j); err != nil {
		t.Fatalf("job %s: %v", src, err)
	}
	out := providers.Job{Subject: j.Subject, Trust: j.Trust}
	if j.Timeout != "" {
		d, err := time.ParseDuration(j.Timeout)
		if err != nil {
			t.Fatal(err)
		}
		out.Timeout = d
	}
	for _, s := range j.Steps {
		out.Steps = append(out.Steps, providers.Step{ID: s})
	}
	return out
}

// TestGolden reads testdata/*.txtar. Each holds policy.yaml and either
// "errors", what Parse must say, or for each NAME.job what follows from it:
// NAME.plan, a plan or a refusal, and, where present, NAME.explain.
func TestGolden(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) < 5 {
		t.Fatalf("testdata: got %d archives, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			t.Parallel()
			a, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, a)
			if *update {
				if err := os.WriteFile(file, txtar.Format(a), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

func golden(t *testing.T, a *txtar.Archive) {
	t.Helper()
	part := func(name string) []byte {
		i := slices.IndexFunc(a.Files, func(f txtar.File) bool { return f.Name == name })
		if i < 0 {
			return nil
		}
		return a.Files[i].Data
	}
	p, err := Parse(part("policy.yaml"), "policy.yaml")
	for i := range a.Files {
		f := &a.Files[i]
		name, kind, _ := strings.Cut(f.Name, ".")
		var got string
		switch {
		case f.Name == "errors" && err == nil:
			t.Errorf("Parse: got no error, want\n%s", f.Data)
			continue
		case f.Name == "errors":
			got = err.Error() + "\n"
		case kind == "plan" && err == nil:
			got = decision(p, readJob(t, part(name+".job")))
		case kind == "explain" && err == nil:
			got = asJSON(p.Explain(readJob(t, part(name+".job"))))
		case kind == "plan" || kind == "explain":
			t.Fatalf("Parse: %v", err)
		default:
			continue
		}
		got = strings.ReplaceAll(got, digestOf(p), "DIGEST")
		if *update {
			f.Data = []byte(got)
		} else if got != string(f.Data) {
			t.Errorf("%s: got\n%s\nwant\n%s", f.Name, got, f.Data)
		}
	}
}

func digestOf(p *Policy) string {
	if p == nil {
		return "no digest"
	}
	return p.Digest()
}

func decision(p *Policy, j providers.Job) string {
	plan, err := p.Decide(j)
	if err != nil {
		return "refused: " + err.Error() + "\n"
	}
	return asJSON(plan)
}

func asJSON(v any) string {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err.Error()
	}
	return string(b) + "\n"
}

// everything is a job that the most generous rule would take.
func everything() providers.Job {
	return providers.Job{
		Subject: creds.Subject{Provider: "local", Repository: "acme/app", Ref: "refs/heads/main", Event: "push", Job: "x"},
		Trust:   providers.TrustLocal,
	}
}

func TestNothingGrantsNothing(t *testing.T) {
	t.Parallel()
	p := Nothing()
	plan, err := p.Decide(everything())
	if err != nil {
		t.Fatalf("Nothing: a local job is refused: %v", err)
	}
	if len(plan.Egress) != 0 || len(plan.Leases) != 0 {
		t.Errorf("Nothing: got %+v, want no egress and no lease", plan)
	}
	if plan.Timeout != DefaultTimeout || plan.LogBytes != DefaultLogBytes || plan.Runtime != "native" {
		t.Errorf("Nothing: got %+v, want the defaults", plan)
	}
	if plan.Rule != "built-in:3 nothing" || plan.Digest != p.Digest() || !strings.HasPrefix(p.Digest(), "sha256:") {
		t.Errorf("Nothing: got rule %q, digest %q", plan.Rule, plan.Digest)
	}
	for _, trust := range []providers.Trust{"", providers.TrustFork, providers.TrustBranch, providers.TrustProtected, providers.TrustEnvironment} {
		j := everything()
		j.Trust = trust
		if _, err := p.Decide(j); !errors.Is(err, ErrDenied) {
			t.Errorf("Nothing: trust %q: got %v, want ErrDenied", trust, err)
		}
	}
	j := everything()
	j.Subject.Provider = "github"
	if _, err := p.Decide(j); !errors.Is(err, ErrDenied) {
		t.Errorf("Nothing: provider github: got %v, want ErrDenied", err)
	}
}

func TestZeroPolicyRefuses(t *testing.T) {
	t.Parallel()
	if _, err := new(Policy).Decide(everything()); !errors.Is(err, ErrDenied) {
		t.Errorf("zero Policy: got %v, want ErrDenied", err)
	}
}

// A plan is changed by whoever uses it (TTLs, order); the policy must not be.
func TestPlansShareNoSlices(t *testing.T) {
	t.Parallel()
	p, err := Parse([]byte(`version: 1
rules:
  - name: all
    match: {trust: local}
    egress: [{name: a.example, port: 1, protocol: tcp}]
    leases: [{name: db, issuer: pg, ttl: 10m, env: {P: password}}]
`), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	first, err := p.Decide(everything())
	if err != nil {
		t.Fatal(err)
	}
	first.Egress[0].Rule.Name, first.Leases[0].Name = "evil.example", "evil"
	second, err := p.Decide(everything())
	if err != nil {
		t.Fatal(err)
	}
	if second.Egress[0].Rule.Name != "a.example" || second.Leases[0].Name != "db" {
		t.Errorf("Decide: got %+v, want a plan that no earlier caller could change", second)
	}
	if g := p.Grants(); len(g) != 1 || g[0].Issuer != "pg" || g[0].Rule != "policy.yaml:3 all" {
		t.Errorf("Grants: got %+v", g)
	}
}

// What a rule gives at most is the plan of a job that asks for nothing less.
func TestPlans(t *testing.T) {
	t.Parallel()
	p, err := Parse([]byte("version: 1\nrules:\n  - {name: a, match: {trust: local}, timeout: 2h, limits: {memory: 1GiB}}\n  - {name: b, match: {trust: fork}, runtime: docker, image: x}\n"), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	plans := p.Plans()
	if len(plans) != 2 || plans[0].Timeout != 2*time.Hour || plans[0].Limits.Memory != 1<<30 || plans[1].Runtime != "docker" || plans[1].Image != "x" {
		t.Fatalf("got %+v", plans)
	}
	decided, err := p.Decide(providers.Job{Trust: providers.TrustLocal})
	if err != nil || !reflect.DeepEqual(decided, plans[0]) {
		t.Errorf("Decide: got %+v, %v, want the first of Plans, %+v", decided, err, plans[0])
	}
}

func TestGlob(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		glob, text string
		want       bool
	}{
		{"acme/*", "acme/app", true},
		{"acme/*", "acme/app/x", false},
		{"acme/**", "acme/app/x", true},
		{"acme/*", "acme", false},
		{"acme/*", "xacme/app", false},
		{"**/main", "refs/heads/main", true},
		{"**/main", "main", false},
		{"*", "", true},
		{"*", "a/b", false},
		{"**", "a/b", true},
		{"refs/heads/release-*", "refs/heads/release-", true},
		{"refs/heads/release-*", "refs/heads/release-1/x", false},
		{"*/app", "acme/app", true},
		{"a*b*c", "axxbyyc", true},
		{"a*b*c", "axxbyy", false},
		{"main", "Main", false},
		{"main", "main\n", false},
		{"a.c", "abc", false},
	} {
		if got := glob(c.glob).match(c.text); got != c.want {
			t.Errorf("glob %q on %q: got %v, want %v", c.glob, c.text, got, c.want)
		}
	}
}

// Parse lets neither of these through; if it did, they must not match.
func TestEmptyListsMatchNothing(t *testing.T) {
	t.Parallel()
	if (oneOf{}).match("") || tiers(nil).match("") || (tiers{}).match("") {
		t.Error("empty list: got a match, want none")
	}
	if !oneOf(nil).match("anything") {
		t.Error("absent key: got no match, want one")
	}
}

// A hundred stars over a long text take exponential time in a naive matcher.
func TestGlobIsBounded(t *testing.T) {
	t.Parallel()
	start := time.Now()
	if glob(strings.Repeat("a*", 100) + "b").match(strings.Repeat("a", 10_000)) {
		t.Error("glob: got a match, want none")
	}
	if d := time.Since(start); d > time.Minute {
		t.Errorf("glob: took %s, want time in proportion to pattern × text", d)
	}
}

func FuzzParse(f *testing.F) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		a, err := txtar.ParseFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(a.Files[0].Data)
	}
	f.Fuzz(func(t *testing.T, src []byte) {
		p, err := Parse(src, "policy.yaml")
		if err != nil {
			for line := range strings.SplitSeq(err.Error(), "\n") {
				if !strings.HasPrefix(line, "policy.yaml:") && !strings.HasPrefix(line, "and ") {
					t.Fatalf("error without a place: %q", line)
				}
			}
			return
		}
		for _, trust := range []providers.Trust{"", providers.TrustFork, providers.TrustLocal} {
			j := everything()
			j.Trust = trust
			plan, err := p.Decide(j)
			switch {
			case err != nil && !errors.Is(err, ErrDenied):
				t.Fatalf("Decide: %v", err)
			case err == nil && trust == "":
				t.Fatalf("job without trust got %+v", plan)
			case err == nil && (plan.Timeout <= 0 || plan.LogBytes <= 0 || plan.Runtime == "" || plan.Rule == ""):
				t.Fatalf("plan without bounds: %+v", plan)
			}
			if e := p.Explain(j); (e.Plan == nil) != (err != nil) {
				t.Fatalf("Explain and Decide disagree: %+v, %v", e, err)
			}
		}
	})
}
