// Package chaos_test kills the agent at random moments, again and again, while
// it has jobs, and then compares the machine with what it was before.
package chaos_test

import (
	"context"
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

const slots = 4

// policy gives a role to the jobs of two workflows, of one for a step only.
const policy = `version: 1
rules:
  - name: lease
    match: {trust: local, workflow: .github/workflows/lease.yml}
    runtime: %[2]s
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
    runtime: %[2]s
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
    runtime: %[2]s
    timeout: 2m
    limits: {memory: 256MiB, pids: 64, cpu: 1, disk: 32MiB}
`

// A workflow is a kind of job, and how one of it ends unless it is lost.
type workflow struct {
	name, steps string
	end         providers.Conclusion
}

// workflows are the kinds of jobs. use is what those that have a role do with it.
func workflows(use string) []workflow {
	return []workflow{
		{"plain", "      - run: echo ran ${{ github.run_id }}; echo x > file\n      - run: test -s file\n", providers.Success},
		{"lease", "      - run: echo ran ${{ github.run_id }}\n      - run: " + use + "\n", providers.Success},
		{"sleep", "      - run: echo ran ${{ github.run_id }}; (sleep 300 &); sleep 0.3\n", providers.Success},
		{"step", "      - run: echo ran ${{ github.run_id }}\n      - id: migrate\n        run: " + use + "\n      - run: test -z \"${PGPASSWORD:-}\"\n", providers.Success},
		{"fail", "      - run: echo ran ${{ github.run_id }}; exit 7\n", providers.Failure},
	}
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

// A world is an agent with a database.
type world struct {
	*agenttest.World
	setting
	in    engine
	kinds []workflow
	files []string // of each kind
}

// newWorld makes a world that has had one job of each kind, so that what an agent
// makes once for all of its jobs is there.
func newWorld(t *testing.T, s setting) *world {
	var e engine
	if s.engine != nil {
		e = s.engine(t)
	}
	db := postgrestest.Start(t)
	w := &world{setting: s, in: e, kinds: workflows(s.use), World: agenttest.New(t, agenttest.Config{
		Slots: slots, Warm: s.warm, Policy: fmt.Sprintf(policy, db.Port(), s.runtime), Database: db, Sandbox: e.lines,
	})}
	for _, sql := range []string{"create table runs (id text)", "grant usage on schema public to public"} {
		_, err := agenttest.Query(t.Context(), w.World, sql)
		agenttest.Must(t, err)
	}
	for _, f := range w.kinds {
		w.files = append(w.files, w.Workflow(t, f.name, f.steps))
	}
	a := w.Start(t)
	var ids []string
	for i := range w.kinds {
		ids = append(ids, w.Submit(t, w.files[i]))
	}
	for i, f := range w.kinds {
		if r := w.Result(t, ids[i], time.Minute); r.Conclusion != f.end {
			t.Fatalf("%s with nobody killed: %s (%s), want %s: %s", f.name, r.Conclusion, r.Reason, f.end, w.Log(t, ids[i]))
		}
	}
	a.Stop(t)
	if e.left != nil {
		w.Engine = func(ctx context.Context) ([]string, error) { return e.left(ctx, w.State) }
		w.Lazy = []string{e.lazy}
		agenttest.Eventually(t, time.Minute, "the engine has nothing of the first jobs", func() bool {
			found, err := w.Engine(t.Context())
			agenttest.Must(t, err)
			return len(found) == 0
		})
	}
	return w
}

func TestKillsLeaveNothing(t *testing.T) {
	for _, s := range settings() {
		t.Run(s.runtime, func(t *testing.T) { killsLeaveNothing(t, s) })
	}
}

func killsLeaveNothing(t *testing.T, s setting) {
	jobs, kills := number(t, "CHAOS_JOBS", s.jobs), number(t, "CHAOS_KILLS", s.kills)
	dice := rand.New(rand.NewPCG(seed(t), 0))
	w := newWorld(t, s)
	before := w.Snapshot(t)
	w.seesLeaks(t, before)

	begun := time.Now()
	ids := make([]string, 0, jobs)
	submit := func(upTo int) {
		for len(ids) < upTo {
			ids = append(ids, w.Submit(t, w.files[len(ids)%len(w.files)]))
		}
	}
	for kill := range kills {
		submit(jobs * (kill + 1) / (kills + 1))
		pause := time.Duration(dice.Int64N(int64(s.life)))
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
func checkJob(t *testing.T, w *world, i int, id string) providers.Conclusion {
	t.Helper()
	r := w.Result(t, id, 3*time.Minute)
	kind := w.kinds[i%len(w.kinds)]
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
func checkEnd(t *testing.T, w *world, kills int) {
	t.Helper()
	if out, code := w.Run(t, "jobs"); code != 0 || !strings.Contains(out, "nothing is owed") {
		t.Errorf("mayfly jobs: %s (status %d), want nothing owed", out, code)
	}
	if out, code := w.Run(t, "audit", "show", "--action", "box.adopt"); code != 0 || strings.Contains(out, "pool-") != (w.warm > 0) {
		t.Errorf("mayfly audit show: %s (status %d), want jobs that adopted a warm box if there are any", out, code)
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
	twice, err := agenttest.Query(t.Context(), w.World, "select id from runs group by id having count(*) > 1")
	agenttest.Must(t, err)
	if len(twice) > 0 {
		t.Errorf("jobs that wrote twice: %v", twice)
	}
	wrote, err := agenttest.Query(t.Context(), w.World, "select id from runs")
	agenttest.Must(t, err)
	for _, id := range wrote {
		if r, err := local.ReadResult(w.Spool, id); err != nil {
			t.Errorf("job %s wrote to the database and has no result: %+v, %v", id, r, err)
		}
	}
}
