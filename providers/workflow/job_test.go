package workflow

import (
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
)

const whole = `name: Build
run-name: by ${{ github.actor }}
on:
  workflow_dispatch:
    inputs:
      level: {type: number, default: 3}
      loud: {type: boolean, default: true}
      who: {type: choice, options: [me, you], default: you}
permissions: {contents: read}
concurrency: one
env: {A: workflow, B: workflow, http_proxy: p}
defaults: {run: {shell: sh, working-directory: sub}}
jobs:
  Build:
    name: The build
    runs-on: [linux, "${{ inputs.who }}"]
    permissions: read-all
    concurrency: {group: x}
    if: github.ref == 'refs/heads/main'
    timeout-minutes: ${{ inputs.level }}
    env: {B: "job ${{ github.sha }}"}
    defaults: {run: {shell: bash}}
    outputs: {Digest: "${{ steps.sum.outputs.digest }}"}
    steps:
      - run: echo one
      - id: sum
        name: Sum ${{ env.A }}
        if: ${{ always() }}
        run: |
          echo ${{ github.sha }}
        shell: python
        working-directory: other
        env: {C: "${{ secrets.T }}"}
        timeout-minutes: 1.5
        continue-on-error: true
      - run: echo three
        continue-on-error: ${{ inputs.loud }}
  other:
    runs-on: ${{ fromJSON('["a","b"]') }}
    steps: [{run: "true"}]
`

func noEnv() providers.Env { return providers.Env{Vars: map[string]string{}} }

func facts() Facts {
	return Facts{
		Subject: creds.Subject{Provider: "local", Repository: "owner/repo", Ref: "refs/heads/main", SHA: "abc", Event: "workflow_dispatch", Origin: creds.Origin{Actor: "mona"}},
		Trust:   providers.TrustLocal,
		GitHub:  map[string]any{"run_id": "r1"},
	}
}

func load(t *testing.T, src string) *Workflow {
	t.Helper()
	w, err := Load([]byte(src), "ci.yml")
	if err != nil {
		t.Fatalf("Load: %v", err)
	}
	return w
}

func TestJob(t *testing.T) {
	t.Parallel()
	w := load(t, whole)
	if got := w.Jobs(); !reflect.DeepEqual(got, []string{"Build", "other"}) {
		t.Errorf("Jobs() = %q, want those of the file in its order", got)
	}
	job, err := w.Job("build", facts())
	if err != nil {
		t.Fatalf("Job: %v", err)
	}
	github, _ := job.Contexts["github"].(map[string]any)
	for key, want := range map[string]any{
		"ref_name": "main", "ref_type": "branch", "repository_owner": "owner", "workflow": "Build",
		"job": "Build", "actor": "mona", "run_id": "r1", "sha": "abc", "event_name": "workflow_dispatch",
		"workflow_ref": "owner/repo/ci.yml@refs/heads/main",
	} {
		if github[key] != want {
			t.Errorf("github.%s = %v, want %v", key, github[key], want)
		}
	}
	inputs := map[string]any{"level": 3.0, "loud": true, "who": "you"}
	if !reflect.DeepEqual(job.Contexts["inputs"], inputs) {
		t.Errorf("inputs = %v, want the defaults in their types %v", job.Contexts["inputs"], inputs)
	}
	job.Contexts = nil
	f := facts()
	f.Subject.Job = "Build"
	want := providers.Job{
		Subject: f.Subject, Trust: providers.TrustLocal,
		Labels:  []string{"linux", "you"},
		If:      "github.ref == 'refs/heads/main'",
		Env:     providers.Env{Vars: map[string]string{"A": "workflow", "B": "job ${{ github.sha }}", "http_proxy": "p"}},
		Timeout: 3 * time.Minute,
		Outputs: map[string]string{"Digest": "${{ steps.sum.outputs.digest }}"},
		Steps: []providers.Step{
			{ID: "__1", Run: "echo one", Shell: "bash", Dir: "sub", Env: noEnv(), Position: "ci.yml:25:9"},
			{
				ID: "sum", Name: "Sum ${{ env.A }}", If: "${{ always() }}", Run: "echo ${{ github.sha }}\n", Shell: "python",
				Dir: "other", Env: providers.Env{Vars: map[string]string{"C": "${{ secrets.T }}"}}, TimeoutMinutes: "1.5", ContinueOnError: "true", Position: "ci.yml:26:9",
			},
			{ID: "__3", Run: "echo three", Shell: "bash", Dir: "sub", Env: noEnv(), ContinueOnError: "${{ inputs.loud }}", Position: "ci.yml:36:9"},
		},
	}
	if !reflect.DeepEqual(job, want) {
		t.Errorf("Job:\n got %+v\nwant %+v", job, want)
	}
	other, err := w.Job("other", facts())
	if err != nil || !reflect.DeepEqual(other.Labels, []string{"a", "b"}) {
		t.Errorf("runs-on as an expression: labels %q, %v; want a and b", other.Labels, err)
	}
}

