package runner_test

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
)

// noticesMost is what the agent may say beyond the limit of a log, with marks.
const noticesMost = 128 << 10

const (
	useGreet = "./greet"
	greet    = `inputs: {who: {default: nobody}}
outputs: {text: {value: "${{ steps.in.outputs.text }}"}}
runs:
  using: composite
  steps:
    - id: in
      shell: sh
      run: |
        print hello ${{ inputs.who }} of ${{ github.action_path }}
        env GITHUB_ACTION_PATH
        env DEPLOY_KEY
        append output text=from within
    - {shell: sh, run: exit 3, if: "inputs.who == 'fail'"}
    - {shell: sh, run: block, if: "inputs.who == 'block'"}
    - {shell: sh, run: print after}
    - {shell: sh, run: print always, if: always()}
    - {shell: sh, run: print only on failure, if: failure()}
    - {shell: sh, run: print only when cancelled, if: cancelled()}
`
)

// What the policy binds to a step is held for all of the action that it uses,
// and for nothing else.
func TestActionHasTheScopeOfItsStep(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.files = map[string]string{"/workspace/greet/action.yml": greet}
	r := w.run(lifetime(t), nil,
		providers.Step{ID: "deploy", Uses: useGreet, With: map[string]string{"WHO": "${{ github.repository }}"}},
		providers.Step{Run: "print ${{ steps.deploy.outputs.text }}, ${{ steps.in.outcome }}.\nenv DEPLOY_KEY\nenv GITHUB_ACTION_PATH"})
	want := "hello acme/app of /workspace/greet\n/workspace/greet\n***\nafter\nalways\nfrom within, .\n\n\n"
	if got := w.shown(); r.Conclusion != providers.Success || got != want {
		t.Errorf("got %+v and the log %q, want success and %q", r, got, want)
	}
	order := strings.Join(w.happened(), " ")
	if !strings.Contains(order, "open issue box.run box.run box.run revoke probe close box.run") {
		t.Errorf("order: %s; want the lease and the rules of the step around all of the action", order)
	}
	if n := len(w.deploy); n != 4 || w.deploy[2] == "" || w.deploy[3] != "" {
		t.Errorf("the file of the step's lease: got %q when each script ran, want it in the action alone", w.deploy)
	}
	if n := len(w.steps); n != 4 {
		t.Errorf("the service heard of %d states of steps, want the two of each step of the job: %+v", n, w.steps)
	}
	w.clean()
}

func TestHowAnActionEnds(t *testing.T) {
	t.Parallel()
	for who, c := range map[string]struct {
		want  providers.Conclusion
		shown string
	}{
		"ok":    {providers.Success, "after always next"},
		"fail":  {providers.Failure, "always only on failure"},
		"block": {providers.Cancelled, "always only when cancelled"},
	} {
		t.Run(who, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				w.files = map[string]string{"/workspace/greet/action.yml": greet}
				ctx := lifetime(t)
				timer := time.AfterFunc(time.Second, func() { close(w.cancel) })
				defer timer.Stop()
				if who != "block" {
					timer.Stop()
				}
				r := w.run(ctx, nil, providers.Step{ID: "a", Uses: useGreet, With: map[string]string{"who": who}}, providers.Step{Run: "print next"})
				var shown []string
				for line := range strings.Lines(w.shown()) {
					if !strings.HasPrefix(line, "mayfly: ") && !strings.HasPrefix(line, "hello") && !strings.HasPrefix(line, "/") && line != "\n" {
						shown = append(shown, strings.TrimSpace(line))
					}
				}
				if got := strings.Join(shown, " "); r.Conclusion != c.want || got != c.shown {
					t.Errorf("got %+v and %q, want %s and %q; log:\n%s", r, got, c.want, c.shown, w.shown())
				}
				last := w.steps[len(w.steps)-1]
				first := w.steps[1]
				if first.Conclusion != c.want || who != "ok" && last.Conclusion != providers.Skipped {
					t.Errorf("steps: got %+v, want the first %s", w.steps, c.want)
				}
				w.clean()
			})
		})
	}
}

