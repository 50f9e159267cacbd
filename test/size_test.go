package test

import (
	"go/ast"
	"strings"
	"testing"
)

// The limits. The median function of every project is short; taste shows in the
// tail, so the tail is what is limited.
const (
	maxFuncLines    = 80
	maxFileLines    = 500
	maxMethods      = 4
	maxFields       = 15
	maxLongFuncs    = 2 // exceptions, in longFuncs
	longFuncNoLimit = 1 << 30
)

// longFuncs are the functions that may be longer than maxFuncLines: file and
// name, and why no cut makes them clearer.
var longFuncs = map[string]string{}

func TestSizes(t *testing.T) {
	t.Parallel()
	if len(longFuncs) > maxLongFuncs {
		t.Errorf("%d functions may be long, want at most %d: shorten one", len(longFuncs), maxLongFuncs)
	}
	for _, r := range sizeRules() {
		r.hold(t)
	}
}

// TestLongFuncsExist keeps the list of exceptions from outliving them.
func TestLongFuncsExist(t *testing.T) {
	t.Parallel()
	all, err := sources()
	if err != nil {
		t.Fatal(err)
	}
	for name := range longFuncs {
		found := false
		for _, s := range all {
			s.funcs(func(fn *ast.FuncDecl) {
				found = found || s.path+" "+funcName(fn) == name && s.lines(fn) > maxFuncLines
			})
		}
		if !found {
			t.Errorf("%s is excepted from the limit and does not need it", name)
		}
	}
}

func (s *source) lines(n ast.Node) int {
	return s.fset.Position(n.End()).Line - s.fset.Position(n.Pos()).Line + 1
}

func sizeRules() []rule {
	return []rule{
		{
			name: "functions", why: "a function is read at one sight",
			check: longFunctions,
			bad: [][2]string{
				code("a/b.go", "func f() {"+strings.Repeat("\n", maxFuncLines)+"}"),
				code("a/b_test.go", "func (t *T) f() {"+strings.Repeat("\n", maxFuncLines)+"}"),
			},
			good: [][2]string{code("a/b.go", "func f() {"+strings.Repeat("\n", maxFuncLines-1)+"}")},
		},
		{
			name: "files", why: "a file holds one concern",
			check: func(s *source) []string {
				if n := strings.Count(s.text, "\n"); n > maxFileLines {
					return []string{s.at(s.file.End(), "%d lines, want at most %d", n, maxFileLines)}
				}
				return nil
			},
			bad:  [][2]string{code("a/b_test.go", strings.Repeat("\n", maxFileLines))},
			good: [][2]string{code("a/b_test.go", strings.Repeat("\n", maxFileLines-3))},
		},
		{
			name: "interfaces", why: "a capability more is a new optional interface, found by assertion",
			check: func(s *source) []string {
				return s.each(func(n ast.Node) int {
					if it, ok := n.(*ast.InterfaceType); ok {
						return it.Methods.NumFields() - maxMethods
					}
					return 0
				}, "methods", maxMethods)
			},
			bad: [][2]string{
				code("a/b.go", "type I interface { A(); B(); C(); D(); E() }"),
				code("a/b.go", "func f(x interface { error; B(); C(); D(); E() }) {}"),
			},
			good: [][2]string{code("a/b.go", "type I interface { A(); B(); C(); D() }")},
		},
		{
			name: "structs", why: "a struct is a noun and not a drawer",
			check: func(s *source) []string {
				return s.each(func(n ast.Node) int {
					if st, ok := n.(*ast.StructType); ok {
						return st.Fields.NumFields() - maxFields
					}
					return 0
				}, "fields", maxFields)
			},
			bad: [][2]string{
				code("a/b.go", "type S struct { a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p int }"),
				code("a/b.go", "type S struct { T; b, c, d, e, f, g, h, i, j, k, l, m, n, o, p int }"),
			},
			good: [][2]string{code("a/b.go", "type S struct { a, b, c, d, e, f, g, h, i, j, k, l, m, n, o int }")},
		},
	}
}

func longFunctions(s *source) []string {
	var found []string
	s.funcs(func(fn *ast.FuncDecl) {
		limit := maxFuncLines
		if _, ok := longFuncs[s.path+" "+funcName(fn)]; ok {
			limit = longFuncNoLimit
		}
		if n := s.lines(fn); n > limit {
			found = append(found, s.at(fn.Pos(), "%s has %d lines, want at most %d", funcName(fn), n, limit))
		}
	})
	return found
}

// each reports the nodes of a file that is no test for which excess is positive.
func (s *source) each(excess func(ast.Node) int, what string, limit int) []string {
	if isTest(s) {
		return nil
	}
	var found []string
	ast.Inspect(s.file, func(n ast.Node) bool {
		if e := excess(n); e > 0 {
			found = append(found, s.at(n.Pos(), "%d %s, want at most %d", limit+e, what, limit))
		}
		return true
	})
	return found
}
