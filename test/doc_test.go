package test

import (
	"go/ast"
	"go/token"
	"slices"
	"strings"
	"testing"
)

// TestDocumented holds the rule that every exported name says what it is for.
func TestDocumented(t *testing.T) {
	t.Parallel()
	rule{
		name: "exported names", why: "say what it promises, what breaks, units, errors",
		check: undocumented,
		bad: [][2]string{
			code("a/b.go", "func F() {}"),
			code("a/b.go", "// T is.\ntype T int\n\nfunc (*T) M() {}"),
			code("a/b.go", "type T int"),
			code("a/b.go", "var (\n\tA = 1\n)"),
			code("a/b.go", "const A, B = 1, 2"),
			code("a/b.go", "// I is.\ntype I interface{ M(); N() }"),
			code("a/b.go", "// I is.\ntype I interface {\n\t// M does.\n\tM()\n\tN()\n}"),
			code("a/b.go", "//go:noinline\nfunc F() {}"),
		},
		good: [][2]string{
			code("a/b.go", "// F does.\nfunc F() {}\n\nfunc f() {}\n\ntype t int\n\nfunc (t) M() {}"),
			code("a/b.go", "// Numbers.\nconst (\n\tA = 1\n\tB = 2\n)"),
			code("a/b.go", "const (\n\tA = 1 // one\n)"),
			code("a/b.go", "// I is.\ntype I interface {\n\tM() // does\n\tN() // does\n}\n\n// J does.\ntype J interface{ M() }"),
			code("a/b_test.go", "func F() {}"),
		},
	}.hold(t)
}

// TestPackageDocs: a package that nobody can introduce in a sentence is no
// package, and two introductions mean that nobody knows where to look.
func TestPackageDocs(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		files [][2]string
		want  string // part of the finding; "" is none
	}{
		{[][2]string{{"a/b.go", "package a\n"}, {"a/c.go", "package a\n"}}, "no package doc"},
		{[][2]string{{"a/b.go", "// Package a is.\npackage a\n"}, {"a/c.go", "// Package a does.\npackage a\n"}}, "2 package docs"},
		{[][2]string{{"a/b.go", "// A is.\npackage a\n"}}, "Package a"},
		{[][2]string{{"a/b.go", "//go:build linux\n\npackage a\n"}}, "no package doc"},
		{[][2]string{{"a/b.go", "// Package a is.\npackage a\n"}, {"a/c_test.go", "package a_test\n"}, {"a/d.go", "package a\n"}}, ""},
		{[][2]string{{"cmd/a/b.go", "// Command a does.\npackage main\n"}}, ""},
	} {
		var files []*source
		for _, f := range c.files {
			s, err := parse(f[0], f[1])
			if err != nil {
				t.Fatal(err)
			}
			files = append(files, s)
		}
		got := packageDocs(files)
		if (len(got) > 0) != (c.want != "") || !strings.Contains(strings.Join(got, "\n"), c.want) {
			t.Errorf("of %q the rule says %q, want %q", c.files, got, c.want)
		}
	}
	all, err := sources()
	if err != nil {
		t.Fatal(err)
	}
	for _, finding := range packageDocs(all) {
		t.Error(finding)
	}
}

// packageDocs reports the directories that do not have exactly one package doc.
func packageDocs(files []*source) []string {
	docs := map[string][]*source{}
	for _, s := range files {
		if _, ok := docs[dir(s)]; !ok {
			docs[dir(s)] = nil
		}
		if doc := s.file.Doc.Text(); doc != "" {
			docs[dir(s)] = append(docs[dir(s)], s)
		}
	}
	var found []string
	for d, in := range docs {
		switch len(in) {
		case 0:
			found = append(found, d+": no package doc")
		case 1:
			s, name := in[0], in[0].file.Name.Name
			if doc := s.file.Doc.Text(); name != "main" && !strings.HasPrefix(doc, "Package "+name+" ") {
				found = append(found, s.at(s.file.Doc.Pos(), "the package doc does not begin with %q", "Package "+name))
			}
		default:
			for _, s := range in {
				found = append(found, s.at(s.file.Doc.Pos(), "one of %d package docs, want one", len(in)))
			}
		}
	}
	slices.Sort(found)
	return found
}

// undocumented reports the exported names of a file that have no doc comment.
func undocumented(s *source) []string {
	if isTest(s) {
		return nil
	}
	var found []string
	missing := func(name *ast.Ident, docs ...*ast.CommentGroup) {
		for _, d := range docs {
			if d.Text() != "" {
				return
			}
		}
		if name.IsExported() {
			found = append(found, s.at(name.Pos(), "%s has no doc comment", name.Name))
		}
	}
	for _, d := range s.file.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			if d.Recv == nil || ast.IsExported(typeName(d.Recv.List[0].Type)) {
				missing(d.Name, d.Doc)
			}
		case *ast.GenDecl:
			if d.Tok != token.IMPORT {
				documentedSpecs(d, missing)
			}
		}
	}
	return found
}

// documentedSpecs hands every name of a declaration to missing. The comment of
// a group speaks for its constants and variables, not for its types.
func documentedSpecs(d *ast.GenDecl, missing func(*ast.Ident, ...*ast.CommentGroup)) {
	for _, spec := range d.Specs {
		switch spec := spec.(type) {
		case *ast.ValueSpec:
			for _, name := range spec.Names {
				missing(name, d.Doc, spec.Doc, spec.Comment)
			}
		case *ast.TypeSpec:
			if d.Lparen.IsValid() {
				missing(spec.Name, spec.Doc)
			} else {
				missing(spec.Name, d.Doc)
			}
			it, ok := spec.Type.(*ast.InterfaceType)
			if !ok || !spec.Name.IsExported() || it.Methods.NumFields() < 2 {
				continue // the doc of a type with one method speaks of that
			}
			for _, m := range it.Methods.List {
				for _, name := range m.Names {
					missing(name, m.Doc, m.Comment)
				}
			}
		}
	}
}
