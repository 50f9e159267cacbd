package workflow

import (
	"fmt"
	"path"
	"strings"

	"github.com/rhysd/actionlint"
	"go.yaml.in/yaml/v4"

	"github.com/mayfly-ci/mayfly/providers"
)

// An Action is a composite action that was read and is free of errors.
type Action struct {
	Inputs  []Input
	Outputs map[string]string // name → template
	Steps   []providers.Step
}

// An Input is one that an action declares. Names are the same in any case.
type Input struct {
	Name       string
	Required   bool
	Default    string // a template
	Deprecated string // what the action says of its use; "" if it is welcome
}

// LocalAction returns the directory that "uses" names, relative to the
// workspace, and an error that says what to do for everything else that may
// stand there: no action is fetched, and none runs outside of the job's box.
func LocalAction(uses string) (dir string, err error) {
	switch {
	case strings.Contains(uses, "${{"):
		return "", fmt.Errorf(`"uses: %s" is not supported: it cannot be an expression`, excerpt(uses))
	case strings.HasPrefix(uses, "docker://"):
		return "", fmt.Errorf(`"uses: %s" is not supported yet: a step runs in the box of its job; call the program in a "run" step`, excerpt(uses))
	case uses != "." && uses != ".." && !strings.HasPrefix(uses, "./") && !strings.HasPrefix(uses, "../"):
		hint := `copy the action into this repository and use it as ./directory, or write what it does as a "run" step`
		if strings.HasPrefix(uses, "actions/checkout") {
			hint = `clone with git in a "run" step`
		}
		return "", fmt.Errorf(`"uses: %s" is not supported yet: actions of other repositories are not fetched; %s`, excerpt(uses), hint)
	}
	dir = path.Clean(uses)
	if dir == ".." || strings.HasPrefix(dir, "../") || strings.ContainsRune(uses, 0) {
		return "", fmt.Errorf(`"uses: %s" leads out of the workspace`, excerpt(uses))
	}
	return dir, nil
}

// LoadAction reads the metadata of a composite action, action.yml ("Metadata
// syntax for GitHub Actions" at docs.github.com). Such a file comes out of a
// box: it is read with the bounds and the care of Load. The error names every
// problem with file:line:column.
func LoadAction(src []byte, file string) (*Action, error) {
	p := &problems{file: file}
	if len(src) > MaxSource {
		p.add(nil, "the file has more than %d bytes (1 MiB), the most that an action may have", MaxSource)
		return nil, p.joined()
	}
	var doc yaml.Node
	err := yaml.Unmarshal(src, &doc)
	if err == nil && countNodes(&doc, map[*yaml.Node]int{}) > maxNodes {
		err = fmt.Errorf("the aliases of the file stand for more than %d nodes", maxNodes)
	}
	if err != nil {
		p.add(nil, "%v", err)
		return nil, p.joined()
	}
	r := &actionReader{builder: &builder{problems: p, files: true, hidden: hiddenInActions}, action: &Action{Outputs: map[string]string{}}}
	r.read(dig(&doc))
	if err := p.joined(); err != nil {
		return nil, err
	}
	return r.action, nil
}

// hiddenInActions is GitHub's rule: an action sees of the secrets what it is
// given as an input.
func hiddenInActions(context string) bool {
	switch context {
	case "github", "inputs", "strategy", "matrix", "steps", "job", "runner", "env":
		return false
	}
	return true
}

type actionReader struct {
	*builder
	action *Action
}

func at(n *yaml.Node) *actionlint.Pos { return &actionlint.Pos{Line: n.Line, Col: n.Column} }

func (r *actionReader) read(root *yaml.Node) {
	var runs *yaml.Node
	r.mapping(root, "an action", func(key string, v *yaml.Node) bool {
		switch key {
		case "name", "author", "description", "branding":
		case "inputs":
			r.mapping(v, "inputs", func(name string, v *yaml.Node) bool { r.input(name, v); return true })
		case "outputs":
			r.mapping(v, "outputs", func(name string, v *yaml.Node) bool { r.output(name, v); return true })
		case "runs":
			runs = v
		default:
			return false
		}
		return true
	})
	if runs == nil {
		r.add(nil, `"runs" is missing`)
		return
	}
	if using := dig(runs, "using"); using == nil || !strings.EqualFold(using.Value, "composite") {
		r.refuseUsing(runs, using)
		return
	}
	r.mapping(runs, "runs", func(key string, v *yaml.Node) bool {
		if key == "steps" {
			r.steps(v)
		}
		return key == "steps" || key == "using"
	})
}

func (r *actionReader) refuseUsing(runs, using *yaml.Node) {
	kind := ""
	if using != nil {
		kind = using.Value
	}
	switch {
	case strings.HasPrefix(kind, "node"):
		r.add(at(using), `"using: %s" is not supported yet: JavaScript actions are not run; call the script in a composite action, or in a "run" step`, excerpt(kind))
	case kind == "docker":
		r.add(at(using), `"using: docker" is not supported yet: a step runs in the box of its job; call the program in a composite action, or in a "run" step`)
	default:
		r.add(at(runs), `runs: "using" is not composite`)
	}
}