func TestEnvAsExpression(t *testing.T) {
	t.Parallel()
	const expr = `${{ fromJSON('{"A":1,"B":"x"}') }}`
	w := load(t, `on: push
env: {A: outer, C: outer}
jobs:
  a:
    runs-on: x
    env: `+expr+`
    continue-on-error: ${{ github.ref == 'x' }}
    steps:
      - {run: x, env: "${{ env }}"}
      - run: echo ${{ hashFiles('**/go.sum') }}
`)
	job, err := w.Job("a", facts())
	if err != nil {
		t.Fatal(err)
	}
	if job.Env.Expr != expr || job.Env.Vars["C"] != "outer" || job.Steps[0].Env.Expr != "${{ env }}" || job.ContinueOnError != "${{ github.ref == 'x' }}" {
		t.Errorf("got %+v", job)
	}
	vars, err := Variables(job.Env.Expr, Scope{})
	if err != nil || !reflect.DeepEqual(vars, map[string]string{"A": "1", "B": "x"}) {
		t.Errorf("Variables: %v, %v", vars, err)
	}
	for _, bad := range []string{"x", "${{ 1 }}", `${{ fromJSON('{"a=b": 1}') }}`, `${{ fromJSON('{"a": [1]}') }}`, `${{ fromJSON('{"": 1}') }}`} {
		if vars, err := Variables(bad, Scope{}); err == nil {
			t.Errorf("Variables(%q) = %v, want an error", bad, vars)
		}
	}
	if vars, err := Variables("${{ null }}", Scope{}); err != nil || len(vars) != 0 {
		t.Errorf("Variables of null: %v, %v", vars, err)
	}

	w = load(t, "on: push\nenv: "+expr+"\njobs:\n  a: {runs-on: x, steps: [{run: x}]}\n  b: {runs-on: x, env: {X: x}, steps: [{run: x}]}\n")
	if job, err := w.Job("a", facts()); err != nil || job.Env.Expr != expr {
		t.Errorf("env of the workflow alone: %q, %v", job.Env.Expr, err)
	}
	if _, err := w.Job("b", facts()); !errors.Is(err, providers.ErrBadJob) || !strings.Contains(err.Error(), `ci.yml:2:6: "env" of a workflow as one expression`) {
		t.Errorf("env of the workflow beside that of the job: %v, want it refused by name", err)
	}
}

func TestRefNames(t *testing.T) {
	t.Parallel()
	w := load(t, "on: push\njobs: {a: {runs-on: x, steps: [{run: x}]}}")
	for ref, want := range map[string]string{
		"refs/heads/a/b": "branch a/b", "refs/tags/v1": "tag v1", "refs/pull/1/merge": " pull/1/merge", "": " ",
	} {
		f := facts()
		f.Subject.Ref = ref
		job, err := w.Job("", f)
		got, ierr := Interpolate("${{ github.ref_type }} ${{ github.ref_name }}", Scope{Contexts: job.Contexts})
		if err != nil || ierr != nil || got != want {
			t.Errorf("ref %q: type and name %q, %v, %v; want %q", ref, got, err, ierr, want)
		}
	}
}

