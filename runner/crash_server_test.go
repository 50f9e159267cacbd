//go:build failpoint

package runner_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/gitea"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/internal/failpoint"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/test/giteatest"
)

// The server of this test ends a task that nobody speaks of after a few seconds:
// this bounds what is lost with an answer.
const serverSettings = `[actions]
ZOMBIE_TASK_TIMEOUT = 8s
[cron.stop_zombie_tasks]
SCHEDULE = @every 1s`

const serverBound = 2 * time.Minute

// A serverLane is where the job of a scene comes from.
type serverLane struct {
	URL, Token, Label string

	repo *giteatest.Repository
}

// realServer is the agent's configuration: the provider and the box are real, the
// issuer and the gateway have their own crash test.
func (s *scene) realServer(cfg *runner.Config, state *runner.State) error {
	provider, err := gitea.New(gitea.Config{
		URL: s.Server.URL, Labels: []string{s.Server.Label}, Runner: s.Server.Label, Store: state.Safe("gitea"),
		Token: func() (creds.Secret, error) { return creds.NewSecret(s.Server.Token), nil }, Trace: failpoint.Here,
	})
	if err != nil {
		return err
	}
	box, err := s.serverRuntime(state.Owner)
	if err != nil {
		return err
	}
	cfg.Providers = map[string]providers.Provider{"gitea": provider}
	cfg.Runtimes = map[string]sandbox.Runtime{"native": box}
	cfg.Issuers = map[string]creds.Issuer{"pg": fileIssuer(filepath.Join(s.Dir, "leases"))}
	cfg.Gateway, err = gateway.New(gateway.Config{}) // a box is looked at through one
	return err
}

func (s *scene) serverRuntime(owner string) (sandbox.Runtime, error) {
	if s.Engine != "" {
		return s.dockerRuntime(owner)
	}
	return s.runtime(owner)
}

// offer puts one job on offer and waits until the server would hand it out.
func (l serverLane) offer(ctx context.Context) (run int64, err error) {
	run, err = l.repo.Dispatch(ctx, "ci.yml")
	if err == nil {
		_, err = l.repo.Until(ctx, run, func(jobs []giteatest.Job) bool { return len(jobs) == 1 && jobs[0].Status == "queued" })
	}
	return run, err
}

// serverTrial is one sequence of kills, as trial is.
func serverTrial(t *testing.T, s *scene, point, again string, finished bool) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), serverBound)
	defer cancel()
	s.prepare(t)
	defer s.remove(t)
	run, err := s.Server.offer(ctx)
	if err != nil {
		t.Fatal(err)
	}
	how := "not killed"
	points, killed := s.life(t, "run", point, point == "")
	if point != "" {
		how = "killed at " + point
		if !killed && !strings.HasPrefix(point, "gitea.logged") { // rows go when there is time for them
			t.Errorf("%s: the agent was not killed there", how)
		}
		if again != "" {
			how += ", then at " + again
			s.life(t, "recover", again, false) // it may get by without that point now
		}
		points, _ = s.life(t, "recover", "", true)
	}
	s.checkServer(ctx, t, how, run, finished)
	return points
}

