package runner_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
)

const pullPolicy = `version: 1
rules:
  - name: all
    match: {trust: [local]}
    image: registry.example/a/b:1
    pull: reg
    timeout: 10m
    leases:
      - {name: reg, issuer: pg, ttl: 1m}
      - {name: db, issuer: pg, env: {PGPASSWORD: password}}
`

// pulling is a runtime that remembers what it was asked for.
type pulling struct {
	worldRuntime
	pulls  *[]sandbox.Pull
	images *[]string
}

func (p pulling) Pull(ctx context.Context, request sandbox.Pull) (sandbox.Image, error) {
	*p.pulls = append(*p.pulls, request)
	return p.Fake.Pull(ctx, request)
}

func (p pulling) Create(ctx context.Context, name string, s sandbox.Spec) (sandbox.Sandbox, error) {
	*p.images = append(*p.images, s.Image)
	return p.worldRuntime.Create(ctx, name, s)
}

// pull runs a job whose rule has an image.
func (w *world) pull(text string, steps ...providers.Step) (r providers.Result, pulls []sandbox.Pull, images []string) {
	w.t.Helper()
	rules, err := policy.Parse([]byte(text), "policy.yaml")
	if err != nil {
		w.t.Fatal(err)
	}
	r = w.run(lifetime(w.t), func(c *runner.Config) {
		c.Policy = rules
		c.Runtimes["native"] = pulling{worldRuntime{w.boxes, w}, &pulls, &images}
	}, steps...)
	return r, pulls, images
}

// TestPull: the image is pulled before anything else is made, with a lease that
// is revoked before the box, and the box is made of its digest.
func TestPull(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	step := providers.Step{ID: "pull", Run: "env PATH\nenv OF_IMAGE\nenv OF_JOB\nenv HOME\nenv PGPASSWORD"}
	step.Env = providers.Env{Vars: map[string]string{"OF_JOB": "job"}}
	r, pulls, images := w.pull(pullPolicy, step)
	if r.Conclusion != providers.Success {
		t.Fatalf("got %+v", r)
	}
	digest := fmt.Sprintf("sha256:%x", sha256.Sum256([]byte("registry.example/a/b:1")))
	if len(pulls) != 1 || pulls[0].Image != "registry.example/a/b:1" || pulls[0].User != "u" ||
		!strings.HasPrefix(pulls[0].Password.Reveal(), "pw-mf-") || !strings.HasSuffix(pulls[0].Password.Reveal(), "-l-reg") {
		t.Errorf("pulled: got %d times, user %q, want once with the lease", len(pulls), pulls[0].User)
	}
	if !slices.Equal(images, []string{digest}) {
		t.Errorf("boxes are made of %q, want the digest that Pull gave, %q", images, digest)
	}
	order := strings.Join(w.happened(), " ")
	if want := "claim issue box.pull revoke probe open box.create attach "; !strings.HasPrefix(order, want) {
		t.Errorf("order: got %s, want it to begin with %s", order, want)
	}
	for _, want := range []string{"image registry.example/a/b:1 of the job is " + digest, "/image/bin\nyes\njob\n/root\n***\n"} {
		if !strings.Contains(w.shown(), want) {
			t.Errorf("log: got %q, want %q in it", w.shown(), want)
		}
	}
	var found bool
	for _, e := range w.events {
		if e.Action == "image.pull" {
			found = e.Result == "ok" && e.Object == "registry.example/a/b:1" && e.Detail["digest"] == digest &&
				e.Detail["bytes"] == "7" && e.Detail["runtime"] == "native" && e.Detail["for"] == "the job"
		}
	}
	if !found {
		t.Errorf("audit: got %+v, want an image.pull with all that", w.events)
	}
	w.clean()
}

// TestPullFails: a job whose image is refused holds nothing, and what it was to
// be pulled with is revoked.
func TestPullFails(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.failWith(func(call, _ string) error {
		if call == "box.pull" {
			return fmt.Errorf("digest is another one: %w", sandbox.ErrImage)
		}
		return nil
	})
	r, _, images := w.pull(pullPolicy, providers.Step{Run: "print never"})
	if r.Conclusion != providers.Failure || !strings.Contains(r.Reason, "digest is another one: image refused") {
		t.Errorf("got %+v, want a failure with the reason", r)
	}
	if len(images) > 0 || w.made("open") > 0 || w.made("issue") != 1 || w.made("revoke") == 0 {
		t.Errorf("got %v, want one lease, revoked, and nothing else", w.happened())
	}
	w.clean()
}

// TestPullNeverKept: the lease of a pull that cannot be revoked stops the job.
func TestPullNotRevoked(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	failed := false
	w.failWith(func(call, name string) error {
		if call == "revoke" && strings.HasSuffix(name, "-l-reg") && !failed {
			failed = true
			return errors.New("away")
		}
		return nil
	})
	r, _, images := w.pull(pullPolicy, providers.Step{Run: "print never"})
	if r.Conclusion != providers.Failure || len(images) > 0 || strings.Contains(w.shown(), "never\n") {
		t.Errorf("got %+v and boxes of %v, want no box beside a credential that is alive", r, images)
	}
	w.clean()
}

// plain is a runtime that has no images.
type plain struct{ sandbox.Runtime }

// TestPullUnsupported: a rule with an image on a runtime without refuses the job.
func TestPullUnsupported(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	rules, err := policy.Parse([]byte(pullPolicy), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	r := w.run(lifetime(t), func(c *runner.Config) {
		c.Policy, c.Runtimes = rules, map[string]sandbox.Runtime{"native": plain{worldRuntime{w.boxes, w}}}
	}, providers.Step{Run: "print never"})
	if r.Conclusion != providers.Refused || !strings.Contains(r.Reason, `boxes of runtime "native" are made of no image`) {
		t.Errorf("got %+v, want refused", r)
	}
	w.clean()
}

// fieldless is an issuer whose leases have no password.
type fieldless struct{ creds.Issuer }

func (f fieldless) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	l, err := f.Issuer.Issue(ctx, name, g)
	l.Values = nil
	return l, err
}

// TestPullWithoutPassword: what is no credential of a registry is not tried.
func TestPullWithoutPassword(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	rules, err := policy.Parse([]byte(pullPolicy), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	r := w.run(lifetime(t), func(c *runner.Config) {
		c.Policy, c.Issuers["pg"] = rules, fieldless{(*worldIssuer)(w)}
	}, providers.Step{Run: "print never"})
	if r.Conclusion != providers.Failure || !strings.Contains(r.Reason, "gives no password") || w.made("box.pull") > 0 {
		t.Errorf("got %+v, want a failure before the pull", r)
	}
	w.clean()
}
