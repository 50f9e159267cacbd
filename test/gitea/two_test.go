package gitea_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/test/agenttest"
	"github.com/mayfly-ci/mayfly/test/giteatest"
)

// A side is one of two servers of the same agent. Both have a repository of the
// same name, and a secret of the same name and another value.
type side struct {
	name   string // of the provider, and a label that the other side has not
	server *giteatest.Server
	app    *giteatest.Repository
	secret string
	run    int64
}

// pairPolicy lets the jobs of each server reach that server, and the gates.
const pairPolicy = `  - name: %[1]s
    match: {provider: %[1]s, repository: lab/app, trust: [fork, branch, protected]}
    timeout: 5m
    limits: {memory: 512MiB, pids: 128}
    egress:
      - {name: gitea.test, port: %[2]d, protocol: http, resolve: [127.0.0.1]}
      - {name: gate.test, port: %[3]d, protocol: http, resolve: [127.0.0.1]}
`

// TestTwoServers: one agent serves two servers at once. One of them is killed
// and comes back while the jobs of the other go on, and nothing of one reaches
// the other.
func TestTwoServers(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 9*time.Minute)
	t.Cleanup(cancel)
	gates := openGates(t)
	east := &side{name: "east", server: giteatest.Start(t, giteatest.Config{}), secret: "correct-horse-battery-east"}
	west := &side{name: "west", server: giteatest.Start(t, giteatest.Config{}), secret: "another-staple-of-west"}
	sections, policy := "", "version: 1\nrules:\n"
	for _, s := range []*side{east, west} {
		file := filepath.Join(t.TempDir(), "registration")
		agenttest.Must(t, os.WriteFile(file, []byte(must(s.server.RegistrationToken(ctx))(t)), 0o600))
		sections += fmt.Sprintf("  %s: {type: gitea, url: %q, token_file: %s, name: agent-of-%[1]s, labels: [both, only-%[1]s]}\n", s.name, s.server.URL(), file)
		policy += fmt.Sprintf(pairPolicy, s.name, s.server.Port(), gates.port)
		s.app = must(s.server.NewRepository(ctx, "app"))(t)
		agenttest.Must(t, s.app.SetSecret(ctx, "OWN", s.secret))
	}
	w := agenttest.New(t, agenttest.Config{Slots: 4, Policy: policy, Providers: sections})
	a := w.Start(t)

	east.begin(ctx, t, gates, west)
	west.begin(ctx, t, gates, east)
	gates.reached(t, "/east") // both run at once
	gates.reached(t, "/west")
	agenttest.Must(t, east.server.Kill())
	gates.open("/west")
	west.ended(ctx, t, east)
	sha := must(west.app.Push(ctx, map[string]string{".gitea/workflows/ci.yml": strings.ReplaceAll(good, "runs-on: mayfly", "runs-on: only-west")}))(t)
	if jobs := must(west.app.Wait(ctx, must(west.app.Pushed(ctx, sha))(t)))(t); conclusions(jobs) != "good success" {
		t.Errorf("a job of the server that is up: %s", conclusions(jobs))
	}
	gates.open("/east")
	agenttest.Must(t, east.server.Start(ctx))
	east.ended(ctx, t, west)

	// A label of the other side is nobody's here, also while the agent is idle.
	sha = must(east.app.Push(ctx, map[string]string{
		".gitea/workflows/ci.yml":    strings.ReplaceAll(good, "runs-on: mayfly", "runs-on: only-west"),
		".gitea/workflows/later.yml": strings.ReplaceAll(good, "runs-on: mayfly", "runs-on: only-east"),
	}))(t)
	east.labels(ctx, t, sha)
	a.Stop(t)
	owesNothing(t, w)
	audited(t, w, map[string]int{"east": 2, "west": 2})
}

