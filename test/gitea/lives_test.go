package gitea_test

import (
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/giteatest"
)

const good = "on: push\njobs: {good: {runs-on: mayfly, steps: [{run: echo good}]}}\n"

// ephemeral: each runner that the server knows has one job, and is forgotten.
func ephemeral(t *testing.T, in *installation) {
	a := in.world.Start(t)
	ran := map[int64]bool{}
	for _, name := range []string{"first", "second"} {
		r, jobs := in.pushed(t, name, good)
		if c := conclusions(jobs); c != "good success" || in.printed(t, r, jobs[0]) != "good\n" {
			t.Fatalf("%s, want a success: %s", c, in.printed(t, r, jobs[0]))
		}
		if id := jobs[0].RunnerID; id == 0 || ran[id] {
			t.Errorf("the job %s ran on runner %d, want one that had no job before", name, id)
		}
		ran[jobs[0].RunnerID] = true
	}
	for _, runner := range must(in.server.Runners(in.ctx))(t) {
		if runner.Name == in.name && !runner.Ephemeral {
			t.Errorf("runner %+v, want an ephemeral one", runner)
		}
		if ran[runner.ID] {
			t.Errorf("runner %+v had a job and is still known", runner)
		}
	}
	a.Stop(t)
	owesNothing(t, in.world)
}

// killed: the agent dies in the middle of a job. Its next life ends the job at
// the server, and takes the next one.
func killed(t *testing.T, in *installation) {
	a := in.world.Start(t)
	r, sha := in.repository(t, "killed", `on: push
jobs:
  killed:
    runs-on: mayfly
    steps:
      - run: echo one; `+in.gates.pass("/killed")+`; echo two
`)
	run := must(r.Pushed(in.ctx, sha))(t)
	in.gates.reached(t, "/killed")
	running := must(r.Jobs(in.ctx, run))(t)[0]
	agenttest.Eventually(t, bound, "the server has the first line", func() bool {
		log, err := r.Log(in.ctx, running.ID) // there is none before its first line
		return err == nil && giteatest.Printed(log) == "one\n"
	})
	a.Kill()
	in.gates.open("/killed")
	a = in.world.Start(t)
	jobs := must(r.Wait(in.ctx, run))(t)
	log := in.printed(t, r, jobs[0])
	if c := conclusions(jobs); c != "killed failure" || !strings.HasPrefix(log, "one\nmayfly: ") || strings.Contains(log, "\ntwo\n") || strings.Count(log, "one\n") != 1 {
		t.Errorf("%s, want a failure, and nothing from after the kill:\n%s", c, log)
	}
	if _, jobs := in.pushed(t, "next", good); conclusions(jobs) != "good success" {
		t.Errorf("the next job: %s", conclusions(jobs))
	}
	a.Stop(t)
	owesNothing(t, in.world)
}
