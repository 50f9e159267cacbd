package gitea_test

import (
	"fmt"
	"strings"
	"testing"
)

// reachWorkflow clones the repository that the job belongs to, pushes a tag, and
// tries everything else that is on this machine.
func (in *installation) reachWorkflow() string {
	return fmt.Sprintf(`on: push
jobs:
  clone:
    runs-on: mayfly
    steps:
      - run: |
          test "$GITHUB_SERVER_URL" = http://gitea.test:%[1]d
          git clone --quiet "http://ci:${{ secrets.GITEA_TOKEN }}@gitea.test:%[1]d/$GITHUB_REPOSITORY.git" here
          cd here
          test "$(git rev-parse HEAD)" = "$GITHUB_SHA"
          git tag v1
          git push --quiet origin v1
          echo pushed
      - run: |
          reach() { if curl -sS --max-time 20 -o /dev/null "$1"; then echo "reached $2"; else echo "no $2"; fi; }
          reach http://canary.test:%[2]d/$GITHUB_REPOSITORY canary
          reach http://127.0.0.1:%[2]d/address address
          reach http://169.254.169.254/latest/meta-data metadata
          reach http://gitea.test:%[2]d/port port
`, in.server.Port(), in.gates.port)
}

// itself: a job reaches its own repository with the token of the job, and nothing
// else; the ledger has both.
func itself(t *testing.T, in *installation) {
	in.gates.open("/lab/itself")
	r, sha := in.repository(t, "itself", in.reachWorkflow())
	jobs := must(r.Wait(in.ctx, must(r.Pushed(in.ctx, sha))(t)))(t)
	log := in.printed(t, r, jobs[0])
	if c := conclusions(jobs); c != "clone success" {
		t.Fatalf("%s, want a success:\n%s", c, log)
	}
	for _, want := range []string{"pushed\n", "no canary\n", "no address\n", "no metadata\n", "no port\n"} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %q:\n%s", want, log)
		}
	}
	if tags := must(r.Tags(in.ctx))(t); len(tags) != 1 || tags["v1"] != sha {
		t.Errorf("tags %v, want v1 at %s", tags, sha)
	}
	for _, path := range []string{"/lab/itself", "/address", "/port"} {
		if in.gates.seen(path) {
			t.Errorf("the canary was reached at %s without a rule", path)
		}
	}
	record, code := in.world.Run(t, "audit", "show")
	if code != 0 {
		t.Fatalf("mayfly audit show: %s", record)
	}
	for _, want := range []string{"gitea.test", "canary.test"} {
		if !strings.Contains(record, want) {
			t.Errorf("the audit does not name %s:\n%s", want, record)
		}
	}
}

// canary is the other side: the same job with one rule more reaches it.
func canary(t *testing.T, in *installation) {
	in.gates.open("/lab/canary")
	r, jobs := in.pushed(t, "canary", in.reachWorkflow())
	log := in.printed(t, r, jobs[0])
	if c := conclusions(jobs); c != "clone success" || !strings.Contains(log, "reached canary\n") || !in.gates.seen("/lab/canary") {
		t.Errorf("%s, want the canary reached with a rule:\n%s", c, log)
	}
	if !strings.Contains(log, "no address\n") || in.gates.seen("/address") {
		t.Errorf("the canary was reached by its address:\n%s", log)
	}
}
