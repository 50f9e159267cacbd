package policy

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/google/cel-go/cel"
	"github.com/google/cel-go/common/types"
	"github.com/google/cel-go/common/types/ref"

	"github.com/mayfly-ci/mayfly/configs/strict"
	"github.com/mayfly-ci/mayfly/providers"
)

// Conditions (when:) are expressions of CEL over the facts of a job. They are
// checked when the policy is read, and what goes wrong later refuses the job: an
// error is never taken for false, since a rule further down may grant more.

const (
	// maxWhen bounds the text of a condition, and maxNesting its depth.
	maxWhen    = 2000
	maxNesting = 40
	// maxCost bounds what one may do, in CEL's units: about one for each step, and
	// one for ten characters looked at. Conditions of people need a hundred.
	maxCost = 100_000
)

// when is the text of a condition.
type when string

func (w *when) UnmarshalText(b []byte) error {
	*w = when(b)
	switch text := strings.TrimSpace(string(b)); {
	case text == "":
		return errors.New("condition is empty: remove the key to ask nothing")
	case len(b) > maxWhen:
		return fmt.Errorf("condition is longer than %d bytes", maxWhen)
	}
	return nil
}

// A condition is one that is ready to be asked. Nil always holds.
type condition struct {
	at      string // "policy.yaml:12"
	text    string
	program cel.Program
}

// conditions compiles those of one file. What they need is made for the first one,
// so that a policy without any costs nothing.
type conditions struct{ env *cel.Env }

// compile reads the condition of n, nil if it has none.
func (c *conditions) compile(n strict.Node) (*condition, error) {
	var text when
	if n = n.Get("when"); n.IsZero() {
		return nil, nil
	}
	if err := n.Decode(&text); err != nil {
		return nil, nil // it was refused already
	}
	if err := c.prepare(); err != nil {
		return nil, n.Errorf("when: %w", err)
	}
	ast, issues := c.env.Compile(string(text))
	if issues.Err() != nil {
		var all []string
		for _, e := range issues.Errors() {
			all = append(all, fmt.Sprintf("%s (character %d)", e.Message, e.Location.Column()+1))
		}
		return nil, n.Errorf("when: %s; write an expression such as %s (known: %s)",
			strings.Join(all, "; "), `job.ref.startsWith("refs/heads/release/")`, "job."+strings.Join(factNames(), ", job."))
	}
	if ast.OutputType() != cel.BoolType {
		return nil, n.Errorf("when: the condition is a %s: write one that is true or false", ast.OutputType())
	}
	program, err := c.env.Program(ast, cel.CostLimit(maxCost))
	if err != nil {
		return nil, n.Errorf("when: %w", err)
	}
	return &condition{at(n), strings.TrimSpace(string(text)), program}, nil
}

func (c *conditions) prepare() (err error) {
	if c.env != nil {
		return nil
	}
	registry, err := types.NewRegistry()
	if err == nil {
		c.env, err = cel.NewEnv(cel.CustomTypeAdapter(registry), cel.CustomTypeProvider(factTypes{registry}),
			cel.Variable("job", factType()), cel.ASTValidators(cel.ValidateRegexLiterals(), cel.ValidateDurationLiterals(), cel.ValidateTimestampLiterals()),
			cel.ParserRecursionLimit(maxNesting), cel.ParserExpressionSizeLimit(maxWhen))
	}
	return err
}

// holds asks about a job. An error wraps ErrDenied.
func (c *condition) holds(j providers.Job) (bool, error) {
	if c == nil {
		return true, nil
	}
	out, _, err := c.program.Eval(map[string]any{"job": facts{j}})
	if err == nil {
		if is, ok := out.Value().(bool); ok {
			return is, nil
		}
		err = fmt.Errorf("it is neither true nor false but a %s", out.Type().TypeName())
	}
	return false, fmt.Errorf("%w: %s: when: %w", ErrDenied, c.at, err)
}

// factNames are the facts of a job that conditions know, by the names that they
// have elsewhere in a policy.
func factNames() []string {
	return []string{"provider", "repository", "owner", "name", "ref", "sha", "workflow", "event", "job", "actor", "trust", "environment"}
}

