package runner_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/policy"
)

// A policy that is replaced holds for jobs that are admitted afterwards; one
// that cannot be read or written down changes nothing.
func TestReload(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.offers <- job(providers.Step{Run: "block", TimeoutMinutes: "5", ContinueOnError: "true"},
			providers.Step{ID: "deploy", Run: "env DEPLOY_KEY"}) // gets what the first policy grants
		a, stop := w.start(func(c *runner.Config) { c.Once = false })
		time.Sleep(time.Minute)
		old := a.Status().Policy
		nothing, err := policy.Parse([]byte("version: 1\nrules:\n  - {name: none, match: {trust: [fork]}}\n"), "policy.yaml")
		if err != nil {
			t.Fatal(err)
		}
		if err := a.Reload(t.Context(), nil, errDown); err == nil || a.Status().Policy != old {
			t.Errorf("a bad policy: got %v and policy %s, want an error and the old one", err, a.Status().Policy)
		}
		w.failWith(func(call, _ string) error {
			if call == "audit.policy.reload" {
				return errDown
			}
			return nil
		})
		if err := a.Reload(t.Context(), nothing, nil); err == nil || a.Status().Policy != old {
			t.Errorf("without audit: got %v and policy %s, want an error and the old one", err, a.Status().Policy)
		}
		w.failWith(func(string, string) error { return nil })
		if err := a.Reload(t.Context(), nothing, nil); err != nil || a.Status().Policy != nothing.Digest() {
			t.Errorf("got %v and policy %s, want the new one", err, a.Status().Policy)
		}
		w.offers <- job(providers.Step{Run: "print never"})
		if r := <-w.results; r.Conclusion != providers.Success || !strings.Contains(w.shown(), "***") {
			t.Errorf("admitted before: got %+v, want success with its lease; log:\n%s", r, w.shown())
		}
		if r := <-w.results; r.Conclusion != providers.Refused {
			t.Errorf("admitted afterwards: got %+v, want refused", r)
		}
		stop()
		events := w.did("policy.reload")
		if len(events) != 2 || events[0].Result != "down" || events[0].Detail["old"] != old || events[0].Detail["new"] != "" ||
			events[1].Result != "ok" || events[1].Detail["old"] != old || events[1].Detail["new"] != nothing.Digest() {
			t.Errorf("policy.reload: got %+v, want the failure and the change", events)
		}
		admitted := w.did("job.admit")
		if len(admitted) != 2 || admitted[0].Detail["policy"] != old || admitted[1].Detail["policy"] != nothing.Digest() {
			t.Errorf("job.admit: got %+v, want each with its policy", admitted)
		}
		w.clean()
	})
}
