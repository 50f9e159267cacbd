package workflow

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"github.com/mayfly-ci/mayfly/providers"
)

// A function of the language. Arguments are evaluated before it is called.
type function struct {
	least, most int // arguments; most < 0 is no bound
	status      bool
	files       bool
	eval        func(ev *evaluator, args []any) any
}

// builtin finds a function by its name in any case.
func builtin(name string) (function, error) {
	switch strings.ToLower(name) {
	case "success":
		return status(func(ev *evaluator) bool { return ev.succeeded() }), nil
	case "failure":
		return status(func(ev *evaluator) bool {
			return !ev.succeeded() && ev.scope.Status != providers.Cancelled && ev.scope.Status != providers.Skipped
		}), nil
	case "cancelled":
		return status(func(ev *evaluator) bool { return ev.scope.Status == providers.Cancelled }), nil
	case "always":
		return status(func(*evaluator) bool { return true }), nil
	case "contains":
		return function{least: 2, most: 2, eval: contains}, nil
	case "startswith":
		return function{least: 2, most: 2, eval: func(ev *evaluator, args []any) any {
			return ev.within(args, func(s, part string) bool { return strings.HasPrefix(s, part) })
		}}, nil
	case "endswith":
		return function{least: 2, most: 2, eval: func(ev *evaluator, args []any) any {
			return ev.within(args, func(s, part string) bool { return strings.HasSuffix(s, part) })
		}}, nil
	case "case":
		return function{least: 3, most: -1, eval: choose}, nil
	case "format":
		return function{least: 1, most: -1, eval: format}, nil
	case "join":
		return function{least: 1, most: 2, eval: join}, nil
	case "tojson":
		return function{least: 1, most: 1, eval: toJSON}, nil
	case "fromjson":
		return function{least: 1, most: 1, eval: fromJSON}, nil
	case "hashfiles":
		return function{least: 1, most: 255, files: true, eval: hashFiles}, nil
	}
	return function{}, fmt.Errorf("unknown function %q: known are success, failure, always, cancelled, contains, startsWith, endsWith, case, format, join, toJSON, fromJSON and hashFiles", name)
}

func status(is func(*evaluator) bool) function {
	return function{status: true, eval: func(ev *evaluator, _ []any) any { return is(ev) }}
}

// errNoFiles is hashFiles where there is no workspace to look into.
func errNoFiles() error {
	return errors.New("hashFiles: it works in steps only, where there are files")
}

func hashFiles(ev *evaluator, args []any) any {
	if ev.scope.HashFiles == nil {
		ev.fail(errNoFiles())
		return nil
	}
	patterns := make([]string, len(args))
	for i, a := range args {
		patterns[i] = toString(a)
	}
	digest, err := ev.scope.HashFiles(patterns)
	if err != nil {
		ev.fail(fmt.Errorf("hashFiles: %w", err))
	}
	return digest
}

// within compares two strings that are made equal in case before.
func (ev *evaluator) within(args []any, is func(s, part string) bool) bool {
	if !primitive(args[0]) || !primitive(args[1]) {
		return false
	}
	s, part := toString(args[0]), toString(args[1])
	ev.charge(len(s) + len(part))
	return is(strings.Map(upper, s), strings.Map(upper, part))
}

func contains(ev *evaluator, args []any) any {
	a, ok := args[0].(array)
	if !ok {
		return ev.within(args, strings.Contains)
	}
	for i := 0; i < a.len() && ev.err == nil; i++ {
		ev.charge(itemCost)
		if equal(ev.item(a, i), args[1]) {
			return true
		}
	}
	return false
}

// choose is case(predicate, value, predicate, value, …, default).
func choose(ev *evaluator, args []any) any {
	for len(args) > 1 {
		is, ok := args[0].(bool)
		if !ok || len(args) == 2 {
			ev.fail(errors.New("case: wants pairs of a bool and a value, and a default"))
			return nil
		}
		if is {
			return args[1]
		}
		args = args[2:]
	}
	return args[0]
}

