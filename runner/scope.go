package runner

import (
	"context"
	"maps"
	"path"
	"runtime"
	"strconv"
	"strings"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/workflow"
	"github.com/mayfly-ci/mayfly/sandbox"
)

// toolCache is where GitHub's machines keep tools; scripts look whether it is
// there.
const toolCache = "/opt/hostedtoolcache"

// A frame is where steps stand: the job, or an action that a step uses.
type frame struct {
	outer  *current // the step that uses the action; nil for the job
	steps  []providers.Step
	depth  int
	action string            // path of the action in the box, "" for the job
	inputs map[string]string // of the action
	env    map[string]string // of the steps around

	done   map[string]any // the context "steps"
	status providers.Conclusion
	exit   int // of the first step that failed
	used   int // actions, counted in the frame of the job
}

// A current is the step that runs now.
type current struct {
	providers.Step
	frame *frame
	index int // in the job, also for a step of an action
	name  string
	scope workflow.Scope
	env   map[string]string // of the step alone
}

// outermost is the step of the job: what the policy binds to it holds for all
// of the action that it uses.
func (c *current) outermost() *current {
	for c.frame.outer != nil {
		c = c.frame.outer
	}
	return c
}

// within says whether c is a step of the action that another step uses.
func (c *current) within(step *current) bool {
	for c.frame.outer != nil {
		if c = c.frame.outer; c == step {
			return true
		}
	}
	return false
}

// scope is what the expressions of a step can see. An action sees no secrets
// but those that it is given.
func (s *steps) scope(f *frame, step *current) workflow.Scope {
	c := map[string]any{}
	env := maps.Clone(s.env)
	if f.outer == nil {
		maps.Copy(c, s.job.Contexts)
		c["secrets"] = s.job.Secrets
	} else {
		for _, name := range []string{"strategy", "matrix"} {
			c[name] = s.job.Contexts[name]
		}
		c["inputs"] = f.inputs
		maps.Copy(env, f.env)
	}
	if step != nil {
		maps.Copy(env, step.env)
	}
	c["github"] = s.github(f, step)
	c["env"], c["steps"] = env, f.done
	c["job"] = s.jobContext(s.statusOf(s.root))
	c["runner"] = s.runner()
	return workflow.Scope{Contexts: c, Status: s.statusOf(f)}
}

// filesScope is scope where there are files to be hashed, until ctx ends.
func (s *steps) filesScope(ctx context.Context, f *frame, step *current) workflow.Scope {
	scope := s.scope(f, step)
	scope.HashFiles = func(patterns []string) (string, error) { return s.hashFiles(ctx, patterns) }
	return scope
}

// statusOf is how a frame stands: each action begins anew, as on GitHub, but a
// cancellation is one of the whole job.
func (s *steps) statusOf(f *frame) providers.Conclusion {
	if s.cancelled() {
		return providers.Cancelled
	}
	return f.status
}

// github is the context of the provider, with what it left out and what only
// the agent knows.
func (s *steps) github(f *frame, step *current) map[string]any {
	j := s.job.Subject
	owner, _, _ := strings.Cut(strings.TrimPrefix(j.Repository, "/"), "/")
	github := map[string]any{
		"repository": j.Repository, "repository_owner": owner, "ref": j.Ref, "ref_name": refName(j.Ref), "sha": j.SHA,
		"event_name": j.Event, "workflow": j.Workflow, "job": j.Job, "actor": j.Actor, "triggering_actor": j.Actor,
	}
	if own, ok := s.job.Contexts["github"].(map[string]any); ok {
		maps.Copy(github, own)
	}
	github["workspace"] = sandbox.Workspace
	github["event_path"] = sandbox.Run + "/" + eventFile
	if step != nil {
		github["action"] = step.name
	}
	if f.action != "" {
		github["action_path"] = f.action
	}
	return github
}

func (s *steps) runner() map[string]any {
	arch := map[string]string{"amd64": "X64", "arm64": "ARM64"}[runtime.GOARCH]
	r := map[string]any{
		"os": "Linux", "arch": arch, "name": "mayfly", "temp": tempDir, "tool_cache": toolCache, "environment": "self-hosted",
	}
	if s.debug {
		r["debug"] = "1"
	}
	return r
}

// actionNames are what github.action says of each step: its id, or for a step
// without one a name that GitHub makes up, with a number from the second on.
func actionNames(steps []providers.Step) []string {
	names := make([]string, len(steps))
	count := map[string]int{}
	for i, step := range steps {
		name := step.ID
		if strings.HasPrefix(name, "__") {
			if name = "__run"; step.Uses != "" {
				name = "__self"
			}
			if count[name]++; count[name] > 1 {
				name += "_" + strconv.Itoa(count[name])
			}
		}
		names[i] = name
	}
	return names
}

// below is a path of the workspace.
func below(dir string) string { return path.Join(sandbox.Workspace, dir) }
