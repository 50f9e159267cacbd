package policy_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

const images = `version: 1
rules:
  - name: images
    match: {trust: branch}
    timeout: 30m
    leases:
      - name: images
        issuer: pg
        env: {P: password}
        broker:
          - name: registry.corp
            port: 5000
            as: oci-registry
            value: password
            user: username
            resolve: [10.0.0.7]
            with: {realm: "https://auth.corp/token", service: depot, scopes: ["repository:{repository}:pull"], resolve: [10.0.0.8]}
`

// TestRegistry: an entry for a registry is a way to it and one to its realm, for
// the job's own repository.
func TestRegistry(t *testing.T) {
	t.Parallel()
	p, err := policy.Parse([]byte(images), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	job := providers.Job{Trust: providers.TrustBranch}
	job.Subject.Repository = "acme/app"
	got, err := p.Decide(job)
	if err != nil {
		t.Fatal(err)
	}
	var text string
	for _, b := range got.Leases[0].Broker {
		in := b.Rule.Inject
		text += fmt.Sprintf("%s:%d %v %s %s %v user %s;", b.Rule.Name, b.Rule.Port, b.Rule.Resolve, in.As, b.Value, in.Tokens.Scopes, b.User)
		for _, r := range b.Rule.Requests {
			text += fmt.Sprintf(" %v %s", r.Methods, r.Path)
		}
		text += "\n"
		if err := in.Check(); err != nil {
			t.Error(err)
		}
	}
	const want = "auth.corp:443 [10.0.0.8/32] oci-token password [repository:acme/app:pull] user username; [GET] /token [POST] /token\n" +
		"registry.corp:5000 [10.0.0.7/32] oci-registry password [repository:acme/app:pull] user ; [GET HEAD] /v2/ [GET HEAD] /v2 [GET HEAD] /v2/acme/app/manifests/* [GET HEAD] /v2/acme/app/blobs/* " +
		"[GET HEAD] /v2/acme/app/tags/list [GET HEAD] /v2/acme/app/referrers/*\n"
	if text != want {
		t.Errorf("got\n%swant\n%s", text, want)
	}
	if got.Leases[0].Broker[0].Rule.Protocol != egress.HTTPS {
		t.Error("the realm is not reached by https")
	}
	job.Subject.Repository = "lab/other"
	if got, err := p.Decide(job); err != nil || got.Leases[0].Broker[0].Rule.Inject.Tokens.Scopes[0] != "repository:lab/other:pull" {
		t.Errorf("another repository: got %+v, %v", got, err)
	}
	job.Subject.Repository = "acme/app:x"
	if _, err := p.Decide(job); !errors.Is(err, policy.ErrDenied) {
		t.Errorf("a repository that is more than words: got %v", err)
	}
}
