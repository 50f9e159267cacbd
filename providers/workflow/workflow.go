// Package workflow reads GitHub Actions workflow files and evaluates their
// expressions, for every provider that speaks that syntax and for the agent.
//
// The YAML is read by github.com/rhysd/actionlint, and so are the tokens of
// expressions. The grammar above the tokens and the evaluation are here, since
// actionlint folds the case of property names, gives all comparisons one
// precedence, and evaluates nothing.
//
// Sources: "Workflow syntax for GitHub Actions", "Evaluate expressions in
// workflows and actions" and "Contexts" at docs.github.com, and where they are
// silent the evaluator in github.com/actions/runner, src/Sdk/Expressions.
package workflow

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/rhysd/actionlint"
	"go.yaml.in/yaml/v4"

	"github.com/mayfly-ci/mayfly/providers"
)

const (
	// MaxSource is the size of the largest workflow file that is read, in
	// bytes. GitHub refuses larger ones too.
	MaxSource = 1 << 20

	// maxNodes bounds what aliases can blow a file up to: a few lines of YAML
	// can otherwise stand for 10^9 nodes. A file of MaxSource that uses no
	// alias stays below it.
	maxNodes = 1 << 20

	// maxProblems is how many problems of a file one error names.
	maxProblems = 20
)

// A Workflow is a workflow file that was read and is free of syntax errors.
// Whether its jobs can be run is for Job to say.
type Workflow struct {
	file string
	ast  *actionlint.Workflow
	doc  *yaml.Node
}

// Load reads a workflow file. The name of the file is used in positions only.
// The error wraps providers.ErrBadJob and names every problem with
// file:line:column (up to twenty).
func Load(src []byte, file string) (*Workflow, error) {
	p := &problems{file: file}
	if len(src) > MaxSource {
		p.add(nil, "the file has more than %d bytes (1 MiB), the most that a workflow may have", MaxSource)
		return nil, p.err()
	}
	doc, err := nodes(src)
	if err != nil {
		p.add(nil, "%v", err)
		return nil, p.err()
	}
	ast, errs := parse(src)
	for _, e := range errs {
		p.add(&actionlint.Pos{Line: e.Line, Col: e.Column}, "%s", e.Message)
	}
	if err := p.err(); err != nil {
		return nil, err
	}
	if ast == nil || len(ast.Jobs) == 0 {
		p.add(nil, "the file has no jobs")
		return nil, p.err()
	}
	return &Workflow{file: file, ast: ast, doc: doc}, nil
}

// parse runs actionlint's parser, which panics on some malformed input (a NaN
// as timeout, for one): hostile text must cost an error and not the agent.
func parse(src []byte) (w *actionlint.Workflow, errs []*actionlint.Error) {
	defer func() {
		if v := recover(); v != nil {
			w, errs = nil, []*actionlint.Error{{Message: fmt.Sprintf("the YAML parser gave up: %v", v)}}
		}
	}()
	return actionlint.Parse(src)
}

// nodes reads the YAML as it stands, and counts the nodes that it has once its
// aliases are followed.
func nodes(src []byte) (*yaml.Node, error) {
	var root yaml.Node
	// The parser says what is wrong with the YAML, and where.
	if yaml.Unmarshal(src, &root) == nil && countNodes(&root, map[*yaml.Node]int{}) > maxNodes {
		return nil, fmt.Errorf("the aliases of the file stand for more than %d nodes", maxNodes)
	}
	return &root, nil
}

// countNodes remembers each node's size in seen, so that its time is bounded by
// the size of the text. A node that is still being counted is met again only
// through a recursive alias, which the parser refuses.
func countNodes(n *yaml.Node, seen map[*yaml.Node]int) int {
	if size, ok := seen[n]; ok {
		return size
	}
	seen[n] = 1
	size := 1
	if n.Alias != nil {
		size += countNodes(n.Alias, seen)
	}
	for _, c := range n.Content {
		if size += countNodes(c, seen); size > maxNodes {
			break // before the sum can overflow
		}
	}
	seen[n] = size
	return size
}

// Name returns the name that the workflow gives itself; without one it is the
// name of the file, as on GitHub.
func (w *Workflow) Name() string {
	if w.ast.Name != nil && w.ast.Name.Value != "" {
		return w.ast.Name.Value
	}
	return w.file
}

// Jobs returns the ids of the jobs in the order of the file.
func (w *Workflow) Jobs() []string {
	jobs := make([]*actionlint.Job, 0, len(w.ast.Jobs))
	for _, j := range w.ast.Jobs {
		jobs = append(jobs, j)
	}
	slices.SortFunc(jobs, func(a, b *actionlint.Job) int {
		return cmp.Or(cmp.Compare(a.Pos.Line, b.Pos.Line), cmp.Compare(a.Pos.Col, b.Pos.Col))
	})
	ids := make([]string, len(jobs))
	for i, j := range jobs {
		ids[i] = j.ID.Value
	}
	return ids
}

// A problem is one reason why a workflow cannot be run.
type problem struct {
	line, col int
	text      string
}

// problems collects all of them, because a user would rather not be told of
// them one run at a time.
type problems struct {
	file string
	list []problem
}

func (p *problems) add(pos *actionlint.Pos, format string, args ...any) {
	at := problem{text: fmt.Sprintf(format, args...)}
	if pos != nil {
		at.line, at.col = pos.Line, pos.Col
	}
	p.list = append(p.list, at)
}

// err is what is wrong with a job.
func (p *problems) err() error {
	if err := p.joined(); err != nil {
		return fmt.Errorf("%w: %w", providers.ErrBadJob, err)
	}
	return nil
}

func (p *problems) joined() error {
	slices.SortStableFunc(p.list, func(a, b problem) int {
		return cmp.Or(cmp.Compare(a.line, b.line), cmp.Compare(a.col, b.col))
	})
	var errs []error
	for i, at := range p.list {
		if i == maxProblems {
			errs = append(errs, fmt.Errorf("%s: and %d more", p.file, len(p.list)-i))
			break
		}
		where := p.file
		if at.line > 0 {
			where = position(p.file, &actionlint.Pos{Line: at.line, Col: at.col})
		}
		errs = append(errs, fmt.Errorf("%s: %s", where, strings.TrimSpace(at.text)))
	}
	return errors.Join(errs...)
}

func position(file string, pos *actionlint.Pos) string {
	return fmt.Sprintf("%s:%d:%d", file, pos.Line, pos.Col)
}