// format replaces {0}, {1}, …; doubled braces stand for themselves.
func format(ev *evaluator, args []any) any {
	var out strings.Builder
	s := toString(args[0])
	ev.charge(len(s))
	for s != "" && ev.err == nil {
		i := strings.IndexAny(s, "{}")
		if i < 0 {
			out.WriteString(s)
			break
		}
		out.WriteString(s[:i])
		if i+1 < len(s) && s[i+1] == s[i] {
			out.WriteByte(s[i])
			s = s[i+2:]
			continue
		}
		digits, rest, closed := strings.Cut(s[i+1:], "}")
		n, ok := argument(digits)
		if s[i] == '}' || !closed || !ok {
			ev.fail(errors.New("format: the format string has a brace that is neither doubled nor part of {N}"))
			break
		}
		if n >= len(args)-1 {
			ev.fail(fmt.Errorf("format: there is no argument {%d}", n))
			break
		}
		value := toString(args[n+1])
		ev.charge(len(value))
		out.WriteString(value)
		s = rest
	}
	return out.String()
}

func argument(digits string) (int, bool) {
	if digits == "" || len(digits) > 3 {
		return 0, false
	}
	n := 0
	for _, c := range []byte(digits) {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + int(c-'0')
	}
	return n, true
}

func join(ev *evaluator, args []any) any {
	a, ok := args[0].(array)
	if !ok {
		if primitive(args[0]) {
			return toString(args[0])
		}
		return ""
	}
	sep := ","
	if len(args) > 1 && primitive(args[1]) {
		sep = toString(args[1])
	}
	var out strings.Builder
	for i := 0; i < a.len() && ev.err == nil; i++ {
		s := toString(ev.item(a, i))
		if i > 0 {
			s = sep + s
		}
		ev.charge(len(s) + itemCost)
		out.WriteString(s)
	}
	return out.String()
}

// fromJSON does not quote the text in its error: it may be a secret.
func fromJSON(ev *evaluator, args []any) any {
	s := toString(args[0])
	ev.charge(len(s))
	var v any
	if err := json.Unmarshal([]byte(s), &v); err != nil {
		at := int64(len(s))
		if syntax, ok := errors.AsType[*json.SyntaxError](err); ok {
			at = syntax.Offset
		}
		ev.fail(fmt.Errorf("fromJSON: the text is not JSON (at byte %d of %d)", at, len(s)))
		return nil
	}
	return ev.canonical(v)
}

func toJSON(ev *evaluator, args []any) any {
	var out strings.Builder
	ev.writeJSON(&out, args[0], 0)
	return out.String()
}

// writeJSON writes with an indentation of two, as GitHub does. A context that
// contains itself ends at the bound on the work.
func (ev *evaluator) writeJSON(out *strings.Builder, v any, depth int) {
	ev.charge(depth)
	if ev.err != nil {
		return
	}
	switch v := v.(type) {
	case nil:
		out.WriteString("null")
	case float64:
		out.WriteString(formatNumber(v))
	case string:
		ev.writeString(out, v)
	case object:
		ev.writeItems(out, "{}", depth, v.keys(), func(k string, _ int) {
			ev.writeString(out, k)
			out.WriteString(": ")
			item, _ := ev.property(v, k)
			ev.writeJSON(out, item, depth+1)
		})
	case array:
		ev.writeItems(out, "[]", depth, make([]string, v.len()), func(_ string, i int) {
			ev.writeJSON(out, ev.item(v, i), depth+1)
		})
	default:
		out.WriteString(toString(v))
	}
}

func (ev *evaluator) writeItems(out *strings.Builder, braces string, depth int, keys []string, item func(string, int)) {
	if len(keys) == 0 {
		out.WriteString(braces)
		return
	}
	out.WriteByte(braces[0])
	for i, k := range keys {
		ev.charge(2 * (depth + 2))
		if ev.err != nil {
			return
		}
		if i > 0 {
			out.WriteByte(',')
		}
		out.WriteString("\n" + strings.Repeat("  ", depth+1))
		item(k, i)
	}
	out.WriteString("\n" + strings.Repeat("  ", depth) + braces[1:])
}

func (ev *evaluator) writeString(out *strings.Builder, s string) {
	ev.charge(len(s) + len(`""`))
	if ev.err != nil {
		return
	}
	enc := json.NewEncoder(trimNewline{out})
	enc.SetEscapeHTML(false)
	if err := enc.Encode(s); err != nil {
		ev.fail(fmt.Errorf("toJSON: %w", err))
	}
}

// trimNewline drops the newline that an encoder adds.
type trimNewline struct{ out *strings.Builder }

func (t trimNewline) Write(b []byte) (int, error) {
	t.out.WriteString(strings.TrimSuffix(string(b), "\n"))
	return len(b), nil
}
