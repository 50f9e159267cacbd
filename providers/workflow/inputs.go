package workflow

import (
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/rhysd/actionlint"
)

// inputs gives the inputs context. For an event workflow_dispatch these are
// the declared inputs, with their defaults and in their types; other events
// have what they were given.
func (b *builder) inputs(f Facts) map[string]any {
	given := maps.Clone(f.Inputs)
	if given == nil {
		given = map[string]any{}
	}
	declared := b.dispatch()
	if f.Subject.Event != "workflow_dispatch" || declared == nil {
		return given
	}
	inputs := map[string]any{}
	for _, in := range declared.Inputs {
		v, ok := given[in.Name.Value]
		delete(given, in.Name.Value)
		switch {
		case ok:
		case in.Default != nil:
			v = in.Default.Value
		case in.Required != nil && in.Required.Value:
			b.add(in.Name.Pos, "input %q is required", in.Name.Value)
			continue
		}
		typed, err := typedInput(in, v)
		if err != nil {
			b.add(in.Name.Pos, "input %q: %v", in.Name.Value, err)
		}
		inputs[in.Name.Value] = typed
	}
	for _, name := range slices.Sorted(maps.Keys(given)) {
		b.add(declared.Pos, "input %q was given and is not declared", name)
	}
	return inputs
}

func (b *builder) dispatch() *actionlint.WorkflowDispatchEvent {
	for _, on := range b.workflow.On {
		if e, ok := on.(*actionlint.WorkflowDispatchEvent); ok {
			return e
		}
	}
	return nil
}

// typedInput converts what was given, which may be text, to the input's type.
func typedInput(in *actionlint.DispatchInput, v any) (any, error) {
	s := toString(v)
	switch in.Type {
	case actionlint.WorkflowDispatchEventInputTypeBoolean:
		if s != "" && s != "true" && s != "false" {
			return nil, fmt.Errorf("%q is neither true nor false", s)
		}
		return s == "true", nil
	case actionlint.WorkflowDispatchEventInputTypeNumber:
		n := parseNumber(s)
		if math.IsNaN(n) {
			return nil, fmt.Errorf("%q is not a number", s)
		}
		return n, nil
	case actionlint.WorkflowDispatchEventInputTypeChoice:
		for _, o := range in.Options {
			if o.Value == s {
				return s, nil
			}
		}
		if s != "" || v != nil {
			return nil, fmt.Errorf("%q is not one of its options", s)
		}
	}
	return s, nil
}