// checkServer fails the test if anything of the job is left here, or if the
// server does not have one end of it, or a line of its log twice.
func (s *scene) checkServer(ctx context.Context, t *testing.T, how string, run int64, finished bool) {
	t.Helper()
	left, err := s.left()
	if err != nil || len(left) > 0 {
		t.Errorf("%s: left over: %v, %v", how, left, err)
	}
	jobs, err := s.Server.repo.Jobs(ctx, run)
	if err == nil && len(jobs) == 1 && jobs[0].Status == "queued" {
		if finished {
			t.Errorf("%s: the job was finished, and the server still offers it", how)
		}
		err = s.Server.repo.Cancel(ctx, run) // nobody had it: the next trial must not
	}
	if err == nil {
		jobs, err = s.Server.repo.Wait(ctx, run)
	}
	if err != nil {
		t.Errorf("%s: %v", how, err)
		return
	}
	conclusion := jobs[0].Conclusion
	if jobs[0].RunnerID == 0 && conclusion == "cancelled" {
		return
	}
	if s.silent && conclusion != "failure" {
		t.Errorf("%s: nobody knew of the task, and the server has %s, want the failure of its own patience", how, conclusion)
	}
	if finished && conclusion != "success" || conclusion != "success" && conclusion != "failure" {
		t.Errorf("%s: the server has %s, want success, or failure if the job was not finished", how, conclusion)
	}
	log, err := s.Server.repo.Log(ctx, jobs[0].ID)
	if err != nil && conclusion == "success" {
		t.Errorf("%s: %v", how, err)
	}
	if err != nil && conclusion == "failure" {
		return // the answer was lost, and the server ended the task by itself
	}
	printed := giteatest.Printed(log)
	said := strings.Contains(printed, "mayfly: the log was opened again here")
	for _, line := range []string{"one\n", "two\n", "three\n"} {
		if n := strings.Count("\n"+printed, "\n"+line); n > 1 || n == 0 && !said {
			t.Errorf("%s: %s, and %q is %d times in the log:\n%s", how, conclusion, line, n, printed)
		}
	}
}

// TestCrashServer is TestCrashGitea with a real Gitea, over the native box.
func TestCrashServer(t *testing.T) { crashServer(t, func(*scene) {}) }

// TestCrashServerDocker is the same over boxes of Docker.
func TestCrashServerDocker(t *testing.T) {
	crashServer(t, func(s *scene) { s.startEngine(t) })
}

func crashServer(t *testing.T, equip func(*scene)) {
	server := giteatest.Start(t, giteatest.Config{Settings: serverSettings})
	token, err := server.RegistrationToken(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	lanes := max(2, runtime.NumCPU())
	free := make(chan *scene, lanes)
	for lane := range lanes {
		s := newServerScene(t, server, token, lane)
		equip(s)
		free <- s
	}
	first := <-free
	points := serverTrial(t, first, "", "", true)
	free <- first
	end := slices.Index(points, "journal.outcome.after:1")
	if end < 0 || !slices.Contains(points, "gitea.fetched:1") || t.Failed() {
		t.Fatalf("the traced job has no end, or was not fetched; points: %v", points)
	}
	// The other crash tests kill a recovery everywhere, after a kill anywhere.
	// Here it is killed where it speaks with the server, after a kill where the
	// job did, or at its end; over Docker once.
	silent := unheard(points)
	doubles := parallel(points, free, func(s *scene, i int) int {
		s.silent = slices.Contains(silent, points[i])
		n, spoke := 0, strings.HasPrefix(points[i], "gitea.") || i == end
		for _, again := range serverTrial(t, s, points[i], "", i >= end) {
			if spoke && s.Engine == "" && strings.HasPrefix(again, "gitea.") && os.Getenv("MAYFLY_CRASH") != "single" {
				serverTrial(t, s, points[i], again, i >= end)
				n++
			}
		}
		return n
	})
	t.Logf("server: %d points of a job, %d kill sequences", len(points), len(points)+doubles)
}

func newServerScene(t *testing.T, server *giteatest.Server, token string, lane int) *scene {
	t.Helper()
	label := fmt.Sprintf("crash-%d", lane)
	repo, err := server.NewRepository(t.Context(), label)
	if err == nil {
		_, err = repo.Push(t.Context(), map[string]string{".gitea/workflows/ci.yml": fmt.Sprintf(
			strings.NewReplacer("on: push", "on: workflow_dispatch", "linux", label).Replace(crashWorkflow), "echo", "echo", "echo three")})
	}
	if err != nil {
		t.Fatal(err)
	}
	s := newScene(t, "server", lane)
	s.Server = serverLane{URL: server.URL(), Token: token, Label: label, repo: repo}
	return s
}
