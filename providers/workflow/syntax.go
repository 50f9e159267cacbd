package workflow

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/rhysd/actionlint"
)

const (
	// maxExpression and maxDepth are GitHub's own bounds on one expression
	// (actions/runner, ExpressionConstants: MaxLength, MaxDepth).
	maxExpression = 21000
	maxDepth      = 50
)

// A node is a parsed expression.
type node interface {
	// eval returns null, a bool, a float64, a string, an object or an array.
	// The error of an evaluation is kept in the evaluator.
	eval(ev *evaluator) any
}

type (
	literal struct{ value any }
	context struct{ name string }
	not     struct{ x node }
	access  struct {
		x, key node
		star   bool // .* or [*]; then key is nil
	}
	binary struct {
		op   actionlint.TokenKind
		x, y node
	}
	call struct {
		fn   function
		args []node
	}
)

// A parser builds the tree by precedence climbing. GitHub binds ! tightest,
// then < <= > >=, then == !=, then &&, then ||, all of them from the left.
type parser struct {
	lex   *actionlint.ExprLexer
	tok   *actionlint.Token
	depth int
	parsed
	err error
}

// parsed is an expression and how it was written.
type parsed struct {
	root     node
	status   bool     // uses success, failure, always or cancelled
	files    bool     // uses hashFiles
	contexts []string // that it names
	end      int      // offset behind the closing braces
}

// parseExpression parses src up to the }} that ends the expression. Names of
// functions and contexts are checked here, so that a job with a wrong one is
// refused before its first step.
func parseExpression(src string) (parsed, error) {
	long := len(src) > maxExpression+len("}}")
	if long {
		src = src[:maxExpression+len("}}")]
	}
	p := &parser{lex: actionlint.NewExprLexer(src)}
	p.next()
	root := p.binary(1)
	if p.err == nil && p.tok.Kind != actionlint.TokenKindEnd {
		p.failf("unexpected %q", p.tok.Value)
	}
	if p.err != nil {
		if long {
			return parsed{}, fmt.Errorf("expression: no end within %d bytes, the most that an expression may have: %w", maxExpression, p.err)
		}
		text, _, _ := strings.Cut(src, "}}")
		return parsed{}, fmt.Errorf("expression %q: %w", excerpt(text), p.err)
	}
	p.root, p.end = root, p.lex.Offset()
	return p.parsed, nil
}

// excerpt is the beginning of a text for an error: as it stands in the
// workflow, which holds no values.
func excerpt(src string) string {
	const most = 60
	src = strings.TrimSpace(src)
	if len(src) > most {
		src = strings.ToValidUTF8(src[:most], "") + "…"
	}
	return src
}

func (p *parser) next() {
	p.tok = p.lex.Next()
	if err := p.lex.Err(); err != nil && p.err == nil {
		p.err = errors.New(err.Message)
	}
}

func (p *parser) failf(format string, args ...any) node {
	if p.err == nil {
		p.err = fmt.Errorf(format, args...)
	}
	return literal{}
}

// want eats a token of the kind, or fails.
func (p *parser) want(kind actionlint.TokenKind) {
	if p.err == nil && p.tok.Kind != kind {
		p.failf("expected %q and got %q", kind, p.tok.Value)
	}
	p.next()
}

func precedence(kind actionlint.TokenKind) int {
	switch kind {
	case actionlint.TokenKindOr:
		return 1
	case actionlint.TokenKindAnd:
		return 2
	case actionlint.TokenKindEq, actionlint.TokenKindNotEq:
		return 3
	case actionlint.TokenKindLess, actionlint.TokenKindLessEq, actionlint.TokenKindGreater, actionlint.TokenKindGreaterEq:
		return 4
	default:
		return 0
	}
}

func (p *parser) binary(least int) node {
	if p.depth++; p.depth > maxDepth {
		return p.failf("nested deeper than %d", maxDepth)
	}
	defer func() { p.depth-- }()
	x := p.unary()
	for p.err == nil {
		op := p.tok.Kind
		level := precedence(op)
		if level == 0 || level < least {
			break
		}
		p.next()
		x = binary{op: op, x: x, y: p.binary(level + 1)}
	}
	return x
}

