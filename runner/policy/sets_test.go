package policy

import (
	"fmt"
	"strings"
	"testing"

	sets "github.com/mayfly-ci/mayfly/configs/egress"
	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// TestSets: each set is one that the gateway can enforce, narrows every request,
// and writes nothing but what reading takes.
func TestSets(t *testing.T) {
	t.Parallel()
	names := sets.Names()
	if len(names) < 8 {
		t.Errorf("got sets %q, want at least 8", names)
	}
	all := "version: 1\nrules:\n  - name: all\n    match: {trust: local}\n    egress: [{set: " + strings.Join(names, "}, {set: ") + "}]\n"
	p, err := Parse([]byte(all), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	plan, err := p.Decide(providers.Job{Trust: providers.TrustLocal, Subject: creds.Subject{Repository: "acme/app"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range plan.Egress {
		r := e.Rule
		if len(r.Requests) == 0 || r.Purpose == "" || !strings.HasPrefix(r.ID, "policy.yaml:5 ") {
			t.Errorf("%s: got %+v, want requests, a purpose and where it is named", r.ID, r)
		}
		if r.Protocol != egress.HTTPS && r.Protocol != egress.HTTP {
			t.Errorf("%s: protocol %s", r.ID, r.Protocol)
		}
		for _, q := range r.Requests {
			reads := strings.Trim(strings.Join(q.Methods, " "), "GETHAD ") == ""
			if err := q.Check(); err != nil || !reads && !strings.HasSuffix(q.Path, "/git-upload-pack") {
				t.Errorf("%s: %v %s: %v", r.ID, q.Methods, q.Path, err)
			}
		}
	}
}

// TestCertificates: what is no certificate is refused.
func TestCertificates(t *testing.T) {
	t.Parallel()
	for _, bad := range []string{"", "x", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"} {
		if err := new(certificates).UnmarshalText([]byte(bad)); err == nil {
			t.Errorf("%q passed", bad)
		}
	}
}

// FuzzFill: whatever a job is called, a path that is filled with it is one that
// the gateway can compare, and has the segments that the author wrote.
func FuzzFill(f *testing.F) {
	f.Add("acme/app", "refs/heads/main")
	f.Add("a/../b", "refs/heads/%2e%2e")
	f.Add("a*", "**")
	f.Fuzz(func(t *testing.T, repository, ref string) {
		j := providers.Job{Subject: creds.Subject{Repository: repository, Ref: ref}}
		r, err := fill(egress.Rule{ID: "x", Requests: []egress.Request{{Methods: []string{"GET"}, Path: "/a/{repository}/b/{ref}/*"}}}, j)
		if err != nil {
			return
		}
		path := r.Requests[0].Path
		if path != fmt.Sprintf("/a/%s/b/%s/*", repository, ref) || r.Requests[0].Check() != nil || strings.Count(path, "*") != 1 || strings.Contains(path, "..") && strings.Contains("/"+path+"/", "/../") {
			t.Errorf("%q and %q made %q", repository, ref, path)
		}
	})
}