func TestInputsAreChecked(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		given map[string]any
		want  string
	}{
		"number":     {map[string]any{"level": "x"}, `input "level": "x" is not a number`},
		"boolean":    {map[string]any{"loud": "yes"}, `input "loud": "yes" is neither`},
		"choice":     {map[string]any{"who": "they"}, `input "who": "they" is not one of`},
		"undeclared": {map[string]any{"what": 1}, `input "what" was given and is not declared`},
	} {
		f := facts()
		f.Inputs = c.given
		if _, err := load(t, whole).Job("build", f); !errors.Is(err, providers.ErrBadJob) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want ErrBadJob with %q", name, err, c.want)
		}
	}
	f := facts()
	f.Inputs = map[string]any{"level": "5", "loud": false}
	job, err := load(t, whole).Job("build", f)
	if err != nil || job.Timeout != 5*time.Minute {
		t.Errorf("given inputs: timeout %v, %v; want 5m", job.Timeout, err)
	}
	f.Subject.Event, f.Inputs = "push", map[string]any{"level": 2, "any": "x", "who": "me"}
	if job, err := load(t, whole).Job("build", f); err != nil || job.Timeout != 2*time.Minute {
		t.Errorf("another event: timeout %v, %v; want 2m and no check", job.Timeout, err)
	}
}

// Everything that would change what a job does and is not supported is named,
// all of it at once and with its place.
func TestJobRefuses(t *testing.T) {
	t.Parallel()
	w := load(t, `on: push
env: {W: "${{ hashFiles('a') }}"}
jobs:
  a:
    needs: b
    runs-on: {group: g, labels: x}
    strategy: {matrix: {v: [1, 2]}}
    container: {image: img, volumes: [/:/host]}
    services: {db: {image: pg, options: --privileged}}
    environment: prod
    continue-on-error: true
    snapshot: img
    if: ${{ true }} && false
    env: ${{ fromJSON('{}') }}
    timeout-minutes: ${{ 'x' }}
    outputs: {o: "${{ nope }}"}
    steps:
      - uses: actions/checkout@v4
      - run: echo ${{ hashFiles('b') }}
        id: 1st
      - {run: x, id: __2}
      - {run: x, id: same}
      - {run: x, id: SAME, env: {"a=b": c}}
  b:
    uses: ./.github/workflows/other.yml
`)
	_, err := w.Job("a", facts())
	if !errors.Is(err, providers.ErrBadJob) {
		t.Fatalf("Job = %v, want ErrBadJob", err)
	}
	for _, want := range []string{
		`ci.yml:2:10: hashFiles: it works in steps only`,
		`ci.yml:5:12: "needs" is not supported here`,
		`ci.yml:6:22: "group" is not supported yet`,
		`ci.yml:7:16: "matrix" is not supported here: a matrix of several jobs has to be expanded by the service`,
		`ci.yml:8:38: "volumes" is not supported: a box sees nothing of the host`,
		`ci.yml:9:41: option --privileged is refused: it would weaken the box`,
		`ci.yml:10:5: "environment" is not supported yet`,
		`ci.yml:12:15: "snapshot" is not supported yet`,
		`ci.yml:13:9: if: condition`,
		`ci.yml:15:22: timeout-minutes: `,
		`ci.yml:16:18: expression "nope": unknown name`,
		`ci.yml:18:15: "uses: actions/checkout@v4" is not supported yet`,
		`ci.yml:20:13: id: "1st"`,
		`ci.yml:21:22: id: "__2"`,
		`ci.yml:23:22: id: "SAME" is the id of two steps`,
		`ci.yml:23:34: env: "a=b" cannot be`,
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not name %q:\n%v", want, err)
		}
	}
	for id, want := range map[string]string{
		"b": `ci.yml:25:11: "uses" is not supported yet: a job cannot call`,
		"c": `there is no job "c", the workflow has: a, b`,
		"":  "several jobs, name one: a, b",
	} {
		job, err := w.Job(id, facts())
		if !errors.Is(err, providers.ErrBadJob) || !strings.Contains(err.Error(), want) {
			t.Errorf("Job(%q) = %v, want ErrBadJob with %q", id, err, want)
		}
		if job.Subject.Repository != "owner/repo" || job.Trust != providers.TrustLocal {
			t.Errorf("Job(%q): subject %+v and trust %q are not set beside the error", id, job.Subject, job.Trust)
		}
	}
}
