package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/runner/audit"
)

// TestExplainStuck: a lease that could not be revoked in time is said to be stuck,
// with the reason, until it was seen dead; another of the same job is not.
func TestExplainStuck(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f, err := audit.OpenFile(dir, audit.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range []audit.Event{
		{Action: "lease.request", Object: "mf-a-l-good"},
		{Action: "lease.request", Object: "mf-a-l-bad"},
		{Action: "lease.revoke", Object: "mf-a-l-good", Result: "ok"},
		{Action: "lease.revoke", Object: "mf-a-l-bad", Result: "dial: refused"},
		{Action: "release.stuck", Object: "mf-a", Result: "mf-a-l-bad: dial: refused"},
		{Action: "lease.revoke", Object: "mf-a-l-bad", Result: "ok"},
	} {
		e.Job, e.Time = "mf-a", time.Now()
		if err := f.Append(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	for lease, want := range map[string]string{"mf-a-l-good": "revoked", "mf-a-l-bad": "revoked stuck revoked"} {
		var out bytes.Buffer
		c := &call{stdout: &out, stderr: &out}
		if err := c.explainAudit(&options{output: "text"}, dir, "", lease); err != nil {
			t.Fatal(err)
		}
		var ends []string
		for line := range strings.Lines(out.String()) {
			if w := strings.Fields(line); len(w) > 0 && (w[0] == "revoked" || w[0] == "stuck") {
				ends = append(ends, w[0])
			}
		}
		if got := strings.Join(ends, " "); got != want || strings.Contains(want, "stuck") && !strings.Contains(out.String(), "mf-a-l-bad: dial: refused") {
			t.Errorf("%s: got %q, want %q: %s", lease, got, want, &out)
		}
	}
}

// TestExplainRequired: who approved a lease is said, and why one was never asked for.
func TestExplainRequired(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f, err := audit.OpenFile(dir, audit.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range []audit.Event{
		{Action: "lease.require", Object: "mf-a-l-given", Result: "ok", Detail: map[string]string{"approved_by": "alice", "approval_digest": "sha256:1"}},
		{Action: "lease.request", Object: "mf-a-l-given", Detail: map[string]string{"issuer": "registry"}},
		{Action: "lease.revoke", Object: "mf-a-l-given", Result: "ok"},
		{Action: "lease.require", Object: "mf-a-l-held", Result: "no approval", Detail: map[string]string{"step": "publish"}},
	} {
		e.Job, e.Time = "mf-a", time.Now()
		if err := f.Append(t.Context(), e); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string][]string{
		"mf-a-l-given": {"approved_by alice", "sha256:1", "issuer     registry", "revoked"},
		"mf-a-l-held":  {"no approval", "step publish", "it was not asked for"},
		"mf-a":         {"approved_by alice", "it was not asked for"},
	} {
		var out bytes.Buffer
		c := &call{stdout: &out, stderr: &out}
		if err := c.explainAudit(&options{output: "text"}, dir, "", name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, text := range want {
			if strings.Count(out.String(), text) != 1 {
				t.Errorf("%s: want %q once in it: %s", name, text, &out)
			}
		}
	}
}

// TestUseName: uses are those of the lease that was in use, renewed or not.
func TestUseName(t *testing.T) {
	t.Parallel()
	for lease, want := range map[string]string{
		"mf-abc-l-db": "db", "mf-abc-l1-db": "db#1", "mf-abc-lz-a-b": "a-b#35", "mf-abc-l10-l-x": "l-x#36", "mf-abc-l-l1-x": "l1-x",
	} {
		if got := useName(lease); got != want || jobOf(lease) != "mf-abc" {
			t.Errorf("%s: got %q of %q, want %q", lease, got, jobOf(lease), want)
		}
	}
	if jobOf("mf-abc") != "mf-abc" {
		t.Error("a job is not its own")
	}
}