// mapping calls do for each key, and names a key that do does not know.
func (r *actionReader) mapping(n *yaml.Node, what string, do func(key string, v *yaml.Node) bool) {
	if n == nil || n.Kind != yaml.MappingNode {
		var pos *actionlint.Pos
		if n != nil {
			pos = at(n)
		}
		r.add(pos, "%s: it is not a mapping", what)
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key := n.Content[i]
		switch {
		case seen[key.Value]:
			r.add(at(key), "%s: %q stands there twice", what, excerpt(key.Value))
		case !do(key.Value, follow(n.Content[i+1])):
			r.add(at(key), "%s: unknown key %q", what, excerpt(key.Value))
		}
		seen[key.Value] = true
	}
}

// text is a scalar as actionlint has it; nil, and a problem, if it is none.
func (r *actionReader) text(n *yaml.Node, what string) *actionlint.String {
	switch {
	case n.Kind != yaml.ScalarNode:
		r.add(at(n), "%s: it is not a plain value", what)
		return nil
	case n.ShortTag() == "!!null":
		return &actionlint.String{Pos: at(n)}
	}
	return &actionlint.String{Value: n.Value, Pos: at(n)}
}

func (r *actionReader) input(name string, n *yaml.Node) {
	in := Input{Name: name}
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" { // "name:" alone
		r.action.Inputs = append(r.action.Inputs, in)
		return
	}
	r.mapping(n, "input "+excerpt(name), func(key string, v *yaml.Node) bool {
		switch key {
		case "description", "type":
		case "required":
			if s := r.text(v, key); s != nil {
				in.Required = s.Value == "true"
			}
		case "default":
			in.Default = r.template(r.text(v, key))
		case "deprecationMessage":
			if s := r.text(v, key); s != nil {
				in.Deprecated = s.Value
			}
		default:
			return false
		}
		return true
	})
	r.action.Inputs = append(r.action.Inputs, in)
}

func (r *actionReader) output(name string, n *yaml.Node) {
	value := false
	r.mapping(n, "output "+excerpt(name), func(key string, v *yaml.Node) bool {
		if key == "value" {
			value = true
			r.action.Outputs[name] = r.template(r.text(v, key))
		}
		return key == "value" || key == "description"
	})
	if !value {
		r.add(at(n), `output %q: "value" is missing`, excerpt(name))
	}
}

func (r *actionReader) steps(n *yaml.Node) {
	if n.Kind != yaml.SequenceNode {
		r.add(at(n), "steps: it is not a list")
		return
	}
	ids := map[string]bool{}
	for i, item := range n.Content {
		item = follow(item)
		var id *actionlint.String
		if own := dig(item, "id"); own != nil {
			id = r.text(own, "id")
		}
		r.action.Steps = append(r.action.Steps, r.step(r.id(ids, i, id), item))
	}
}

func (r *actionReader) step(id string, n *yaml.Node) providers.Step {
	step := providers.Step{ID: id, Env: providers.Env{Vars: map[string]string{}}, Position: position(r.file, at(n))}
	has := map[string]bool{}
	r.mapping(n, "step", func(key string, v *yaml.Node) bool {
		has[key] = true
		switch key {
		case "id":
		case "name":
			step.Name = r.template(r.text(v, key))
		case "if":
			step.If = r.condition(r.text(v, key))
		case "run":
			step.Run = r.template(r.text(v, key))
		case "shell":
			step.Shell = r.template(r.text(v, key))
		case "working-directory":
			step.Dir = r.template(r.text(v, key))
		case "continue-on-error":
			step.ContinueOnError = r.template(r.text(v, key))
		case "uses":
			step.Uses = r.uses(r.text(v, key))
		case "with":
			step.With = r.templates(v, key)
		case "env":
			if v.Kind == yaml.ScalarNode {
				step.Env.Expr = r.template(r.text(v, key))
			} else {
				step.Env.Vars = r.templates(v, key)
			}
		default:
			return false
		}
		return true
	})
	switch {
	case has["run"] == has["uses"]:
		r.add(at(n), `step: it has to have either "run" or "uses"`)
	case has["run"] && !has["shell"]:
		r.add(at(n), `step: "shell" is missing: an action must name it, as on GitHub`)
	case has["run"] && has["with"], has["uses"] && (has["shell"] || has["working-directory"]):
		r.add(at(n), `step: "with" goes with "uses", "shell" and "working-directory" with "run"`)
	}
	return step
}

func (r *actionReader) templates(n *yaml.Node, what string) map[string]string {
	m := map[string]string{}
	r.mapping(n, what, func(key string, v *yaml.Node) bool {
		if what == "env" && !validName(key) {
			r.add(at(v), "env: %q cannot be the name of a variable", key)
		}
		m[key] = r.template(r.text(v, what+" "+excerpt(key)))
		return true
	})
	return m
}
