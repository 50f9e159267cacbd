// Package chaos_test kills the agent at random moments, again and again, while
// it has jobs, and then compares the machine with what it was before.
package chaos_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/local"
	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/postgrestest"
)

func TestMain(m *testing.M) { agenttest.Main(m) }

const slots = 4

// policy gives a role to the jobs of two workflows, of one for a step only.
const policy = `version: 1
rules:
  - name: lease
    match: {trust: local, workflow: .github/workflows/lease.yml}
    timeout: 2m
    limits: {memory: 256MiB, pids: 64, cpu: 1, disk: 32MiB}
    egress:
      - {name: db.test, port: %[1]d, protocol: tcp, resolve: [127.0.0.1]}
    leases:
      - name: db
        issuer: db
        scope: {schemas: [{name: public, privileges: [usage], tables: [{names: [runs], privileges: [insert, select]}]}]}
        env: {PGUSER: username, PGPASSWORD: password, PGPORT: port}
  - name: step
    match: {trust: local, workflow: .github/workflows/step.yml}
    timeout: 2m
    limits: {memory: 256MiB, pids: 64, cpu: 1, disk: 32MiB}
    egress:
      - {name: db.test, port: %[1]d, protocol: tcp, resolve: [127.0.0.1], step: migrate}
    leases:
      - name: db
        issuer: db
        step: migrate
        scope: {schemas: [{name: public, privileges: [usage], tables: [{names: [runs], privileges: [insert, select]}]}]}
        env: {PGUSER: username, PGPASSWORD: password, PGPORT: port}
  - name: all
    match: {trust: local}
    timeout: 2m
    limits: {memory: 256MiB, pids: 64, cpu: 1, disk: 32MiB}
`

const insert = `psql -qAt -h db.test -d postgres -c "insert into runs values ('${{ github.run_id }}')"`

// workflows are the kinds of jobs, and how one of each ends unless it is lost.
var workflows = [...]struct {
	name, steps string
	end         providers.Conclusion
}{
	{"plain", "      - run: echo ran ${{ github.run_id }}; echo x > file\n      - run: test -s file\n", providers.Success},
	{"lease", "      - run: echo ran ${{ github.run_id }}\n      - run: " + insert + "\n", providers.Success},
	{"sleep", "      - run: echo ran ${{ github.run_id }}; (sleep 300 &); sleep 0.3\n", providers.Success},
	{"step", "      - run: echo ran ${{ github.run_id }}\n      - id: migrate\n        run: " + insert + "\n      - run: test -z \"${PGPASSWORD:-}\"\n", providers.Success},
	{"fail", "      - run: echo ran ${{ github.run_id }}; exit 7\n", providers.Failure},
}

// sizes are how many jobs and kills there are. CHAOS_JOBS and CHAOS_KILLS change
// them.
func sizes(t *testing.T) (jobs, kills int) {
	return number(t, "CHAOS_JOBS", 200), number(t, "CHAOS_KILLS", 30)
}

func number(t *testing.T, variable string, otherwise int) int {
	text := os.Getenv(variable)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s=%q: want a number", variable, text)
	}
	return n
}

func seed(t *testing.T) uint64 {
	s := rand.Uint64()
	if text := os.Getenv("MAYFLY_SEED"); text != "" {
		var err error
		if s, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("MAYFLY_SEED=%q: want the number that a run has printed", text)
		}
	}
	t.Logf("MAYFLY_SEED=%d", s)
	return s
}

// world is an agent with a database, and with warm boxes for some of its jobs. It
// has had one job of each kind, so that what an agent makes once for all of its
// jobs is there.
func world(t *testing.T) (*agenttest.World, []string) {
	db := postgrestest.Start(t)
	w := agenttest.New(t, agenttest.Config{Slots: slots, Warm: slots / 2, Policy: fmt.Sprintf(policy, db.Port()), Database: db})
	for _, sql := range []string{"create table runs (id text)", "grant usage on schema public to public"} {
		_, err := agenttest.Query(t.Context(), w, sql)
		agenttest.Must(t, err)
	}
	var files, ids []string
	for _, f := range workflows {
		files = append(files, w.Workflow(t, f.name, f.steps))
	}
	a := w.Start(t)
	for i := range workflows {
		ids = append(ids, w.Submit(t, files[i]))
	}
	for i, f := range workflows {
		if r := w.Result(t, ids[i], time.Minute); r.Conclusion != f.end {
			t.Fatalf("%s with nobody killed: %s (%s), want %s: %s", f.name, r.Conclusion, r.Reason, f.end, w.Log(t, ids[i]))
		}
	}
	a.Stop(t)
	return w, files
}

