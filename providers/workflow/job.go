package workflow

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/rhysd/actionlint"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
)

// Facts is what a provider knows of a job beside its text.
type Facts struct {
	Subject creds.Subject // Job is filled in by Workflow.Job
	Trust   providers.Trust
	// GitHub adds keys to the github context, or replaces the ones that are
	// made from the fields above.
	GitHub  map[string]any
	Vars    map[string]any
	Inputs  map[string]any // as given; defaults are filled in by Workflow.Job
	Secrets map[string]creds.Secret
	// Needs says how the jobs ended that this one waited for, by id; nil means
	// that the service has no such thing, and a job with needs is refused.
	Needs map[string]Need
}

// Job builds the job with the given id, in any case; "" is the only job of the
// file. It checks the job, its place in the file included, down to each
// expression, and its error, which wraps providers.ErrBadJob, names everything
// in it that cannot be run. Subject and Trust are set even then.
//
// The contexts are github (repository, repository_owner, ref, ref_name,
// ref_type, sha, event_name, actor, triggering_actor, workflow, workflow_ref,
// job, event and what Facts.GitHub adds), vars, inputs, needs, strategy and
// matrix. What only the runner knows, it adds: github.workspace, env, job,
// steps, runner, secrets.
//
// Timeout and Labels are evaluated here, everything else when it is needed.
// Workflow-level env and defaults are merged into the job and its steps.
func (w *Workflow) Job(id string, f Facts) (providers.Job, error) {
	job := providers.Job{Subject: f.Subject, Trust: f.Trust, Secrets: f.Secrets}
	job.Subject.Job = id
	p := &problems{file: w.file}
	src, err := w.find(id)
	if err != nil {
		p.add(nil, "%v", err)
		return job, p.err()
	}
	job.Subject.Job = src.ID.Value
	b := &builder{problems: p, workflow: w.ast, job: src}
	job.Contexts = map[string]any{"vars": f.Vars, "inputs": b.inputs(f)}
	job.Contexts["github"] = w.github(job.Subject, f)
	job.Contexts["needs"] = b.needs(f)
	b.scope = Scope{Contexts: job.Contexts}
	b.refuse()
	job.Contexts["strategy"], job.Contexts["matrix"] = b.strategy(w.doc)
	job.If = b.condition(src.If)
	job.Env = b.jobEnv()
	job.Containers = b.containers(w.doc)
	job.Labels = b.labels(src.RunsOn)
	job.Timeout = b.timeout(src.TimeoutMinutes)
	job.ContinueOnError = b.boolean(src.ContinueOnError)
	job.Outputs = map[string]string{}
	for _, o := range src.Outputs {
		job.Outputs[o.Name.Value] = b.template(o.Value)
	}
	job.Steps = b.steps()
	return job, p.err()
}

func (w *Workflow) find(id string) (*actionlint.Job, error) {
	if j, ok := w.ast.Jobs[strings.ToLower(id)]; ok && id != "" {
		return j, nil
	}
	ids := w.Jobs()
	if id == "" && len(ids) == 1 {
		return w.ast.Jobs[strings.ToLower(ids[0])], nil
	}
	if id == "" {
		return nil, fmt.Errorf("the workflow has several jobs, name one: %s", strings.Join(ids, ", "))
	}
	return nil, fmt.Errorf("there is no job %q, the workflow has: %s", id, strings.Join(ids, ", "))
}

func (w *Workflow) github(s creds.Subject, f Facts) map[string]any {
	owner, _, _ := strings.Cut(strings.TrimPrefix(s.Repository, "/"), "/")
	refType, refName := "", s.Ref
	for prefix, kind := range map[string]string{"refs/heads/": "branch", "refs/tags/": "tag", "refs/": ""} {
		if name, ok := strings.CutPrefix(s.Ref, prefix); ok && len(name) <= len(refName) {
			refName, refType = name, kind
		}
	}
	github := map[string]any{
		"repository":       s.Repository,
		"repository_owner": owner,
		"ref":              s.Ref,
		"ref_name":         refName,
		"ref_type":         refType,
		"sha":              s.SHA,
		"event_name":       s.Event,
		"actor":            f.Subject.Actor,
		"triggering_actor": f.Subject.Actor,
		"workflow":         w.Name(),
		"workflow_ref":     s.Repository + "/" + w.file + "@" + s.Ref,
		"job":              s.Job,
		"event":            map[string]any{},
	}
	for k, v := range f.GitHub {
		github[k] = v
	}
	return github
}

