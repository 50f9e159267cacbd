package runner_test

import (
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// TestServicesAreNotKept: the box of a failed job may stay, those of its
// services do not.
func TestServicesAreNotKept(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		rules, err := policy.Parse([]byte(servicesPolicy+"    keep-on-failure: 10m\n"), "policy.yaml")
		if err != nil {
			t.Fatal(err)
		}
		stop := w.serve(w.agent(func(c *runner.Config) {
			c.Policy, c.Keep, c.Once = rules, 1, false
			c.Runtimes["native"] = serving{
				worldRuntime{w.boxes, w},
				map[string]string{"docker.io/library/postgres:16": "print up\nblock"},
				&sync.Mutex{}, &[]sandbox.Pull{},
				map[string]sandbox.Spec{},
				"",
			}
		}))
		j := job(providers.Step{Run: "exit 3"})
		j.Containers = []providers.Container{container("db", "postgres:16", "")}
		w.offers <- j
		if r := <-w.results; r.Conclusion != providers.Failure {
			t.Errorf("got %+v, want a failure", r)
		}
		synctest.Wait()
		if boxes := w.boxNames(); len(boxes) != 1 || !strings.HasSuffix(boxes[0], "-box") {
			t.Errorf("after the report: got boxes %v, want the job's alone", boxes)
		}
		if len(w.gates) > 0 {
			t.Errorf("after the report: got gateways %v, want none", w.gates)
		}
		stop()
		w.clean()
	})
}

// TestServiceRefusal: what a service may not reach is said of the service, with
// the rule that would allow it there.
func TestServiceRefusal(t *testing.T) {
	t.Parallel()
	tell := func(name string, o egress.Opening) {
		if strings.HasSuffix(name, "-s0-gw") {
			line := egress.Line{Gateway: name, Network: "dns", Name: "mirror.example", Verdict: egress.Refused, Reason: "no rule allows this name"}
			if err := o.Ledger(line); err != nil {
				t.Error(err)
			}
		}
	}
	got := serveAnd(t, tell, map[string]string{"docker.io/library/postgres:16": "block"}, nil,
		container("db", "postgres:16", "--health-cmd 'print ok'"))
	const want = "mayfly: service db: refused: no rule allows this name; a rule that would allow it: - {name: mirror.example, port: 443, protocol: tls, service: db}\n"
	if !strings.Contains(got.shown(), want) {
		t.Errorf("log: got %q, want %q in it", got.shown(), want)
	}
}