// begin starts a job that shows all that could be mixed up, and waits at a gate.
func (s *side) begin(ctx context.Context, t *testing.T, gates *gates, other *side) {
	t.Helper()
	sha := must(s.app.Push(ctx, map[string]string{".gitea/workflows/ci.yml": fmt.Sprintf(`on: push
jobs:
  long:
    runs-on: both
    env: {OWN: '${{ secrets.OWN }}', TOKEN: '${{ secrets.GITEA_TOKEN }}'}
    steps:
      - run: |
          echo "own $OWN, the other's %[1]s, token $TOKEN"
          test "$GITHUB_SERVER_URL" = http://gitea.test:%[2]d
          git clone --quiet "http://ci:$TOKEN@gitea.test:%[2]d/$GITHUB_REPOSITORY.git" here
          git -C here tag of-%[3]s
          git -C here push --quiet origin of-%[3]s
          if curl -sS --max-time 20 -o /dev/null http://gitea.test:%[4]d/; then echo "reached the other"; else echo "not the other"; fi
      - run: echo one; %[5]s
      - run: echo two of %[3]s
`, other.secret, s.server.Port(), s.name, other.server.Port(), gates.pass("/"+s.name))}))(t)
	s.run = must(s.app.Pushed(ctx, sha))(t)
}

// ended waits for the job that was begun and looks that it was of this side only.
func (s *side) ended(ctx context.Context, t *testing.T, other *side) {
	t.Helper()
	jobs := must(s.app.Wait(ctx, s.run))(t)
	log := giteatest.Printed(must(s.app.Log(ctx, jobs[0].ID))(t))
	if c := conclusions(jobs); c != "long success" || jobs[0].Runner != "agent-of-"+s.name {
		t.Fatalf("%s on %s: %s, want a success:\n%s", s.name, jobs[0].Runner, c, log)
	}
	// Its own secret is hidden; the other's means nothing here.
	if first := "own ***, the other's " + other.secret + ", token ***\n"; !strings.HasPrefix(log, first) {
		t.Errorf("%s: the log is\n%s\nwant it to begin with %q", s.name, log, first)
	}
	if !strings.Contains(log, "\nnot the other\n") || !strings.HasSuffix(log, "one\ntwo of "+s.name+"\n") ||
		strings.Contains(log, "two of "+other.name) {
		t.Errorf("%s: the log is\n%s\nwant that of this job, which cannot reach %s", s.name, log, other.name)
	}
	if tags := must(s.app.Tags(ctx))(t); len(tags) != 1 || tags["of-"+s.name] == "" {
		t.Errorf("%s: tags %v, want of-%[1]s", s.name, tags)
	}
}

// labels: of two runs of a commit, the one whose label this side has not is left
// alone.
func (s *side) labels(ctx context.Context, t *testing.T, sha string) {
	t.Helper()
	var runs []giteatest.Run
	agenttest.Eventually(t, bound, "two runs of the commit, one of which is over", func() bool {
		var err error
		runs, err = s.app.Runs(ctx, sha)
		return err == nil && len(runs) == 2 && (runs[0].Status == "completed" || runs[1].Status == "completed")
	})
	for _, r := range runs {
		jobs := must(s.app.Jobs(ctx, r.ID))(t)
		if strings.HasPrefix(r.Path, "later.yml") {
			if conclusions(jobs) != "good success" {
				t.Errorf("the run with a label of %s: %s", s.name, conclusions(jobs))
			}
		} else if len(jobs) != 1 || jobs[0].Final() || jobs[0].RunnerID != 0 {
			t.Errorf("the run with a label of the other side: %+v, want it to wait", jobs)
		}
	}
}

// audited wants so many jobs of each provider admitted and completed in the
// audit, each under the rule of its provider.
func audited(t *testing.T, w *agenttest.World, want map[string]int) {
	t.Helper()
	for _, action := range []string{"job.admit", "job.complete"} {
		out, code := w.Run(t, "audit", "show", "--action", action, "--output", "json")
		if code != 0 {
			t.Fatalf("mayfly audit show: %s", out)
		}
		got := map[string]int{}
		lines := json.NewDecoder(strings.NewReader(out))
		for lines.More() {
			var e struct{ Detail map[string]string }
			agenttest.Must(t, lines.Decode(&e))
			provider, rule := e.Detail["provider"], e.Detail["rule"]
			got[provider]++
			if action == "job.admit" && !strings.HasSuffix(rule, " "+provider) {
				t.Errorf("%s of %s under the rule %q", action, provider, rule)
			}
		}
		if len(got) != len(want) || got["east"] != want["east"] || got["west"] != want["west"] {
			t.Errorf("%s: got %v, want %v", action, got, want)
		}
	}
}
