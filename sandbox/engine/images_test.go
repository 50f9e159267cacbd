package engine

import (
	"errors"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox"
)

func TestNames(t *testing.T) {
	t.Parallel()
	d := "sha256:" + strings.Repeat("1", 64)
	for _, c := range []struct{ text, full, repository, digest string }{
		{"debian", "docker.io/library/debian:latest", "docker.io/library/debian", ""},
		{"debian:12", "docker.io/library/debian:12", "docker.io/library/debian", ""},
		{"a/b@" + d, "docker.io/a/b@" + d, "docker.io/a/b", d},
		{"registry.example:5000/a/b:c@" + d, "registry.example:5000/a/b@" + d, "registry.example:5000/a/b", d},
		{d, d, "", d},
		{d[7:], d, "", d},
	} {
		n, err := ParseName(c.text)
		if err != nil || n.Full != c.full || n.Repository != c.repository || n.Digest != c.digest {
			t.Errorf("%s: got %+v, %v, want %+v", c.text, n, err, c)
		}
	}
	for _, bad := range []string{"", "A", "a b", "a:b:c", "../a", "a@sha256:00", "a@sha512:" + strings.Repeat("0", 128), "a\n", "http://a/b"} {
		if n, err := ParseName(bad); !errors.Is(err, sandbox.ErrImage) {
			t.Errorf("%q: got %+v, %v, want ErrImage", bad, n, err)
		}
	}
}

func TestPatterns(t *testing.T) {
	t.Parallel()
	d := "sha256:" + strings.Repeat("1", 64)
	for _, c := range []struct {
		from, name string
		want       bool
	}{
		{"docker.io/library/debian", "debian:12", true},
		{"docker.io/library/debian", "debian@" + d, true},
		{"docker.io/library/debian", "debian-evil:12", false},
		{"docker.io/library/debian:12", "debian:12", true},
		{"docker.io/library/debian:12", "debian:13", false},
		{"docker.io/library/debian:12", "debian@" + d, false}, // the tag is not looked at
		{"docker.io/library/debian@" + d, "debian:12@" + d, true},
		{"docker.io/library/*", "debian", true},
		{"docker.io/*", "debian", false},
		{"docker.io/**", "a/b", true},
		{"registry.example/team/**", "registry.example/team/a/b:c", true},
		{"registry.example/team/**", "registry.example/teams/a", false},
		{"registry.example/team/**", "registryXexample/team/a", false},
		{"registry.example/**", "registry.example:5000/a", false},
		{"**/app", "registry.example/app:1", true},
	} {
		n, err := ParseName(c.name)
		if err != nil {
			t.Fatal(err)
		}
		if got := (Images{From: []string{c.from}}).Pulls(n); got != c.want {
			t.Errorf("from %s, %s: got %v, want %v", c.from, c.name, got, c.want)
		}
		if (Images{Pull: Never, From: []string{c.from}}).Pulls(n) {
			t.Errorf("from %s, %s, never: pulls", c.from, c.name)
		}
	}
	for _, bad := range []Images{
		{Pull: "sometimes"}, {From: []string{"debian"}}, {From: []string{"library/debian"}}, {From: []string{"**"}}, {From: []string{"*/**"}}, {From: []string{"/a"}},
	} {
		if err := bad.Check(); err == nil {
			t.Errorf("%+v: got nil, want an error", bad)
		}
	}
	if err := (Images{Pull: Always, From: []string{"localhost/a", "docker.io/library/*"}}).Check(); err != nil {
		t.Error(err)
	}
}
