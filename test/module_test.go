// Package test checks the module as a whole: who imports whom, how large things
// may get, what must be documented, what nobody may write. The rules are data,
// each with the reason for it, and each has a small source that breaks it, so
// that a rule that no longer sees anything fails too.
//
// Directories below test/ hold what no single package owns: programs, scripts,
// and tests of the whole.
package test

import (
	"fmt"
	"go/ast"
	"go/build/constraint"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

// root is the module's directory, seen from this one.
const root = ".."

// A source is one parsed Go file of the module.
type source struct {
	path string // from the root, with slashes
	text string
	fset *token.FileSet
	file *ast.File
}

func parse(name, text string) (*source, error) {
	s := &source{path: name, text: text, fset: token.NewFileSet()}
	var err error
	s.file, err = parser.ParseFile(s.fset, name, text, parser.ParseComments)
	return s, err
}

// sources are all files of the module, whatever their build tags.
var sources = sync.OnceValues(func() ([]*source, error) {
	var all []*source
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && p != root && (strings.HasPrefix(d.Name(), ".") || slices.Contains([]string{"testdata", "bin", "dist"}, d.Name())) {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(p, ".go") {
			return nil
		}
		text, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, p)
		if err != nil {
			return err
		}
		s, err := parse(filepath.ToSlash(rel), string(text))
		if err == nil && !ast.IsGenerated(s.file) {
			all = append(all, s)
		}
		return err
	})
	if err == nil && len(all) < 20 {
		err = fmt.Errorf("%d Go files below %s, want all of the module's", len(all), root)
	}
	return all, err
})

func dir(s *source) string { return path.Dir(s.path) }

// isTest tells tests and what only tests are built from: test files, the
// conformance suites (packages called …test), everything below test/, and files
// that are built with the failpoint tag only.
func isTest(s *source) bool {
	return strings.HasSuffix(s.path, "_test.go") || inTests(dir(s)) || onlyFailpoint(s.file)
}

// inTests tells packages that are never part of the binaries.
func inTests(pkg string) bool {
	return pkg == "test" || strings.HasPrefix(pkg, "test/") || strings.HasSuffix(pkg, "test")
}

// onlyFailpoint reports whether a build without the failpoint tag leaves f out.
func onlyFailpoint(f *ast.File) bool {
	for _, group := range f.Comments {
		for _, c := range group.List {
			x, err := constraint.Parse(c.Text)
			if err == nil && c.Pos() < f.Package && !x.Eval(func(tag string) bool { return tag != "failpoint" }) {
				return true
			}
		}
	}
	return false
}

// at is a finding: file:line, and what is wrong there.
func (s *source) at(pos token.Pos, format string, args ...any) string {
	return fmt.Sprintf("%s:%d: ", s.path, s.fset.Position(pos).Line) + fmt.Sprintf(format, args...)
}

// funcs calls f for every function and method of the file that has a body.
func (s *source) funcs(f func(fn *ast.FuncDecl)) {
	for _, d := range s.file.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok && fn.Body != nil {
			f(fn)
		}
	}
}

// funcName is "New", "(*Agent).Run" or "(Secret).Reveal".
func funcName(fn *ast.FuncDecl) string {
	if fn.Recv == nil {
		return fn.Name.Name
	}
	t := fn.Recv.List[0].Type
	star := ""
	if p, ok := t.(*ast.StarExpr); ok {
		t, star = p.X, "*"
	}
	return "(" + star + typeName(t) + ")." + fn.Name.Name
}

// typeName is the name of a receiver's type, without type parameters.
func typeName(t ast.Expr) string {
	switch t := t.(type) {
	case *ast.StarExpr:
		return typeName(t.X)
	case *ast.IndexExpr:
		return typeName(t.X)
	case *ast.IndexListExpr:
		return typeName(t.X)
	case *ast.Ident:
		return t.Name
	}
	return "?"
}

// callee is what a call names: "time.Sleep", "panic". Renamed imports are
// followed; a method is nothing.
func (s *source) callee(call *ast.CallExpr) string {
	switch f := call.Fun.(type) {
	case *ast.Ident:
		return f.Name
	case *ast.SelectorExpr:
		if x, ok := f.X.(*ast.Ident); ok && s.importPath(x.Name) != "" {
			return s.importPath(x.Name) + "." + f.Sel.Name
		}
	}
	return ""
}

// importPath is the path that an identifier of the file imports, or nothing.
func (s *source) importPath(name string) string {
	for _, imp := range s.file.Imports {
		p := strings.Trim(imp.Path.Value, `"`)
		if imp.Name != nil && imp.Name.Name == name || imp.Name == nil && path.Base(p) == name {
			return p
		}
	}
	return ""
}

// A rule holds for every file of the module by itself.
type rule struct {
	name  string
	why   string
	check func(*source) []string
	// bad are files, path and content, that the rule must report; good are
	// their neighbours that it must not.
	bad, good [][2]string
}

func (r rule) hold(t *testing.T) {
	t.Run(r.name, func(t *testing.T) {
		t.Parallel()
		for _, f := range r.bad {
			if got := r.examine(t, f); len(got) == 0 {
				t.Errorf("the rule sees nothing wrong with %s:\n%s", f[0], f[1])
			}
		}
		for _, f := range r.good {
			if got := r.examine(t, f); len(got) > 0 {
				t.Errorf("the rule objects to %s: %q\n%s", f[0], got, f[1])
			}
		}
		all, err := sources()
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range all {
			for _, finding := range r.check(s) {
				t.Errorf("%s\n\t%s", finding, r.why)
			}
		}
	})
}

func (r rule) examine(t *testing.T, f [2]string) []string {
	t.Helper()
	s, err := parse(f[0], f[1])
	if err != nil {
		t.Fatal(err)
	}
	return r.check(s)
}

// code is a file with the given body at package level.
func code(path, body string) [2]string { return [2]string{path, "package p\n\n" + body + "\n"} }
