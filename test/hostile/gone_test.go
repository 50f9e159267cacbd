package hostile_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/local"
	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/postgrestest"
)

// A database that is down while its role should be revoked holds the report
// back: the service hears of the end when the role is proven dead.
func TestDatabaseDownDuringRelease(t *testing.T) {
	t.Parallel()
	db := postgrestest.Start(t)
	w := agenttest.New(t, agenttest.Config{Database: db, Policy: fmt.Sprintf(`version: 1
rules:
  - name: all
    match: {trust: local}
    limits: {memory: 256MiB, pids: 64, cpu: 1, disk: 32MiB}
    egress:
      - {name: db.test, port: %d, protocol: tcp, resolve: [127.0.0.1]}
    leases:
      - {name: db, issuer: db, env: {PGUSER: username, PGPASSWORD: password}, scope: {schemas: [{name: public, privileges: [usage]}]}}
`, db.Port())})
	a := w.Start(t)
	id := begins(t, w, w.Workflow(t, "long", "      - run: test -n \"$PGPASSWORD\"; trap 'echo the end; exit' INT; echo begun; while :; do sleep 0.1; done\n"))
	agenttest.Must(t, db.Stop(t.Context()))
	agenttest.Must(t, local.Cancel(w.Spool, id)) // so that it ends after the database
	agenttest.Eventually(t, time.Minute, "the step ends", func() bool { return strings.Contains(w.Log(t, id), "the end") })
	agenttest.Eventually(t, time.Minute, "a revocation is tried", func() bool { return strings.Contains(a.Log(), `"message":"release"`) })
	if agenttest.Within(2*time.Second, func() bool { _, err := local.ReadResult(w.Spool, id); return err == nil }) {
		t.Errorf("the job was reported while its role may live")
	}
	// Whoever looks sees what is stuck, and why.
	if out, code := w.Run(t, "jobs"); code != 0 || !strings.Contains(out, "by db  stuck since ") {
		t.Errorf("mayfly jobs: status %d: %s", code, out)
	}
	if out, code := w.Run(t, "doctor"); code != 1 || !strings.Contains(out, "missing  leases: stuck  (mf-") {
		t.Errorf("mayfly doctor: status %d: %s", code, out)
	}
	if !strings.Contains(a.Log(), `"issuer":"db"`) || !strings.Contains(a.Log(), "lease is stuck") {
		t.Errorf("the agent raised no alarm: %s", a.Log())
	}
	agenttest.Must(t, db.Restart(t.Context()))
	back := time.Now()
	ends(t, w, id, providers.Cancelled, "")
	result, err := local.ReadResult(w.Spool, id)
	agenttest.Must(t, err)
	if result.CompletedAt.Before(back) {
		t.Errorf("reported at %v, before the database was back at %v", result.CompletedAt, back)
	}
	proven := false
	for e, err := range audit.Read(filepath.Join(w.State, "audit"), audit.Filter{Job: result.Name, Action: "lease.revoke"}) {
		agenttest.Must(t, err)
		proven = proven || e.Result == "ok" && e.Detail["refusal"] != "" && e.Time.Before(result.CompletedAt)
	}
	if !proven {
		t.Errorf("no proof in the record, from before the report, that the role is dead")
	}
	roles, err := agenttest.Query(t.Context(), w, "select rolname from pg_roles where rolname !~ '^pg_' and rolname <> 'postgres'")
	if err != nil || len(roles) > 0 {
		t.Errorf("roles left: %v, %v", roles, err)
	}
	w.Good(t)
	a.Stop(t)
	owesNothing(t, w)
}

// Process 1 of a box that is killed from outside takes the box with it.
func TestGuestKilled(t *testing.T) {
	w := agenttest.New(t, agenttest.Config{})
	a := w.Start(t)
	id := begins(t, w, w.Workflow(t, "long", "      - run: echo begun; sleep 60\n"))
	killed := time.Now()
	agenttest.Must(t, syscall.Kill(guest(t, w), syscall.SIGKILL))
	ends(t, w, id, providers.Failure, "")
	if !strings.Contains(w.Log(t, id), "sandbox died") {
		t.Errorf("the log does not say that the box died: %s", w.Log(t, id))
	}
	t.Logf("reported %v later", time.Since(killed).Round(time.Millisecond))
	if r, err := local.ReadResult(w.Spool, id); err != nil || time.Since(killed) > 30*time.Second {
		t.Errorf("reported after %v (%v, %v), want it soon and not when the step ends", time.Since(killed), r, err)
	}
	w.Good(t)
	a.Stop(t)
	owesNothing(t, w)
}

// guest finds process 1 of the only box.
func guest(t *testing.T, w *agenttest.World) int {
	t.Helper()
	found := 0
	dirs, err := filepath.Glob("/proc/[0-9]*")
	agenttest.Must(t, err)
	for _, dir := range dirs {
		b, err := os.ReadFile(filepath.Join(dir, "status"))
		group, gerr := os.ReadFile(filepath.Join(dir, "cgroup"))
		if err != nil || gerr != nil || !strings.Contains(string(group), w.Cgroup) {
			continue
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 2 && f[0] == "NSpid:" && f[len(f)-1] == "1" {
				found, err = strconv.Atoi(filepath.Base(dir))
				agenttest.Must(t, err)
			}
		}
	}
	if found == 0 {
		t.Fatal("no process 1 of a box")
	}
	return found
}