// A few files of a job can stand for more steps than any machine could run.
func TestActionsAreBounded(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	bomb := "runs:\n  using: composite\n  steps:\n" + strings.Repeat("    - {uses: ./bomb, continue-on-error: true}\n", 10)
	w.files = map[string]string{"/workspace/bomb/action.yml": bomb}
	r := w.run(lifetime(t), nil, providers.Step{Uses: "./bomb"}, providers.Step{Run: "print end", If: "always()"})
	shown := w.shown()
	if r.Conclusion != providers.Success || !strings.Contains(shown, "end\n") || !strings.Contains(shown, "a job may use 1000 actions, nested ones included") {
		t.Errorf("got %+v, and a log of %d bytes; want an end, and a line that says what the bound is", r, len(shown))
	}
	if n := len(shown); n > 1<<20+noticesMost {
		t.Errorf("the log has %d bytes, its limit is 1 MiB", n)
	}
	w.clean()
}

// The table is what GitHub documents of conditions, outcomes and conclusions.
func TestConditions(t *testing.T) {
	t.Parallel()
	fail := providers.Step{ID: "f", Run: "exit 1"}
	tolerated := providers.Step{ID: "f", Run: "exit 1", ContinueOnError: "${{ github.ref == 'refs/heads/main' }}"}
	for _, c := range []struct {
		first providers.Step
		cond  string
		runs  bool
	}{
		{providers.Step{ID: "f", Run: "exit 0"}, "", true},
		{providers.Step{ID: "f", Run: "exit 0"}, "failure()", false},
		{providers.Step{ID: "f", Run: "exit 0"}, "steps.f.outcome == 'success'", true},
		{fail, "", false},
		{fail, "true", false},
		{fail, "success()", false},
		{fail, "failure()", true},
		{fail, "${{ failure() && steps.f.conclusion == 'failure' }}", true},
		{fail, "always()", true},
		{fail, "cancelled()", false},
		{fail, "!cancelled()", true},
		{fail, "steps.f.outcome == 'failure'", false},
		{fail, "always() && job.status == 'failure'", true},
		{tolerated, "", true},
		{tolerated, "failure()", false},
		{tolerated, "steps.f.outcome == 'failure' && steps.f.conclusion == 'success' && job.status == 'success'", true},
		{providers.Step{ID: "f", Run: "exit 1", If: "false"}, "steps.f.outcome == 'skipped' && steps.f.conclusion == 'skipped'", true},
	} {
		w := newWorld(t)
		w.run(lifetime(t), nil, c.first, providers.Step{If: c.cond, Run: "print ran"})
		if got := strings.Contains(w.shown(), "ran\n"); got != c.runs {
			t.Errorf("behind %+v: if %q ran the step: %v, want %v; log:\n%s", c.first, c.cond, got, c.runs, w.shown())
		}
	}
}

