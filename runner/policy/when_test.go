package policy

import (
	"errors"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/configs/strict"
	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
)

// compileWhen reads one condition as a rule would.
func compileWhen(t testing.TB, text string) (*condition, error) {
	t.Helper()
	root, err := strict.Parse([]byte("when: |\n  "+strings.ReplaceAll(text, "\n", "\n  ")+"\n"), "policy.yaml")
	if err != nil {
		return nil, err
	}
	return new(conditions).compile(root)
}

func TestWhen(t *testing.T) {
	t.Parallel()
	j := everything()
	for text, want := range map[string]bool{
		`job.ref.startsWith("refs/heads/")`:                         true,
		`job.owner + "/" + job.name == job.repository`:              true,
		`!has(job.sha) && !has(job.actor)`:                          true,
		`has(job.sha) && job.sha == "x"`:                            false,
		`job.trust == "local" || job.environment == "prod"`:         true,
		`["push", "tag"].exists(e, e == job.event)`:                 true,
		`size(job.repository) > 100`:                                false,
		`job.repository.matches("^acme/") ? false : job.ref == "x"`: false,
	} {
		c, err := compileWhen(t, text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got, err := c.holds(j); err != nil || got != want {
			t.Errorf("%s: got %t, %v, want %t", text, got, err, want)
		}
	}
}

// TestWhenRefuses: what cannot be answered is no answer, and costs little.
func TestWhenRefuses(t *testing.T) {
	t.Parallel()
	ten := "[1,2,3,4,5,6,7,8,9,10]"
	for text, want := range map[string]string{
		`job.environment == ""`:                  "ask has(job.environment) first",
		`job.sha != "x"`:                         "ask has(job.sha) first",
		`1 / (size(job.event) - 4) > 0`:          "division by zero",
		`job == job`:                             "a job is compared with nothing",
		`mayfly.Job{} == job`:                    "a condition makes no job",
		`job.ref.matches(job.event + "(")`:       "error parsing regexp",
		`string(job.ref == "x") in {"a": [1]}.a`: "", // does not compile
		ten + `.all(a, ` + ten + `.all(b, ` + ten + `.all(c, ` + ten + `.all(d, ` + ten + `.all(e, a+b+c+d+e > 0)))))`: "cost limit exceeded",
	} {
		c, err := compileWhen(t, text)
		if err == nil {
			var is bool
			if is, err = c.holds(everything()); is || !errors.Is(err, ErrDenied) {
				t.Errorf("%s: got %t, %v, want a refusal", text, is, err)
			}
		}
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "policy.yaml:1") {
			t.Errorf("%s: got %v, want %q with its place", text, err, want)
		}
	}
	// What is wrong whatever the job is, is wrong before there is one.
	for text, want := range map[string]string{
		`job.ref.matches("^(")`:                        "invalid matches argument (character ",
		`job.event == "push" || job.ref.matches("*")`:  "invalid matches argument (character ",
		`duration("soon") > duration("1s")`:            "invalid duration argument (character ",
		`timestamp("today") > timestamp("2026-11-24")`: "invalid timestamp argument (character ",
	} {
		if _, err := compileWhen(t, text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", text, err, want)
		}
	}
	for _, deep := range []string{strings.Repeat("(", 900) + "true" + strings.Repeat(")", 900)} {
		if c, err := compileWhen(t, deep); err == nil {
			t.Errorf("%s…: compiled: %v", deep[:10], c)
		}
	}
}

// FuzzWhen: no text and no job make a condition panic, hold by an error, or hold for
// a job that it was not asked about.
func FuzzWhen(f *testing.F) {
	f.Add(`job.ref == "x" && has(job.sha)`, "x", "acme/app")
	f.Add(`job.repository.matches(job.ref)`, "(a*)*", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!")
	f.Add(`[job.ref].map(x, x + x).all(x, x in [job.actor])`, "", "")
	f.Add(`mayfly.Job{ref: "x"}.ref == dyn(job)`, "x", "y")
	f.Fuzz(func(t *testing.T, text, ref, repository string) {
		c, err := compileWhen(t, text)
		if err != nil || c == nil {
			return
		}
		j := providers.Job{Subject: creds.Subject{Ref: ref, Repository: repository}, Trust: providers.TrustBranch}
		is, err := c.holds(j)
		again, err2 := c.holds(j)
		if is && err != nil || err != nil && !errors.Is(err, ErrDenied) || is != again || (err == nil) != (err2 == nil) {
			t.Errorf("got %t, %v, and then %t, %v", is, err, again, err2)
		}
	})
}