// factOf is a fact of a job, "" if its provider does not say.
func factOf(j providers.Job, name string) string {
	s := j.Subject
	switch name {
	case "provider":
		return s.Provider
	case "workflow":
		return s.Workflow
	case "event":
		return s.Event
	case "job":
		return s.Job
	case "actor":
		return s.Actor
	case "trust":
		return string(j.Trust)
	case "environment":
		return s.Environment
	}
	value, _ := fact(name, j)
	return value
}

func factType() *cel.Type { return cel.ObjectType("mayfly.Job") }

// facts is a job as an expression sees it: an object with the fields that it was
// checked against.
type facts struct{ job providers.Job }

// Value implements ref.Val, as the methods below do.
func (f facts) Value() any { return f }

// Type says what conditions are checked against.
func (f facts) Type() ref.Type { return factType() }

// Equal is of no use to anybody, and so refused.
func (f facts) Equal(ref.Val) ref.Val {
	return types.NewErr("a job is compared with nothing: name a fact")
}

// ConvertToType is refused too.
func (f facts) ConvertToType(ref.Type) ref.Val { return types.NewErr("a job is nothing else") }

// ConvertToNative is refused too.
func (f facts) ConvertToNative(reflect.Type) (any, error) {
	return nil, errors.New("a job is nothing else")
}

// factTypes are CEL's own types, and facts.
type factTypes struct{ types.Provider }

// FindStructType implements types.Provider.
func (t factTypes) FindStructType(name string) (*types.Type, bool) {
	if name == factType().TypeName() {
		return types.NewTypeTypeWithParam(factType()), true
	}
	return t.Provider.FindStructType(name)
}

// FindStructFieldNames implements types.Provider.
func (t factTypes) FindStructFieldNames(name string) ([]string, bool) {
	if name == factType().TypeName() {
		return factNames(), true
	}
	return t.Provider.FindStructFieldNames(name)
}

// FindStructFieldType implements types.Provider. A fact that the provider does not
// say is an error to whoever reads it: has() tells beforehand.
func (t factTypes) FindStructFieldType(name, field string) (*types.FieldType, bool) {
	if name != factType().TypeName() {
		return t.Provider.FindStructFieldType(name, field)
	}
	if !slices.Contains(factNames(), field) {
		return nil, false
	}
	get := func(target any) string {
		f, _ := target.(facts)
		return factOf(f.job, field)
	}
	return &types.FieldType{
		Type:  types.StringType,
		IsSet: func(target any) bool { return get(target) != "" },
		GetFrom: func(target any) (any, error) {
			value := get(target)
			if value == "" {
				return nil, fmt.Errorf("the provider says no %s of this job: ask has(job.%s) first", field, field)
			}
			return value, nil
		},
	}, true
}

// NewValue implements types.Provider: conditions make no jobs.
func (t factTypes) NewValue(name string, fields map[string]ref.Val) ref.Val {
	if name == factType().TypeName() {
		return types.NewErr("a condition makes no job")
	}
	return t.Provider.NewValue(name, fields)
}

// An Unmet is what a rule grants on a condition that is false for the job.
type Unmet struct {
	What string `json:"what"` // "lease db, only in step deploy"
	At   string `json:"at"`   // "policy.yaml:31"
	When string `json:"when"`

	way   *Egress // which of the two it is
	lease string
}

// ask takes from the plan what it grants on conditions that are false.
func (p *Plan) ask(j providers.Job) error {
	var errs []error
	unmet := func(c *condition, u Unmet) bool {
		is, err := c.holds(j)
		errs = append(errs, err)
		if err == nil && !is {
			u.At, u.When = c.at, c.text
			p.Unmet = append(p.Unmet, u)
		}
		return !is
	}
	p.Egress = slices.DeleteFunc(p.Egress, func(e Egress) bool { return unmet(e.when, Unmet{What: wayText(e), way: &e}) })
	p.Leases = slices.DeleteFunc(p.Leases, func(l Lease) bool { return unmet(l.when, Unmet{What: leaseText(l), lease: l.Name}) })
	return errors.Join(errs...)
}
