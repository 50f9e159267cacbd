package test

import (
	"go/ast"
	"go/token"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// What nobody may write.

func TestCode(t *testing.T) {
	t.Parallel()
	for _, r := range slices.Concat(callRules(), stateRules(), wordRules()) {
		r.hold(t)
	}
}

// calls reports the calls of a file that forbidden says something about.
func calls(s *source, forbidden func(callee string) bool) []string {
	return callsOutside(s, "", forbidden)
}

// callsOutside is calls, but looks into no arguments of the function outside.
func callsOutside(s *source, outside string, forbidden func(callee string) bool) []string {
	var found []string
	ast.Inspect(s.file, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		callee := s.callee(call)
		if forbidden(callee) {
			found = append(found, s.at(call.Pos(), "call of %s", callee))
		}
		return callee == "" || callee != outside
	})
	return found
}

func callRules() []rule {
	return []rule{
		{
			name: "sleep", why: "a sleep is too short on a slow machine and too long on all others, and no context ends it: wait for what you wait for",
			check: func(s *source) []string {
				// In a bubble of synctest the clock is not that of the machine.
				return callsOutside(s, "testing/synctest.Test", func(callee string) bool { return callee == "time.Sleep" })
			},
			bad: [][2]string{
				code("a/b_test.go", "import \"time\"\n\nfunc f() { time.Sleep(1) }"),
				code("a/b.go", "import clock \"time\"\n\nfunc f() { clock.Sleep(1) }"),
			},
			good: [][2]string{
				code("a/b_test.go", "import \"time\"\n\nfunc f() { time.After(1) }"),
				code("a/b_test.go", "import (\n\t\"testing/synctest\"\n\t\"time\"\n)\n\nfunc f() { synctest.Test(t, func() { time.Sleep(1) }) }"),
			},
		},
		{
			name: "print", why: "only a program talks to its terminal; packages return errors",
			check: func(s *source) []string {
				if strings.HasPrefix(s.path, "cmd/") || inTests(dir(s)) || onlyFailpoint(s.file) {
					return nil
				}
				return calls(s, func(callee string) bool {
					return strings.HasPrefix(callee, "fmt.Print") || callee == "print" || callee == "println" || strings.HasPrefix(callee, "log.") && callee != "log.New"
				})
			},
			bad: [][2]string{
				code("a/b.go", "import \"fmt\"\n\nfunc f() { fmt.Println() }"),
				code("a/b_test.go", "func f() { println() }"),
				code("a/b.go", "import \"log\"\n\nfunc f() { log.Fatal() }"),
			},
			good: [][2]string{
				code("cmd/a/b.go", "import \"fmt\"\n\nfunc f() { fmt.Println() }"),
				code("a/b.go", "import \"fmt\"\n\nfunc f() { fmt.Fprintln(nil) }"),
			},
		},
		{
			name: "panic", why: "an error has a reader, a panic has none: it ends every job of the agent",
			check: func(s *source) []string {
				if isTest(s) {
					return nil
				}
				return calls(s, func(callee string) bool { return callee == "panic" })
			},
			bad: [][2]string{code("a/b.go", "func f() { panic(1) }")},
			good: [][2]string{
				code("a/b_test.go", "func f() { panic(1) }"),
				{"a/b.go", "//go:build failpoint\n\npackage p\n\nfunc f() { panic(1) }\n"},
			},
		},
	}
}

// immutable are the functions whose results nobody changes, so that a variable
// of the package may hold them.
var immutable = []string{
	"errors.New", "fmt.Errorf", "regexp.MustCompile", "strings.NewReplacer",
	"net/netip.MustParseAddr", "net/netip.MustParsePrefix", "net/netip.MustParseAddrPort",
}

// linked are the variables that the linker sets: file and name.
var linked = []string{"cmd/mayfly/main.go version"}

func stateRules() []rule {
	return []rule{
		{
			name: "globals", why: "what a package remembers belongs to something that New returned",
			check: globals,
			bad: [][2]string{
				code("a/b.go", "var n int"),
				code("a/b.go", "var m = map[string]bool{}"),
				code("a/b.go", "import \"errors\"\n\nvar (\n\terr = errors.New(\"\")\n\tt = time.Now()\n)"),
				code("a/b.go", "var version = \"none\""),
			},
			good: [][2]string{
				code("a/b.go", "import (\n\t\"errors\"\n\t\"net/netip\"\n)\n\nvar a, b = netip.MustParseAddr(\"\"), errors.New(\"\")"),
				code("a/b.go", "var _ I = (*T)(nil)"),
				code("a/b.go", "//go:embed x\nvar x string"),
				code("a/b.go", "var (\n\t//go:embed x\n\tx string\n)"),
				code("a/b.go", "func f() { var n int; n++ }"),
				code("a/b_test.go", "var n int"),
				code("cmd/mayfly/main.go", "var version = \"none\""),
			},
		},
		{
			name: "init", why: "code that nobody calls cannot be ordered, configured or tested",
			check: func(s *source) []string {
				var found []string
				s.funcs(func(fn *ast.FuncDecl) {
					if fn.Recv == nil && fn.Name.Name == "init" {
						found = append(found, s.at(fn.Pos(), "init function"))
					}
				})
				return found
			},
			bad:  [][2]string{code("a/b.go", "func init() {}"), code("a/b_test.go", "func init() {}")},
			good: [][2]string{code("a/b.go", "func (t) init() {}")},
		},
		{
			name: "contexts", why: "a context is an argument, the first: one that is stored outlives its meaning",
			check: contexts,
			bad: [][2]string{
				code("a/b.go", "import \"context\"\n\ntype t struct { ctx context.Context }"),
				code("a/b.go", "import \"context\"\n\ntype t struct { context.Context }"),
				code("a/b.go", "import \"context\"\n\nfunc f(n int, ctx context.Context) {}"),
				code("a/b.go", "import \"context\"\n\ntype i interface { f(int, context.Context) }"),
			},
			good: [][2]string{
				code("a/b.go", "import \"context\"\n\nfunc f(drain, kill context.Context, n int) {}"),
				code("a/b.go", "import \"context\"\n\ntype t struct { f func(context.Context) }"),
				code("a/b_test.go", "import \"context\"\n\ntype t struct { ctx context.Context }"),
			},
		},
	}
}