func (p *parser) unary() node {
	var nots int
	for p.err == nil && p.tok.Kind == actionlint.TokenKindNot {
		p.next()
		nots++
	}
	x := p.postfix()
	for range nots {
		x = not{x}
	}
	return x
}

func (p *parser) postfix() node {
	x := p.primary()
	for p.err == nil {
		switch p.tok.Kind {
		case actionlint.TokenKindDot:
			p.next()
			switch p.tok.Kind {
			case actionlint.TokenKindStar:
				x = access{x: x, star: true}
			case actionlint.TokenKindIdent:
				x = access{x: x, key: literal{p.tok.Value}}
			default:
				return p.failf("expected a property name or * behind the dot and got %q", p.tok.Value)
			}
			p.next()
		case actionlint.TokenKindLeftBracket:
			p.next()
			if p.tok.Kind == actionlint.TokenKindStar {
				p.next()
				x = access{x: x, star: true}
			} else {
				x = access{x: x, key: p.binary(1)}
			}
			p.want(actionlint.TokenKindRightBracket)
		default:
			return x
		}
	}
	return x
}

func (p *parser) primary() node {
	if p.err != nil {
		return literal{}
	}
	tok := p.tok
	if tok.Kind != actionlint.TokenKindEnd {
		p.next() // there is nothing to be read behind the end
	}
	switch tok.Kind {
	case actionlint.TokenKindLeftParen:
		x := p.binary(1)
		p.want(actionlint.TokenKindRightParen)
		return x
	case actionlint.TokenKindInt, actionlint.TokenKindFloat:
		return p.number(tok.Value)
	case actionlint.TokenKindString:
		s := strings.TrimSuffix(strings.TrimPrefix(tok.Value, "'"), "'")
		return literal{strings.ReplaceAll(s, "''", "'")}
	case actionlint.TokenKindIdent:
		return p.word(tok.Value)
	case actionlint.TokenKindEnd:
		return p.failf("it ends where a value is expected")
	default:
		return p.failf("expected a value and got %q", tok.Value)
	}
}

func (p *parser) number(s string) node {
	if n, err := strconv.ParseInt(s, 0, 64); err == nil {
		return literal{float64(n)}
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil {
		return p.failf("%q is not a number that can be represented", s)
	}
	return literal{f}
}

// word parses what begins with a name: a keyword, a function call, a context.
// Keywords are case-sensitive and the other names are not, as on GitHub.
func (p *parser) word(name string) node {
	if p.err == nil && p.tok.Kind == actionlint.TokenKindLeftParen {
		return p.call(name)
	}
	switch name {
	case "null":
		return literal{}
	case "true":
		return literal{true}
	case "false":
		return literal{false}
	case "NaN":
		return literal{math.NaN()}
	case "Infinity":
		return literal{math.Inf(1)}
	}
	lower := strings.ToLower(name)
	if lower == "gitea" {
		lower = "github" // Gitea's other name for it
	}
	if !knownContext(lower) {
		return p.failf("unknown name %q: known are github, env, vars, job, steps, runner, secrets, strategy, matrix, needs and inputs", name)
	}
	p.contexts = append(p.contexts, lower)
	return context{lower}
}

func knownContext(name string) bool {
	switch name {
	case "github", "env", "vars", "job", "jobs", "steps", "runner", "secrets", "strategy", "matrix", "needs", "inputs":
		return true
	}
	return false
}

func (p *parser) call(name string) node {
	p.next() // the parenthesis
	var args []node
	for p.err == nil && p.tok.Kind != actionlint.TokenKindRightParen {
		if len(args) > 0 {
			p.want(actionlint.TokenKindComma)
		}
		args = append(args, p.binary(1))
	}
	p.want(actionlint.TokenKindRightParen)
	if p.err != nil {
		return literal{}
	}
	fn, err := builtin(name)
	if err != nil {
		p.err = err
		return literal{}
	}
	if len(args) < fn.least || fn.most >= 0 && len(args) > fn.most {
		return p.failf("%s: wrong number of arguments: %d", name, len(args))
	}
	p.status = p.status || fn.status
	p.files = p.files || fn.files
	return call{fn: fn, args: args}
}