// A builder reads one job and collects what is wrong with it.
type builder struct {
	*problems
	workflow *actionlint.Workflow
	job      *actionlint.Job
	scope    Scope
	files    bool                   // there are some: it is a step
	hidden   func(name string) bool // contexts that cannot be seen; nil hides none
}

// refuse names every part of the job that would change what the job does and
// is not supported. What has no effect here (permissions, concurrency,
// run-name, on, name) is accepted.
func (b *builder) refuse() {
	unsupported := func(is bool, pos *actionlint.Pos, key, hint string) {
		if is {
			b.add(pos, "%q is not supported yet: %s", key, hint)
		}
	}
	j := b.job
	if j.WorkflowCall != nil {
		unsupported(true, j.WorkflowCall.Uses.Pos, "uses", "a job cannot call another workflow")
		return
	}
	if j.Environment != nil {
		unsupported(true, j.Environment.Pos, "environment", "no environment is protected here, so that none can be claimed")
	}
	if j.Snapshot != nil && j.Snapshot.ImageName != nil {
		unsupported(true, j.Snapshot.ImageName.Pos, "snapshot", "nothing of a job is kept")
	}
	if j.RunsOn != nil && j.RunsOn.Group != nil {
		unsupported(true, j.RunsOn.Group.Pos, "group", "there are no groups of runners, use labels")
	}
}

// template checks the expressions of a value and returns it unchanged.
func (b *builder) template(s *actionlint.String) string {
	if s == nil {
		return ""
	}
	if err := eachExpression(s.Value, func(_ string, p *parsed) error { return b.check(p) }); err != nil {
		b.add(s.Pos, "%v", err)
	}
	return s.Value
}

// check refuses what an expression cannot see where it stands.
func (b *builder) check(p *parsed) error {
	if p == nil {
		return nil
	}
	if p.files && !b.files {
		return errNoFiles()
	}
	for _, c := range p.contexts {
		if b.hidden != nil && b.hidden(c) {
			return fmt.Errorf("the context %s cannot be seen in an action: give it what it needs as an input", c)
		}
	}
	return nil
}

func (b *builder) condition(s *actionlint.String) string {
	if s == nil {
		return ""
	}
	p, err := parseCondition(s.Value)
	if err == nil {
		err = b.check(&p)
	}
	if err != nil {
		b.add(s.Pos, "if: %v", err)
	}
	return s.Value
}

// jobEnv joins the variables of the workflow and of the job. Written as one
// expression, those of the job replace the others; those of the workflow can be
// told apart from a job's only if it has none.
func (b *builder) jobEnv() providers.Env {
	outer := b.env(nil, b.workflow.Env)
	if b.job.Env == nil {
		return outer
	}
	if outer.Expr != "" {
		b.add(b.workflow.Env.Expression.Pos, `"env" of a workflow as one expression is not supported beside "env" of the job: write the variables out`)
	}
	return b.env(outer.Vars, b.job.Env)
}

// env returns a copy of outer in which the variables of env replace those of
// the same name, or env as one expression. On Linux names differ in case too,
// as on GitHub.
func (b *builder) env(outer map[string]string, env *actionlint.Env) providers.Env {
	merged := make(map[string]string, len(outer))
	for k, v := range outer {
		merged[k] = v
	}
	if env == nil {
		return providers.Env{Vars: merged}
	}
	for _, v := range env.Vars {
		if !validName(v.Name.Value) {
			b.add(v.Name.Pos, "env: %q cannot be the name of a variable", v.Name.Value)
			continue
		}
		merged[v.Name.Value] = b.template(v.Value)
	}
	return providers.Env{Vars: merged, Expr: b.template(env.Expression)}
}

func (b *builder) labels(r *actionlint.Runner) []string {
	if r == nil {
		return nil
	}
	if r.LabelsExpr != nil {
		return b.labelsOf(r.LabelsExpr)
	}
	var labels []string
	for _, l := range r.Labels {
		v, err := Interpolate(l.Value, b.scope)
		if err != nil {
			b.add(l.Pos, "runs-on: %v", err)
			continue
		}
		labels = append(labels, v)
	}
	return labels
}

