package policy

import (
	"errors"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
)

const digest = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// TestAllowImage: an image is judged by what it is in full, and nothing that is
// no image of a registry is one.
func TestAllowImage(t *testing.T) {
	t.Parallel()
	p, err := Parse([]byte(`version: 1
rules:
  - name: all
    match: {trust: local}
    images: ["docker.io/library/postgres:*", "docker.io/library/redis:7*", "registry.example:5000/team/*@sha256:*", "localhost/x:1"]
`), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	plan, err := p.Decide(providers.Job{Trust: providers.TrustLocal})
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"postgres":                            "docker.io/library/postgres:latest",
		"postgres:16":                         "docker.io/library/postgres:16",
		"docker.io/postgres:16":               "docker.io/library/postgres:16",
		"index.docker.io/library/postgres:16": "docker.io/library/postgres:16",
		"redis:7.2":                           "docker.io/library/redis:7.2",
		"registry.example:5000/team/app@" + digest:   "registry.example:5000/team/app@" + digest,
		"registry.example:5000/team/app:1@" + digest: "registry.example:5000/team/app@" + digest,
		"localhost/x:1":                    "localhost/x:1",
		"redis:7@" + digest:                "", // the tag says nothing then
		"postgres@" + digest:               "",
		"redis:6":                          "",
		"redis":                            "",
		"other/postgres:16":                "",
		"evil.example/library/postgres:16": "",
		"docker.io.evil.example/library/postgres:16":   "",
		"registry.example:5000/team/app:1":             "",
		"registry.example:5000/team/sub/app@" + digest: "",
		"registry.example/team/app@" + digest:          "",
		"":                                             "",
		"postgres:":                                    "",
		"postgres:16 ":                                 "",
		"/etc/passwd":                                  "",
		"./postgres:16":                                "",
		"oci:/var/lib/x":                               "",
		"docker://postgres:16":                         "",
		"Postgres:16":                                  "",
		"postgres@sha256:00":                           "",
		"postgres@md5:0123456789abcdef0123456789abcdef":  "",
		"library/postgres:16/../../x":                    "",
		"user:pw@docker.io/library/postgres:16":          "",
		"docker.io/library/postgres:16\nx":               "",
		"docker.io/library/" + strings.Repeat("a/", 200): "",
	} {
		got, err := plan.AllowImage(name)
		if got != want || (err == nil) != (want != "") || err != nil && !errors.Is(err, ErrDenied) {
			t.Errorf("%q: got %q, %v, want %q", name, got, err, want)
		}
	}
	none, err := Nothing().Decide(providers.Job{Trust: providers.TrustLocal, Subject: creds.Subject{Provider: "local"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := none.AllowImage("postgres"); !errors.Is(err, ErrDenied) || !strings.Contains(err.Error(), `add images: ["docker.io/library/postgres:latest"] to the rule`) {
		t.Errorf("a rule without images: got %v, want a refusal that says what to add", err)
	}
}

// FuzzAllowImage: what is allowed is written in full and allowed again.
func FuzzAllowImage(f *testing.F) {
	for _, seed := range []string{"postgres", "a.b/c:1", "localhost:5000/x@" + digest, "a//b", "docker.io/x/y"} {
		f.Add(seed)
	}
	plan := Plan{Images: []string{"**"}}
	f.Fuzz(func(t *testing.T, name string) {
		full, err := plan.AllowImage(name)
		if err != nil {
			return
		}
		again, err := plan.AllowImage(full)
		if err != nil || again != full || !strings.Contains(full, "/") || strings.ContainsAny(full, " \n\x00") {
			t.Errorf("%q is %q in full, and that is %q, %v", name, full, again, err)
		}
	})
}
