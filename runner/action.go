package runner

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/workflow"
)

// actionDepth is how deep actions may use actions, as on GitHub.
const actionDepth = 10

// actionsMax is how many actions a job may use, nested ones each time: a few
// lines of a job's own files can otherwise stand for 10^10 steps.
const actionsMax = 1000

var errActionFailed = errors.New("a step of the action failed")

// use runs the steps of a composite action. What is bound to the step that uses
// it is held for all of it.
func (s *steps) use(ctx, alive context.Context, step *current) ending {
	f, outputs, err := s.enter(ctx, step)
	if err != nil {
		return failed(fmt.Errorf("%s: %w", step.Position, err))
	}
	if err := s.sequence(ctx, alive, f); err != nil {
		return ending{conclusion: providers.Failure, exit: f.exit, reason: err}
	}
	end := ending{conclusion: f.status, exit: f.exit, outputs: map[string]string{}}
	switch {
	case s.cancelled():
		end.conclusion, end.reason = providers.Cancelled, providers.ErrCancelled
	case f.status == providers.Failure:
		end.reason = errActionFailed
	}
	scope := s.filesScope(ctx, f, nil)
	for _, name := range slices.Sorted(maps.Keys(outputs)) {
		if end.outputs[name], err = workflow.Interpolate(outputs[name], scope); err != nil {
			return failed(fmt.Errorf("%s: output %s of the action: %w", step.Position, name, err))
		}
	}
	return end
}

// enter reads an action as it lies in the workspace now, and gives it its
// inputs. It comes out of the box: it can be anything.
func (s *steps) enter(ctx context.Context, step *current) (*frame, map[string]string, error) {
	dir, err := workflow.LocalAction(step.Uses)
	if err != nil {
		return nil, nil, err
	}
	if step.frame.depth == actionDepth {
		return nil, nil, fmt.Errorf("uses %s: actions use actions more than %d deep", step.Uses, actionDepth)
	}
	if s.root.used++; s.root.used > actionsMax {
		return nil, nil, fmt.Errorf("uses %s: a job may use %d actions, nested ones included", step.Uses, actionsMax)
	}
	action, err := s.readAction(ctx, dir)
	if err != nil {
		return nil, nil, err
	}
	f := &frame{
		outer: step, steps: action.Steps, depth: step.frame.depth + 1, action: below(dir), inputs: map[string]string{},
		env: map[string]string{}, done: map[string]any{}, status: providers.Success,
	}
	maps.Copy(f.env, step.frame.env)
	maps.Copy(f.env, step.env)
	return f, action.Outputs, s.giveInputs(ctx, f, action)
}

func (s *steps) readAction(ctx context.Context, dir string) (*workflow.Action, error) {
	for _, name := range []string{"action.yml", "action.yaml"} {
		b, err := s.box.Get(ctx, below(dir)+"/"+name, workflow.MaxSource)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		file := "./" + strings.TrimPrefix(dir+"/", "./") + name
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		return workflow.LoadAction(b, file)
	}
	return nil, fmt.Errorf("there is no action.yml or action.yaml in %s: has a step put the repository there?", below(dir))
}

// giveInputs evaluates what the step gives with "with", where the step stands,
// and the defaults of the rest, where the action does. What is wrong with them
// is told and no error, as on GitHub: an action may know better.
func (s *steps) giveInputs(ctx context.Context, f *frame, action *workflow.Action) error {
	step := f.outer
	given := map[string]string{} // by the name in lower case
	for _, name := range slices.Sorted(maps.Keys(step.With)) {
		v, err := workflow.Interpolate(step.With[name], step.scope)
		if err != nil {
			return fmt.Errorf("with %s: %w", name, err)
		}
		lower := strings.ToLower(name)
		given[lower] = v
		if !slices.ContainsFunc(action.Inputs, func(in workflow.Input) bool { return strings.ToLower(in.Name) == lower }) {
			s.out.notice(step.index, fmt.Sprintf("%s: the action declares no input %q", step.Position, name))
		}
	}
	scope := s.filesScope(ctx, f, nil)
	for _, in := range action.Inputs {
		v, ok := given[strings.ToLower(in.Name)]
		switch {
		case ok && in.Deprecated != "":
			s.out.notice(step.index, fmt.Sprintf("%s: input %q is deprecated: %s", step.Position, in.Name, in.Deprecated))
		case ok:
		case in.Required && in.Default == "":
			s.out.notice(step.index, fmt.Sprintf("%s: input %q is required and not given", step.Position, in.Name))
		}
		if !ok {
			var err error
			if v, err = workflow.Interpolate(in.Default, scope); err != nil {
				return fmt.Errorf("default of input %s: %w", in.Name, err)
			}
		}
		f.inputs[in.Name] = v
	}
	return nil
}