// labelsOf evaluates runs-on written as one expression, which may be a list.
func (b *builder) labelsOf(s *actionlint.String) []string {
	ev := &evaluator{scope: b.scope, left: maxWork}
	var labels []string
	err := eachExpression(s.Value, func(_ string, p *parsed) error {
		if p == nil {
			return nil
		}
		v := ev.of(p.root)
		a, ok := v.(array)
		if !ok {
			labels = append(labels, toString(v))
			return ev.err
		}
		for i := range a.len() {
			ev.charge(1)
			labels = append(labels, toString(ev.item(a, i)))
		}
		return ev.err
	})
	if err != nil {
		b.add(s.Pos, "runs-on: %v", err)
	}
	return labels
}

func (b *builder) timeout(f *actionlint.Float) time.Duration {
	d, err := Minutes(b.number(f), b.scope)
	if err != nil {
		b.add(f.Pos, "timeout-minutes: %v", err)
	}
	return d
}

// number and boolean give back as a template what actionlint has split into a
// value and an expression.
func (b *builder) number(f *actionlint.Float) string {
	switch {
	case f == nil:
		return ""
	case f.Expression != nil:
		return b.template(f.Expression)
	}
	return strconv.FormatFloat(f.Value, 'f', -1, 64)
}

func (b *builder) boolean(v *actionlint.Bool) string {
	switch {
	case v == nil:
		return ""
	case v.Expression != nil:
		return b.template(v.Expression)
	}
	return strconv.FormatBool(v.Value)
}

func (b *builder) steps() []providers.Step {
	b.files = true
	ids := map[string]bool{}
	steps := make([]providers.Step, 0, len(b.job.Steps))
	for i, s := range b.job.Steps {
		steps = append(steps, b.step(b.id(ids, i, s.ID), s))
	}
	return steps
}

// id is what the i-th step is called: GitHub's rule, except that names which
// begin with two underscores are ours.
func (b *builder) id(seen map[string]bool, i int, s *actionlint.String) string {
	if s == nil {
		return "__" + strconv.Itoa(i+1)
	}
	valid := regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_-]*$`)
	lower := strings.ToLower(s.Value)
	if !valid.MatchString(s.Value) || strings.HasPrefix(s.Value, "__") {
		b.add(s.Pos, "id: %q is not a letter or _ followed by letters, digits, - and _ (two _ at the beginning are reserved)", s.Value)
	} else if seen[lower] {
		b.add(s.Pos, "id: %q is the id of two steps", s.Value)
	}
	seen[lower] = true
	return s.Value
}

func (b *builder) step(id string, s *actionlint.Step) providers.Step {
	step := providers.Step{
		ID:              id,
		Name:            b.template(s.Name),
		If:              b.condition(s.If),
		Env:             b.env(nil, s.Env),
		TimeoutMinutes:  b.number(s.TimeoutMinutes),
		ContinueOnError: b.boolean(s.ContinueOnError),
		Position:        position(b.file, s.Pos),
	}
	switch e := s.Exec.(type) {
	case *actionlint.ExecRun:
		step.Run = b.template(e.Run)
		step.Shell = b.template(b.first(e.Shell, func(d *actionlint.DefaultsRun) *actionlint.String { return d.Shell }))
		step.Dir = b.template(b.first(e.WorkingDirectory, func(d *actionlint.DefaultsRun) *actionlint.String { return d.WorkingDirectory }))
	case *actionlint.ExecAction:
		step.Uses = b.uses(e.Uses)
		step.With = map[string]string{}
		for _, in := range e.Inputs {
			step.With[in.Name.Value] = b.template(in.Value)
		}
		// Words with a meaning for Docker actions, for others inputs.
		for name, v := range map[string]*actionlint.String{"entrypoint": e.Entrypoint, "args": e.Args} {
			if v != nil {
				step.With[name] = b.template(v)
			}
		}
	}
	return step
}

func (b *builder) uses(s *actionlint.String) string {
	if s == nil {
		return ""
	}
	if _, err := LocalAction(s.Value); err != nil {
		b.add(s.Pos, "%v", err)
	}
	return s.Value
}

// first returns the step's own value, else the job's default, else the
// workflow's.
func (b *builder) first(own *actionlint.String, of func(*actionlint.DefaultsRun) *actionlint.String) *actionlint.String {
	if own != nil {
		return own
	}
	for _, d := range []*actionlint.Defaults{b.job.Defaults, b.workflow.Defaults} {
		if d != nil && d.Run != nil && of(d.Run) != nil {
			return of(d.Run)
		}
	}
	return nil
}
