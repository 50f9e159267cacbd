package credstest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// TestFakeOutlivesItsProcess: what one fake issued, another one over the same
// directory revokes.
func TestFakeOutlivesItsProcess(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var points []string
	first, err := NewFake(FakeConfig{Dir: dir, Owner: "a", Trace: func(p string) { points = append(points, p) }})
	if err != nil {
		t.Fatal(err)
	}
	second, err := NewFake(FakeConfig{Dir: dir, Owner: "b"})
	if err != nil {
		t.Fatal(err)
	}
	l, err := first.Issue(t.Context(), "mf-1", creds.Grant{Expires: time.Now().Add(time.Minute)})
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Use(t.Context(), l); err != nil {
		t.Errorf("use at the second fake: %v", err)
	}
	if infos, err := second.List(t.Context()); err != nil || len(infos) > 0 {
		t.Errorf("list of owner b: got %+v and %v, want nothing of owner a", infos, err)
	}
	if err := first.SetDown(true); err != nil {
		t.Fatal(err)
	}
	if err := second.Revoke(t.Context(), "mf-1", nil); !errors.Is(err, ErrDown) {
		t.Errorf("revoke while down: got %v, want ErrDown", err)
	}
	if err := second.SetDown(false); err != nil {
		t.Fatal(err)
	}
	if live, err := second.Live(); err != nil || !slices.Equal(live, []string{"mf-1"}) {
		t.Errorf("live: got %v and %v, want mf-1", live, err)
	}
	if err := second.Revoke(t.Context(), "mf-1", nil); err != nil {
		t.Errorf("revoke by name: %v", err)
	}
	if err := first.Use(t.Context(), l); !errors.Is(err, ErrRefused) {
		t.Errorf("use of a revoked token: got %v, want ErrRefused", err)
	}
	if want := []string{"fake.issue.before", "fake.issue.after"}; !slices.Equal(points, want) {
		t.Errorf("trace: got %v, want %v", points, want)
	}
}

func TestFakeExpires(t *testing.T) {
	t.Parallel()
	now := time.Now()
	f, err := NewFake(FakeConfig{Dir: t.TempDir(), Owner: "a", Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	l, err := f.Issue(t.Context(), "mf-1", creds.Grant{Expires: now.Add(time.Minute)})
	if err != nil {
		t.Fatal(err)
	}
	now = now.Add(time.Minute)
	if err := f.Use(t.Context(), l); !errors.Is(err, ErrRefused) {
		t.Errorf("use of an expired token: got %v, want ErrRefused", err)
	}
	if err := probed(f.Probe(t.Context(), "mf-1", l.Handle)); err != nil {
		t.Error(err)
	}
}

func TestFakeHookAndDir(t *testing.T) {
	t.Parallel()
	broken := errors.New("as asked")
	f, err := NewFake(FakeConfig{Dir: t.TempDir(), Owner: "a", Hook: func(_ context.Context, method, name string) error {
		if method == "issue" && name == "mf-2" {
			return broken
		}
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	g := creds.Grant{Expires: time.Now().Add(time.Minute)}
	if _, err := f.Issue(t.Context(), "mf-1", g); err != nil {
		t.Error(err)
	}
	if _, err := f.Issue(t.Context(), "mf-2", g); !errors.Is(err, broken) {
		t.Errorf("issue with a hook: got %v, want the hook's error", err)
	}
	for _, name := range []string{"", "../x", "!down", "A"} {
		if _, err := f.Issue(t.Context(), name, g); err == nil {
			t.Errorf("issue of name %q: got nil, want an error", name)
		}
	}
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"", "/no/such/dir", file} {
		if _, err := NewFake(FakeConfig{Dir: dir}); err == nil {
			t.Errorf("NewFake with dir %q: got nil, want an error", dir)
		}
	}
}
