package hostile_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/postgrestest"
)

const year = 365 * 24 * time.Hour

// A clock that jumps for years while jobs run, in both directions, ends none of
// them early and none late, costs no lease its end, and leaves the record in
// order: what is bounded is bounded by time that passes, and the database is
// asked for its own.
func TestClockThatJumps(t *testing.T) {
	t.Parallel()
	db := postgrestest.Start(t)
	w := agenttest.New(t, agenttest.Config{Database: db, Policy: fmt.Sprintf(`version: 1
rules:
  - name: all
    match: {trust: local}
    timeout: 1m
    limits: {memory: 256MiB, pids: 64, cpu: 1, disk: 32MiB}
    egress:
      - {name: db.test, port: %d, protocol: tcp, resolve: [127.0.0.1]}
    leases:
      - {name: db, issuer: db, env: {PGUSER: username, PGPASSWORD: password}, scope: {schemas: [{name: public, privileges: [usage]}]}}
`, db.Port())})
	clock := agenttest.NewClock(t, w)
	login := fmt.Sprintf("psql -h db.test -p %d -d postgres -Atc 'select 40+2'", db.Port())
	long := w.Workflow(t, "long", "      - run: printf 'beg''un\\n'; while test ! -e go; do sleep 0.1; "+login+" >>/dev/null || exit 3; test $(date +%s) -gt 0; i=$((i+1)); test $i -lt 20 || touch go; done; "+login+"\n")
	bounded := w.Workflow(t, "bounded", "      - run: printf 'beg''un\\n'; sleep 100\n        timeout-minutes: 0.05\n")
	a := w.Start(t)
	for _, jump := range []time.Duration{40 * year, -20 * year, time.Minute, -time.Second, 0} {
		id := begins(t, w, long)
		clock.Jump(t, jump)
		ends(t, w, id, providers.Success, "")
		if log := w.Log(t, id); !strings.Contains(log, "\n42\n") {
			t.Errorf("after a jump of %v the job says %q, want 42 from the database", jump, log)
		}
		id = begins(t, w, bounded)
		clock.Jump(t, -jump)
		ends(t, w, id, providers.Failure, "")
		if !strings.Contains(w.Log(t, id), "the step's time is over") {
			t.Errorf("after a jump of %v a step that must time out says %q", -jump, w.Log(t, id))
		}
	}
	id := begins(t, w, long)
	a.Kill()
	clock.Jump(t, -30*year)
	a = w.Start(t)
	ends(t, w, id, providers.Lost, "")
	w.Good(t)
	a.Stop(t)
	owesNothing(t, w)
	seen := map[int]bool{}
	for e, err := range audit.Read(w.State+"/audit", audit.Filter{}) {
		agenttest.Must(t, err)
		seen[e.Time.Year()] = true
	}
	if len(seen) < 3 {
		t.Errorf("the record has the years %v: the clock did not jump for the agent", seen)
	}
	roles, err := agenttest.Query(t.Context(), w, "select rolname from pg_roles where rolname !~ '^pg_' and rolname <> 'postgres'")
	if err != nil || len(roles) > 0 {
		t.Errorf("roles left: %v, %v", roles, err)
	}
}
