package gitea_test

import (
	"crypto/rand"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/giteatest"
)

// cloneWorkflow clones the job's repository, as anybody writes it, and looks for
// a commit in what the box has of the agent's cache.
const cloneWorkflow = `on: push
jobs:
  clone:
    runs-on: mayfly
    steps:
      - run: |
          git clone --quiet "http://x:${{ github.token }}@gitea.test:%d/$GITHUB_REPOSITORY.git" here
          cd here
          test "$(git rev-parse HEAD)" = "$GITHUB_SHA"
          git fsck --connectivity-only && echo whole
          mkdir -p .git/hooks && echo >> .git/info/exclude && git config user.name a && git config user.email a@example.org
          git commit --quiet --allow-empty -m mine && git log --oneline >/dev/null && echo worked
      - run: |
          git --git-dir=/opt/mayfly/git/repository.git cat-file -e %s 2>/dev/null && echo seen || echo unseen
          for f in template/hooks/post-checkout repository.git/objects/x repository.git/config; do
            if echo x >> /opt/mayfly/git/$f; then echo "wrote $f"; fi
          done 2>/dev/null
          cd here && env -u GIT_TEMPLATE_DIR git log --oneline >/dev/null && echo without the variable too
`

// large: the second clone of a large repository transfers what changed, another
// repository's job does not see its objects, and no job can change them.
func large(t *testing.T, in *installation) {
	a := in.world.Start(t)
	r := must(in.server.NewRepository(in.ctx, "large"))(t)
	other := must(in.server.NewRepository(in.ctx, "large-other"))(t)
	workflow := func(known string) map[string]string {
		return map[string]string{".gitea/workflows/ci.yml": strings.ReplaceAll(
			fmt.Sprintf(cloneWorkflow, in.server.Port(), known), "runs-on: mayfly", "runs-on: "+in.name)}
	}
	files := workflow("HEAD")
	for i := range 50 {
		b := make([]byte, 1<<20)
		_, _ = rand.Read(b) // never fails
		files[fmt.Sprint("blob", i)] = string(b)
	}
	first := must(r.Push(in.ctx, files))(t)
	whole := in.cloned(t, r, first, "")
	agenttest.Eventually(t, bound, "the cache is filled", func() bool { return strings.Contains(a.Log(), "git cache filled") })

	second := must(r.Push(in.ctx, workflow(first)))(t)
	changed := in.cloned(t, r, second, "seen\n")
	t.Logf("received by the first clone: %d bytes, by the second: %d", whole, changed)
	if whole < 50<<20 || changed > 100_000 {
		t.Errorf("the first clone received %d bytes, the second %d: want more than 50 MiB, and less than 100,000", whole, changed)
	}
	if out, _ := in.world.Run(t, "doctor"); !strings.Contains(out, "ok       git cache: "+in.world.Git+"  (git 2.") {
		t.Errorf("mayfly doctor does not say that the cache is good:\n%s", out)
	}
	third := must(other.Push(in.ctx, workflow(first)))(t)
	in.cloned(t, other, third, "unseen\n")
	a.Stop(t)
	owesNothing(t, in.world)
}

// cloned waits for the job of a push and returns how many bytes it received.
func (in *installation) cloned(t *testing.T, r *giteatest.Repository, sha, want string) (received int64) {
	t.Helper()
	began := time.Now()
	jobs := must(r.Wait(in.ctx, must(r.Pushed(in.ctx, sha))(t)))(t)
	log := in.printed(t, r, jobs[0])
	if c := conclusions(jobs); c != "clone success" || !strings.Contains(log, want) || strings.Contains(log, "wrote ") {
		t.Fatalf("%s, want success and %q, and nothing written:\n%s", c, want, log)
	}
	for _, part := range []string{"whole\n", "worked\n", "without the variable too\n"} {
		if !strings.Contains(log, part) {
			t.Errorf("the log lacks %q:\n%s", part, log)
		}
	}
	for e, err := range audit.Read(filepath.Join(in.world.State, "audit"), audit.Filter{}) {
		agenttest.Must(t, err)
		if e.Action == "egress.tcp" && e.Object == "gitea.test" && e.Time.After(began) && e.Detail["received"] != "" {
			received += must(strconv.ParseInt(e.Detail["received"], 10, 64))(t)
		}
	}
	return received
}
