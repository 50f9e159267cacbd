package workflow

import (
	"errors"
	"fmt"
	"math"
	"reflect"
	"strings"
	"time"

	"github.com/rhysd/actionlint"

	"github.com/mayfly-ci/mayfly/providers"
)

const (
	// maxWork bounds one call of this package in bytes produced and items
	// looked at, as GitHub bounds the memory of an evaluation to 10 MB. It
	// bounds the output too.
	maxWork = 10 << 20

	// itemCost is what an item of a collection counts for in that sum: about
	// the memory that it takes.
	itemCost = 32

	// maxMinutes is 30 days: a longer timeout is a mistake, and a far longer
	// one would overflow time.Duration.
	maxMinutes = 30 * 24 * 60
)

// ErrTooLarge reports an expression whose evaluation would produce or search
// more than 10 MiB, items of collections counted at 32 bytes.
var ErrTooLarge = errors.New("evaluation needs more than 10 MiB")

// A Scope is what an expression can see.
type Scope struct {
	// Contexts are github, env, vars, job, jobs, steps, runner, secrets,
	// strategy, matrix, needs and inputs. One that is absent is null. Values
	// are what JSON has, in any Go types of those kinds, and creds.Secret,
	// which counts as a string. Maps must not be changed during a call.
	Contexts map[string]any

	// Status is how the job stands: success() is true for Success and "",
	// cancelled() for Cancelled, none for Skipped, failure() for the rest.
	Status providers.Conclusion

	// HashFiles is the function of that name: it returns the digest of the
	// files that match, and "" if none does. It is nil where there are none.
	HashFiles func(patterns []string) (string, error)
}

// Interpolate replaces every ${{ expression }} of a template by its value as a
// string; an object becomes "Object" and an array "Array", as on GitHub.
// No value stands in its errors.
func Interpolate(template string, s Scope) (string, error) {
	var out strings.Builder
	ev := &evaluator{scope: s, left: maxWork}
	err := eachExpression(template, func(text string, p *parsed) error {
		if p != nil {
			text = toString(p.root.eval(ev))
		}
		ev.charge(len(text))
		if ev.err == nil {
			out.WriteString(text)
		}
		return ev.err
	})
	if err != nil {
		return "", err
	}
	return out.String(), nil
}

// Condition evaluates what stands under "if", with ${{ }} around it or
// without. An empty condition is success(); one that names none of success,
// failure, always and cancelled is joined to success() with &&.
func Condition(expr string, s Scope) (bool, error) {
	p, err := parseCondition(expr)
	if err != nil {
		return false, err
	}
	ev := &evaluator{scope: s, left: maxWork}
	if !p.status && !ev.succeeded() {
		return false, nil
	}
	ok := truthy(p.root.eval(ev))
	return ok && ev.err == nil, ev.err
}

// Variables evaluates a template whose value is an object of plain values, such
// as env written as one expression. Of null it makes no variables.
func Variables(template string, s Scope) (map[string]string, error) {
	v, err := evaluate(template, s)
	if err != nil || v == nil {
		return nil, err
	}
	m, ok := v.(map[string]any)
	if !ok {
		return nil, fmt.Errorf("template %q: the value is no object", excerpt(template))
	}
	vars := make(map[string]string, len(m))
	for k, v := range m {
		if !validName(k) || !primitive(v) {
			return nil, fmt.Errorf("template %q: %q cannot be a variable: it wants a name and a plain value", excerpt(template), excerpt(k))
		}
		vars[k] = toString(v)
	}
	return vars, nil
}

func validName(variable string) bool {
	return variable != "" && !strings.ContainsAny(variable, "=\x00")
}

// Text is a value as Interpolate shows it. What no expression can hold is "".
func Text(v any) string {
	ev := &evaluator{left: maxWork}
	return toString(ev.canonical(v))
}

// Bool evaluates a template that must give true or false, such as
// continue-on-error. An empty one is false.
func Bool(template string, s Scope) (bool, error) {
	v, err := Interpolate(template, s)
	if err != nil {
		return false, err
	}
	switch strings.TrimSpace(v) {
	case "true":
		return true, nil
	case "false", "":
		return false, nil
	}
	return false, fmt.Errorf("template %q: the value is neither true nor false", excerpt(template))
}

// Minutes evaluates a template that must give a positive number of minutes,
// fractions allowed, such as timeout-minutes. An empty one is 0.
func Minutes(template string, s Scope) (time.Duration, error) {
	v, err := Interpolate(template, s)
	if err != nil || v == "" {
		return 0, err
	}
	m := parseNumber(v)
	if math.IsNaN(m) || m <= 0 || m > maxMinutes {
		return 0, fmt.Errorf("template %q: the value is not a number of minutes above 0 and up to %d", excerpt(template), maxMinutes)
	}
	return time.Duration(m * float64(time.Minute)), nil
}

