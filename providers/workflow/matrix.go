package workflow

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"reflect"
	"slices"
	"strings"

	"github.com/rhysd/actionlint"
	"go.yaml.in/yaml/v4"
)

// maxMatrix is GitHub's bound on the jobs of one matrix.
const maxMatrix = 256

// strategy gives the contexts strategy and matrix. A service that expands a
// matrix sends each of its jobs with the values of one combination; a matrix
// that stands for several jobs is refused, since an agent runs one.
//
// It is read from the YAML itself: actionlint keeps neither the type of a
// scalar nor the case of a key, and `[false]` must not become a true string.
func (b *builder) strategy(doc *yaml.Node) (strategy map[string]any, matrix any) {
	strategy = map[string]any{"fail-fast": true, "job-index": 0, "job-total": 1, "max-parallel": 1}
	s := b.job.Strategy
	if s == nil {
		return strategy, nil
	}
	if s.FailFast != nil {
		v, err := Bool(b.boolean(s.FailFast), b.scope)
		if err != nil {
			b.add(s.FailFast.Pos, "fail-fast: %v", err)
		}
		strategy["fail-fast"] = v
	}
	if s.MaxParallel != nil {
		strategy["max-parallel"] = b.parallel(s.MaxParallel)
	}
	if s.Matrix == nil {
		return strategy, nil
	}
	r := &reader{scope: b.scope, left: maxNodes}
	v := r.value(dig(doc, "jobs", b.job.ID.Value, "strategy", "matrix"))
	if r.err != nil {
		b.add(s.Matrix.Pos, "matrix: %v", r.err)
		return strategy, nil
	}
	jobs, err := expand(v)
	switch {
	case err != nil:
		b.add(s.Matrix.Pos, "matrix: %v", err)
	case len(jobs) == 0:
		b.add(s.Matrix.Pos, "matrix: it has no combination of values")
	case len(jobs) > 1:
		b.add(s.Matrix.Pos, `"matrix" is not supported here: a matrix of several jobs has to be expanded by the service`)
	default:
		return strategy, jobs[0]
	}
	return strategy, nil
}

func (b *builder) parallel(n *actionlint.Int) float64 {
	if n.Expression == nil {
		return float64(n.Value)
	}
	v, err := Interpolate(n.Expression.Value, b.scope)
	f := parseNumber(v)
	if err == nil && (math.IsNaN(f) || f < 1) {
		err = fmt.Errorf("template %q: the value is not a number above 0", excerpt(n.Expression.Value))
	}
	if err != nil {
		b.add(n.Pos, "max-parallel: %v", err)
	}
	return f
}

// dig finds the node under a path of keys, in any case; nil if there is none.
func dig(n *yaml.Node, keys ...string) *yaml.Node {
	if n != nil && n.Kind == yaml.DocumentNode && len(n.Content) > 0 {
		n = n.Content[0]
	}
	for _, key := range keys {
		n = follow(n)
		var found *yaml.Node
		for i := 0; n != nil && n.Kind == yaml.MappingNode && i+1 < len(n.Content); i += 2 {
			if strings.EqualFold(n.Content[i].Value, key) {
				found = n.Content[i+1]
				break
			}
		}
		n = found
	}
	return follow(n)
}

func follow(n *yaml.Node) *yaml.Node {
	if n != nil && n.Alias != nil {
		return n.Alias
	}
	return n
}

// A reader turns YAML into values of the language, in which a scalar that is
// one expression has the value of that expression.
type reader struct {
	scope Scope
	left  int // nodes; aliases make many of few
	err   error
}

func (r *reader) value(n *yaml.Node) any {
	n = follow(n)
	if r.left--; n == nil || r.left < 0 || r.err != nil {
		return nil
	}
	switch n.Kind {
	case yaml.SequenceNode:
		list := make([]any, 0, len(n.Content))
		for _, c := range n.Content {
			list = append(list, r.value(c))
		}
		return list
	case yaml.MappingNode:
		m := make(map[string]any, len(n.Content)/2)
		for i := 0; i+1 < len(n.Content); i += 2 {
			m[n.Content[i].Value] = r.value(n.Content[i+1])
		}
		return m
	}
	return r.scalar(n)
}

func (r *reader) scalar(n *yaml.Node) any {
	var v any = n.Value
	var err error
	switch tag := n.ShortTag(); {
	case tag == "!!null":
		return nil
	case tag == "!!bool":
		var is bool
		err = n.Decode(&is)
		v = is
	case tag == "!!int", tag == "!!float":
		var f float64
		err = n.Decode(&f)
		v = f
	case strings.Contains(n.Value, "${{"):
		v, err = evaluate(n.Value, r.scope)
	}
	if err != nil && r.err == nil {
		r.err = fmt.Errorf("line %d: %w", n.Line, err)
	}
	return v
}

