//go:build failpoint

package runner_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/gitea"
	"github.com/mayfly-ci/mayfly/providers/gitea/fakegitea"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/internal/failpoint"
)

// startForge starts the instance of one trial, which outlives the agents, and
// queues the job.
func (s *scene) startForge(t *testing.T) {
	t.Helper()
	forge, err := fakegitea.New()
	if err != nil {
		t.Fatal(err)
	}
	forge.Submit(fakegitea.Job{Workflow: fmt.Sprintf(crashWorkflow, "print", "print", "print"), Steps: 3, RunsOn: []string{"linux"}})
	s.forge, s.Forge = forge, forge.URL()
}

func (s *scene) stopForge(t *testing.T) {
	t.Helper()
	if err := s.forge.Violations(); err != nil {
		t.Errorf("the instance was used wrongly: %v", err)
	}
	if err := s.forge.Close(); err != nil {
		t.Error(err)
	}
}

// gitea is the provider of one life. Rows are sent when there is time for it, so
// the points of the log are not the same in each life: TestDeathAtEveryPoint of
// the provider has them.
func (s *scene) gitea(state *runner.State) (providers.Provider, error) {
	return gitea.New(gitea.Config{
		URL: s.Forge, Labels: []string{"linux"}, Store: state.Safe("gitea"),
		Token: func() (creds.Secret, error) { return creds.NewSecret(fakegitea.RegistrationToken), nil },
		Trace: func(point string) {
			if point != "gitea.logged" {
				failpoint.Here(point)
			}
		},
	})
}

// unheard are the points at which Gitea has assigned a task of which the journal
// does not know yet.
func unheard(points []string) []string {
	from, to := slices.Index(points, "gitea.fetched:1"), slices.Index(points, "journal.held.written:1")
	if from < 0 || to < from {
		return nil
	}
	return points[from:to]
}

// checkForge is check for what Gitea was told.
func (s *scene) checkForge(t *testing.T, how string, finished bool) {
	t.Helper()
	task := s.forge.Task(1)
	switch {
	case !task.Assigned:
		return
	case s.silent:
		if task.Finals != 0 || task.Status != "running" {
			t.Errorf("%s: nobody knew of the task, and it is %s", how, task.Status)
		}
		return
	case task.Finals != 1 || !task.SealedAtEnd:
		t.Errorf("%s: the task was reported %d times (%s), log sealed before: %v; want once, and yes", how, task.Finals, task.Status, task.SealedAtEnd)
	case finished && task.Status != fakegitea.Success:
		t.Errorf("%s: a finished success was reported as %s:\n%s", how, task.Status, strings.Join(task.Rows, "\n"))
	case task.Status == fakegitea.Failure && !strings.Contains(strings.Join(task.Rows, "\n"), "the agent died"):
		t.Errorf("%s: a failure, and the log does not say why: %q", how, task.Rows)
	}
	for i, step := range task.Steps {
		if step.Status == "running" {
			t.Errorf("%s: step %d of a task that is over is shown as running", how, i)
		}
	}
}

// TestCrashGitea is a job of a Gitea, over files otherwise.
func TestCrashGitea(t *testing.T) { crash(t, "gitea") }