// eachExpression cuts a template into its literal parts (nil) and expressions.
func eachExpression(template string, do func(text string, p *parsed) error) error {
	for template != "" {
		text, rest, found := strings.Cut(template, "${{")
		if err := do(text, nil); err != nil || !found {
			return err
		}
		p, err := parseExpression(rest)
		if err != nil {
			return err
		}
		if err := do("", &p); err != nil {
			return err
		}
		template = rest[p.end:]
	}
	return nil
}

// parseCondition refuses text around an expression: GitHub makes a string of
// the two, which is always true, and a condition that is always true by
// accident is what a security product should not run.
func parseCondition(expr string) (parsed, error) {
	src := strings.TrimSpace(expr)
	if src == "" {
		src = "success()"
	}
	if inner, ok := strings.CutPrefix(src, "${{"); ok {
		src = inner
	} else {
		src += "}}"
	}
	p, err := parseExpression(src)
	if err == nil && p.end != len(src) {
		err = fmt.Errorf("condition %q: text around ${{ }} makes it always true: put all of it into one ${{ }}", excerpt(expr))
	}
	return p, err
}

// An evaluator holds the first error of an evaluation and what may still be
// spent on it.
type evaluator struct {
	scope Scope
	left  int
	err   error
}

func (ev *evaluator) fail(err error) {
	if ev.err == nil {
		ev.err = err
	}
}

func (ev *evaluator) charge(n int) {
	if ev.left -= n; ev.left < 0 {
		ev.fail(ErrTooLarge)
	}
}

func (ev *evaluator) succeeded() bool {
	return ev.scope.Status == "" || ev.scope.Status == providers.Success
}

// of evaluates a node unless the evaluation has failed already.
func (ev *evaluator) of(n node) any {
	ev.charge(1)
	if ev.err != nil {
		return nil
	}
	return n.eval(ev)
}

func (n literal) eval(*evaluator) any { return n.value }

func (n context) eval(ev *evaluator) any { return ev.canonical(ev.scope.Contexts[n.name]) }

func (n not) eval(ev *evaluator) any { return !truthy(ev.of(n.x)) }

func (n call) eval(ev *evaluator) any {
	args := make([]any, len(n.args))
	for i, a := range n.args {
		args[i] = ev.of(a)
	}
	if ev.err != nil {
		return nil
	}
	return n.fn.eval(ev, args)
}

// eval of && and || gives the operand that decides, not a bool.
func (n binary) eval(ev *evaluator) any {
	x := ev.of(n.x)
	switch n.op {
	case actionlint.TokenKindAnd:
		if !truthy(x) {
			return x
		}
		return ev.of(n.y)
	case actionlint.TokenKindOr:
		if truthy(x) {
			return x
		}
		return ev.of(n.y)
	}
	y := ev.of(n.y)
	switch n.op {
	case actionlint.TokenKindEq:
		return equal(x, y)
	case actionlint.TokenKindNotEq:
		return !equal(x, y)
	case actionlint.TokenKindLess:
		return less(x, y)
	case actionlint.TokenKindLessEq:
		return less(x, y) || equal(x, y)
	case actionlint.TokenKindGreater:
		return less(y, x)
	default:
		return less(y, x) || equal(x, y)
	}
}

// eval looks up a property or an item. What is not there is null and no error;
// behind a .* it is left out.
func (n access) eval(ev *evaluator) any {
	x := ev.of(n.x)
	var key any
	if !n.star {
		key = ev.of(n.key)
	}
	if a, ok := x.(array); ok && a.filtered {
		var found []any
		for i := range a.len() {
			found = append(found, ev.lookup(ev.item(a, i), n.star, key)...)
			if ev.err != nil {
				return nil
			}
		}
		return array{v: reflect.ValueOf(found), filtered: true}
	}
	found := ev.lookup(x, n.star, key)
	if n.star {
		return array{v: reflect.ValueOf(found), filtered: true}
	}
	if len(found) == 0 {
		return nil
	}
	return found[0]
}

// lookup returns the values of x at the key, or all of them.
func (ev *evaluator) lookup(x any, star bool, key any) []any {
	ev.charge(itemCost)
	var found []any
	switch x := x.(type) {
	case object:
		if !star {
			if v, ok := ev.property(x, toString(key)); ok && primitive(key) {
				found = append(found, v)
			}
			return found
		}
		ev.charge(x.v.Len() * itemCost)
		for _, k := range x.keys() {
			v, _ := ev.property(x, k)
			found = append(found, v)
		}
	case array:
		if !star {
			if i := math.Floor(toNumber(key)); i >= 0 && i < float64(x.len()) {
				found = append(found, ev.item(x, int(i)))
			}
			return found
		}
		ev.charge(x.len() * itemCost)
		for i := range x.len() {
			if ev.err == nil {
				found = append(found, ev.item(x, i))
			}
		}
	}
	return found
}