func TestJobOfNeedsAndTolerance(t *testing.T) {
	t.Parallel()
	needs := map[string]any{"a": map[string]any{"result": "failure", "outputs": map[string]any{"x": "y"}}}
	for name, c := range map[string]struct {
		change func(j *providers.Job)
		want   providers.Conclusion
	}{
		"a need failed":      {func(j *providers.Job) { j.Contexts["needs"] = needs }, providers.Skipped},
		"and that was asked": {func(j *providers.Job) { j.Contexts["needs"], j.If = needs, "failure() && needs.a.outputs.x == 'y'" }, providers.Success},
		"tolerated":          {func(j *providers.Job) { j.Steps[0].Run, j.ContinueOnError = "exit 1", "${{ 1 == 1 }}" }, providers.Success},
		"not tolerated":      {func(j *providers.Job) { j.Steps[0].Run, j.ContinueOnError = "exit 1", "false" }, providers.Failure},
		"variables of an object": {func(j *providers.Job) {
			j.Env = providers.Env{Expr: `${{ fromJSON('{"A":"exit 1"}') }}`, Vars: map[string]string{"A": "outer"}}
			j.Steps[0].Run = "${{ env.A }}"
		}, providers.Failure},
		"a command that is refused": {func(j *providers.Job) { j.Steps[0].Run = "print ::set-env name=A::b" }, providers.Failure},
		"no object":                 {func(j *providers.Job) { j.Env.Expr = "x" }, providers.Failure},
	} {
		w := newWorld(t)
		j := job(providers.Step{Run: "print ran"})
		c.change(&j)
		w.offers <- j
		if err := w.agent(nil).Run(lifetime(t), lifetime(t)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if r := <-w.results; r.Conclusion != c.want {
			t.Errorf("%s: got %+v, want %s; log:\n%s", name, r, c.want, w.shown())
		}
		w.clean()
	}
}

// A secret that the job learns while it runs is masked in all that leaves it.
func TestAddedMaskReachesEverything(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	j := job(
		providers.Step{ID: "a", Name: "learn", Run: "print ::add-mask::tok-en-123\nprint tok-en-123\nappend summary # tok-en-123\nprint ::set-output name=o::tok-en-123"},
		providers.Step{Name: "Name ${{ steps.a.outputs.o }}", Run: "print ${{ steps.a.outputs.o }}\nexit 1"})
	j.Outputs = map[string]string{"o": "${{ steps.a.outputs.o }}"}
	w.offers <- j
	if err := w.agent(nil).Run(lifetime(t), lifetime(t)); err != nil {
		t.Error(err)
	}
	r := <-w.results
	want := "::add-mask::***\n***\n::set-output name=o::***\n::group::Summary of the step\n# ***\n::endgroup::\n***\nmayfly: step Name ***: exit status 1\n"
	if got := w.shown(); got != want {
		t.Errorf("log: got %q, want %q", got, want)
	}
	if text := fmt.Sprint(r, w.steps, w.events); strings.Contains(text, "tok-en-123") || r.Outputs["o"] != "***" {
		t.Errorf("the value is told: %s", text)
	}
	w.clean()
}

// A step finds the documented variables, and cannot change them.
func TestDefaultVariables(t *testing.T) {
	t.Parallel()
	want := map[string]string{
		"CI": "own", "GITHUB_ACTIONS": "true", "GITHUB_REPOSITORY": "acme/app", "GITHUB_REPOSITORY_OWNER": "acme", "GITHUB_REF": "refs/heads/main",
		"GITHUB_REF_NAME": "main", "GITHUB_HEAD_REF": "topic", "GITHUB_RUN_ID": "12", "GITHUB_RUN_NUMBER": "3", "GITHUB_JOB": "build",
		"GITHUB_SERVER_URL": "https://git.example", "GITHUB_EVENT_PATH": "/run/mayfly/event.json", "GITHUB_ACTION": "__run", "GITHUB_WORKSPACE": "/workspace",
		"GITHUB_TOKEN": "given", "RUNNER_OS": "Linux", "RUNNER_TEMP": "/tmp", "RUNNER_DEBUG": "1", "RUNNER_ENVIRONMENT": "self-hosted", "PGUSER": "u",
	}
	w := newWorld(t)
	var script strings.Builder
	var shown []string
	for _, name := range slices.Sorted(maps.Keys(want)) {
		script.WriteString("env " + name + "\n")
		shown = append(shown, want[name]+"\n")
	}
	j := job(providers.Step{ID: "__1", Run: script.String() + "print ::debug::shown", Env: providers.Env{Vars: map[string]string{"GITHUB_REF": "x", "RUNNER_OS": "y", "CI": "own", "GITHUB_TOKEN": "given"}}})
	j.Contexts["github"] = map[string]any{
		"head_ref": "topic", "run_id": 12, "run_number": "3", "server_url": "https://git.example", "event": map[string]any{"a": creds.NewSecret("never-shown")},
	}
	j.Contexts["vars"] = map[string]any{"ACTIONS_STEP_DEBUG": "true"}
	w.offers <- j
	ctx, cancel := context.WithCancel(lifetime(t))
	defer cancel()
	if err := w.agent(nil).Run(ctx, ctx); err != nil {
		t.Error(err)
	}
	if got, want := w.shown(), strings.Join(shown, "")+"::debug::shown\n"; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}