func TestKillsLeaveNothing(t *testing.T) {
	jobs, kills := sizes(t)
	dice := rand.New(rand.NewPCG(seed(t), 0))
	w, files := world(t)
	before := w.Snapshot(t)

	begun := time.Now()
	ids := make([]string, 0, jobs)
	submit := func(upTo int) {
		for len(ids) < upTo {
			ids = append(ids, w.Submit(t, files[len(ids)%len(files)]))
		}
	}
	for kill := range kills {
		submit(jobs * (kill + 1) / (kills + 1))
		// From the first instruction to the middle of the second round of jobs.
		pause := time.Duration(dice.Int64N(int64(1500 * time.Millisecond)))
		a := w.Launch(t)
		<-time.After(pause)
		if a.Over() {
			t.Fatalf("life %d ended by itself:\n%s", kill, a.Log())
		}
		a.Kill()
	}
	submit(jobs)
	last := w.Launch(t)
	lost := 0
	for i, id := range ids {
		if checkJob(t, w, i, id) == providers.Lost {
			lost++
		}
	}
	last.Stop(t)
	t.Logf("%d jobs, %d kills, %d jobs lost, %v", jobs, kills, lost, time.Since(begun).Round(time.Second))
	if lost > kills*slots {
		t.Errorf("%d jobs are lost, want at most the %d that %d kills can hit", lost, kills*slots, kills)
	}
	if kills >= 10 && lost == 0 {
		t.Errorf("none of %d kills hit a running job: they test nothing", kills)
	}
	checkEnd(t, w, kills)
	w.Unchanged(t, before)
}

// checkJob wants one result of the job, its own or lost, and that it ran once.
func checkJob(t *testing.T, w *agenttest.World, i int, id string) providers.Conclusion {
	t.Helper()
	r := w.Result(t, id, 3*time.Minute)
	kind := workflows[i%len(workflows)]
	if r.Conclusion != kind.end && r.Conclusion != providers.Lost {
		t.Errorf("job %s (%s): %s (%s), want %s or lost; it printed:\n%s", id, kind.name, r.Conclusion, r.Reason, kind.end, w.Log(t, id))
	}
	// At the beginning of a line: the agent's own may name the step by its command.
	switch n := strings.Count("\n"+w.Log(t, id), "\nran "+id); {
	case n > 1:
		t.Errorf("job %s (%s) ran %d times, want at most once", id, kind.name, n)
	case n == 0 && r.Conclusion != providers.Lost:
		t.Errorf("job %s (%s) ended as %s and its log does not show that it ran", id, kind.name, r.Conclusion)
	}
	return r.Conclusion
}

// checkEnd wants nothing to be owed, an unbroken record over all lives, an empty
// spool, and that no job wrote twice to the database.
func checkEnd(t *testing.T, w *agenttest.World, kills int) {
	t.Helper()
	if out, code := w.Run(t, "jobs"); code != 0 || !strings.Contains(out, "nothing is owed") {
		t.Errorf("mayfly jobs: %s (status %d), want nothing owed", out, code)
	}
	if out, code := w.Run(t, "audit", "show", "--action", "box.adopt"); code != 0 || !strings.Contains(out, "pool-") {
		t.Errorf("mayfly audit show: %s (status %d), want jobs that adopted a warm box", out, code)
	}
	if out, code := w.Run(t, "audit", "verify"); code != 0 {
		t.Errorf("mayfly audit verify after %d kills: %s (status %d)", kills, out, code)
	}
	for _, part := range []string{"new", "claimed", "cancel"} {
		left, err := os.ReadDir(filepath.Join(w.Spool, part))
		agenttest.Must(t, err)
		for _, e := range left {
			t.Errorf("%s/%s is left in the spool", part, e.Name())
		}
	}
	twice, err := agenttest.Query(t.Context(), w, "select id from runs group by id having count(*) > 1")
	agenttest.Must(t, err)
	if len(twice) > 0 {
		t.Errorf("jobs that wrote twice: %v", twice)
	}
	wrote, err := agenttest.Query(t.Context(), w, "select id from runs")
	agenttest.Must(t, err)
	for _, id := range wrote {
		if r, err := local.ReadResult(w.Spool, id); err != nil {
			t.Errorf("job %s wrote to the database and has no result: %+v, %v", id, r, err)
		}
	}
}
