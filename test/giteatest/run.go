package giteatest

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"time"
)

// How often a wait asks the server.
const askInterval = 50 * time.Millisecond

// A Run is one run of a workflow, as the server's API describes it.
type Run struct {
	ID         int64
	Path       string // file@ref
	Event      string
	SHA        string `json:"head_sha"`
	Status     string // "queued", "in_progress", "completed", …
	Conclusion string // "success", "failure", "cancelled", "skipped"
}

// A Job is one job of a run.
type Job struct {
	ID          int64
	RunID       int64 `json:"run_id"`
	Name        string
	Status      string
	Conclusion  string
	Runner      string    `json:"runner_name"`
	RunnerID    int64     `json:"runner_id"`
	Steps       []Step    `json:"steps"`
	StartedAt   time.Time `json:"started_at"`   // whole seconds
	CompletedAt time.Time `json:"completed_at"` // whole seconds
}

// A Step is a step of a job.
type Step struct {
	Name       string
	Number     int64
	Status     string
	Conclusion string
}

// Final reports whether the server expects nothing more of the job.
func (j Job) Final() bool { return j.Status == "completed" }

// Runs are the runs of a commit, newest first.
func (r *Repository) Runs(ctx context.Context, sha string) ([]Run, error) {
	var answer struct {
		Runs []Run `json:"workflow_runs"`
	}
	err := r.server.API(ctx, http.MethodGet, r.path("/actions/runs?limit=50&head_sha=%s", sha), nil, &answer)
	return answer.Runs, err
}

// Run is one run.
func (r *Repository) Run(ctx context.Context, id int64) (Run, error) {
	var run Run
	err := r.server.API(ctx, http.MethodGet, r.path("/actions/runs/%d", id), nil, &run)
	return run, err
}

// Jobs are the jobs of a run in the order of their ids.
func (r *Repository) Jobs(ctx context.Context, run int64) ([]Job, error) {
	var answer struct{ Jobs []Job }
	err := r.server.API(ctx, http.MethodGet, r.path("/actions/runs/%d/jobs?limit=50", run), nil, &answer)
	return answer.Jobs, err
}

// Pushed waits for the run that a push of that commit starts.
func (r *Repository) Pushed(ctx context.Context, sha string) (int64, error) {
	var found int64
	err := wait(ctx, func() (string, error) {
		runs, err := r.Runs(ctx, sha)
		if err != nil || len(runs) == 0 {
			return "no run of commit " + sha, err
		}
		found = runs[0].ID
		return "", nil
	})
	return found, err
}

// Wait waits until all jobs of the run are final, and returns them.
func (r *Repository) Wait(ctx context.Context, run int64) ([]Job, error) {
	return r.Until(ctx, run, func(jobs []Job) bool {
		for _, j := range jobs {
			if !j.Final() {
				return false
			}
		}
		return len(jobs) > 0
	})
}

// Until waits until the jobs of the run are so, and returns them.
func (r *Repository) Until(ctx context.Context, run int64, so func([]Job) bool) ([]Job, error) {
	var jobs []Job
	err := wait(ctx, func() (string, error) {
		var err error
		jobs, err = r.Jobs(ctx, run)
		if err == nil && so(jobs) {
			return "", nil
		}
		return fmt.Sprintf("run %d: %+v", run, jobs), err
	})
	return jobs, err
}

// wait asks until the answer is "". A server that does not answer is asked
// again: tests restart it.
func wait(ctx context.Context, ask func() (string, error)) error {
	for {
		not, err := ask()
		if err == nil && not == "" {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("gitea: %w: %s (%v)", context.Cause(ctx), not, err)
		case <-time.After(askInterval):
		}
	}
}

// Log is the log of a job as the server gives it out: lines with a time in front.
func (r *Repository) Log(ctx context.Context, job int64) (string, error) {
	var text string
	err := r.server.API(ctx, http.MethodGet, r.path("/actions/jobs/%d/logs", job), nil, &text)
	return text, err
}

// Printed is a log without the times: what the job printed.
func Printed(log string) string {
	var b strings.Builder
	for line := range strings.Lines(log) {
		at, rest, found := strings.Cut(line, " ")
		if _, err := time.Parse(time.RFC3339Nano, at); found && err == nil {
			line = rest
		}
		b.WriteString(line)
	}
	return b.String()
}