// evaluate gives the value of a template that is one expression, of any type,
// else the string that Interpolate makes.
func evaluate(template string, s Scope) (any, error) {
	src := strings.TrimSpace(template)
	inner, ok := strings.CutPrefix(src, "${{")
	if !ok {
		return Interpolate(template, s)
	}
	p, err := parseExpression(inner)
	if err != nil || p.end != len(inner) {
		return Interpolate(template, s)
	}
	ev := &evaluator{scope: s, left: maxWork}
	v := ev.plain(ev.of(p.root))
	return v, ev.err
}

// plain is a value of the language as Go has it.
func (ev *evaluator) plain(v any) any {
	ev.charge(itemCost)
	if ev.err != nil {
		return nil
	}
	switch v := v.(type) {
	case object:
		m := make(map[string]any, v.v.Len())
		for _, k := range v.keys() {
			item, _ := ev.property(v, k)
			m[k] = ev.plain(item)
		}
		return m
	case array:
		list := make([]any, v.len())
		for i := range list {
			list[i] = ev.plain(ev.item(v, i))
		}
		return list
	}
	return v
}

// expand gives the combinations of a matrix, as GitHub documents it under
// "Running variations of jobs in a workflow".
func expand(v any) ([]map[string]any, error) {
	m, ok := v.(map[string]any)
	if !ok {
		return nil, errors.New("it is not a mapping of lists")
	}
	rows := map[string][]any{}
	var include, exclude []map[string]any
	for _, k := range slices.Sorted(maps.Keys(m)) {
		list, ok := m[k].([]any)
		if !ok {
			return nil, fmt.Errorf("%q is not a list", k)
		}
		if len(list) > maxMatrix {
			return nil, fmt.Errorf("%q has more than %d items", k, maxMatrix)
		}
		var err error
		switch strings.ToLower(k) {
		case "include":
			include, err = mappings(k, list)
		case "exclude":
			exclude, err = mappings(k, list)
		default:
			rows[k] = list
		}
		if err != nil {
			return nil, err
		}
	}
	jobs, err := product(rows)
	if err != nil {
		return nil, err
	}
	var kept []map[string]any
	for _, j := range jobs {
		if !anyMatches(exclude, j) {
			kept = append(kept, j)
		}
	}
	return including(kept, include, rows), nil
}

func mappings(key string, list []any) ([]map[string]any, error) {
	var ms []map[string]any
	for _, v := range list {
		m, ok := v.(map[string]any)
		if !ok {
			return nil, fmt.Errorf("%s: an item is not a mapping", key)
		}
		ms = append(ms, m)
	}
	return ms, nil
}

func product(rows map[string][]any) ([]map[string]any, error) {
	if len(rows) == 0 {
		return nil, nil
	}
	jobs := []map[string]any{{}}
	for _, k := range slices.Sorted(maps.Keys(rows)) {
		var next []map[string]any
		for _, j := range jobs {
			for _, v := range rows[k] {
				with := maps.Clone(j)
				with[k] = v
				next = append(next, with)
			}
			if len(next) > maxMatrix {
				return nil, fmt.Errorf("it has more than %d combinations", maxMatrix)
			}
		}
		jobs = next
	}
	return jobs, nil
}

// anyMatches says whether a combination has all that one of the patterns names.
func anyMatches(patterns []map[string]any, job map[string]any) bool {
	for _, p := range patterns {
		all := len(p) > 0
		for k, v := range p {
			have, ok := job[k]
			all = all && ok && reflect.DeepEqual(have, v)
		}
		if all {
			return true
		}
	}
	return false
}

// including adds each item to the combinations whose own values it does not
// change, and makes a combination of one that fits none.
func including(jobs, include []map[string]any, rows map[string][]any) []map[string]any {
	original := len(jobs)
	for _, in := range include {
		fits := false
		for _, job := range jobs[:original] {
			if changes(in, job, rows) {
				continue
			}
			maps.Copy(job, in)
			fits = true
		}
		if !fits {
			jobs = append(jobs, maps.Clone(in))
		}
	}
	return jobs
}

func changes(in, job map[string]any, rows map[string][]any) bool {
	for k, v := range in {
		if _, own := rows[k]; own && !reflect.DeepEqual(job[k], v) {
			return true
		}
	}
	return false
}