// globals reports variables of a package that somebody could change.
func globals(s *source) []string {
	if isTest(s) {
		return nil
	}
	var found []string
	for _, d := range s.file.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.VAR || embeds(g.Doc) {
			continue
		}
		for _, spec := range g.Specs {
			v := spec.(*ast.ValueSpec)
			for i, name := range v.Names {
				if name.Name == "_" || embeds(v.Doc) || slices.Contains(linked, s.path+" "+name.Name) {
					continue
				}
				if i < len(v.Values) && s.isImmutable(v.Values[i]) {
					continue
				}
				found = append(found, s.at(name.Pos(), "variable %s of the package", name.Name))
			}
		}
	}
	return found
}

func (s *source) isImmutable(x ast.Expr) bool {
	call, ok := x.(*ast.CallExpr)
	return ok && slices.Contains(immutable, s.callee(call))
}

func embeds(doc *ast.CommentGroup) bool {
	return doc != nil && slices.ContainsFunc(doc.List, func(c *ast.Comment) bool { return strings.HasPrefix(c.Text, "//go:embed ") })
}

// contexts reports contexts in structs, and those that are not among the first
// arguments.
func contexts(s *source) []string {
	if isTest(s) {
		return nil
	}
	is := func(t ast.Expr) bool {
		sel, ok := t.(*ast.SelectorExpr)
		if !ok || sel.Sel.Name != "Context" {
			return false
		}
		x, ok := sel.X.(*ast.Ident)
		return ok && s.importPath(x.Name) == "context"
	}
	var found []string
	ast.Inspect(s.file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.StructType:
			for _, f := range n.Fields.List {
				if is(f.Type) {
					found = append(found, s.at(f.Pos(), "a struct holds a context"))
				}
			}
		case *ast.FuncType:
			for i, p := range n.Params.List {
				if is(p.Type) && i > 0 && !is(n.Params.List[i-1].Type) {
					found = append(found, s.at(p.Pos(), "the context is not the first argument"))
				}
			}
		}
		return true
	})
	return found
}

var (
	unfinished = regexp.MustCompile(`\b(TODO|FIXME|XXX|HACK)\b|nolint`)
	vague      = regexp.MustCompile(`(?i)manager|helper|util|executor`)
	redundant  = regexp.MustCompile(`(?i)failed to|unable to`)
)

func wordRules() []rule {
	return []rule{
		{
			name: "comments", why: "what is not done is an issue; a linter that is wrong is told so with lint:ignore and the reason",
			check: func(s *source) []string {
				var found []string
				for _, group := range s.file.Comments {
					for _, c := range group.List {
						if word := unfinished.FindString(c.Text); word != "" {
							found = append(found, s.at(c.Pos(), "comment with %s", word))
						}
					}
				}
				return found
			},
			bad: [][2]string{
				code("a/b.go", "// TODO: more\nvar x = 1"), code("a/b_test.go", "var x = 1 /* FIXME */"),
				code("a/b.go", "var x = 1 //nolint:all // why"),
			},
			good: [][2]string{code("a/b.go", "// ToDo lists of mktemp.XXXXXX\nvar x = \"TODO\"")},
		},
		{
			name: "names", why: "say what it does: everything helps, manages and executes",
			check: vagueNames,
			bad: [][2]string{
				{"a/b.go", "package netutil\n"},
				code("a/b.go", "type boxManager struct{}"),
				code("a/b.go", "func helper() {}"),
			},
			good: [][2]string{code("a/b_test.go", "func f(t *testing.T) { t.Helper() }")},
		},
		{
			name: "error texts", why: "an error is a noun and its cause; that something failed is known",
			check: func(s *source) []string {
				var found []string
				ast.Inspect(s.file, func(n ast.Node) bool {
					call, ok := n.(*ast.CallExpr)
					if !ok || len(call.Args) == 0 || !slices.Contains([]string{"errors.New", "fmt.Errorf"}, s.callee(call)) {
						return true
					}
					text, ok := call.Args[0].(*ast.BasicLit)
					if ok && redundant.MatchString(text.Value) {
						found = append(found, s.at(text.Pos(), "error text %s", text.Value))
					}
					return true
				})
				return found
			},
			bad: [][2]string{
				code("a/b.go", "import \"fmt\"\n\nfunc f() error { return fmt.Errorf(\"failed to open: %w\", e) }"),
				code("a/b.go", "import \"errors\"\n\nvar e = errors.New(\"Unable to find\")"),
			},
			good: [][2]string{code("a/b.go", "import \"errors\"\n\nvar e, g = errors.New(\"offer is gone\"), errors.New(\"GITHUB_ENV: bad\")")},
		},
	}
}

// vagueNames reports packages, types and functions named after nothing.
func vagueNames(s *source) []string {
	var found []string
	say := func(id *ast.Ident) {
		if word := vague.FindString(id.Name); word != "" {
			found = append(found, s.at(id.Pos(), "%s is named %q", id.Name, word))
		}
	}
	say(s.file.Name)
	for _, d := range s.file.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			say(d.Name)
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				if t, ok := spec.(*ast.TypeSpec); ok {
					say(t.Name)
				}
			}
		}
	}
	return found
}
