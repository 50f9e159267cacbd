package glob

import (
	"errors"
	"slices"
	"strings"
	"testing"
)

func tree() []string {
	var files []string
	for _, f := range strings.Fields("go.sum a/go.sum a/b/go.sum a/b.txt b/x.lock b/[x] .hidden/go.sum src/main.go src/deep/er/x.go a.b/c a/z") {
		files = append(files, "/w/"+f)
	}
	return files
}

func TestSelect(t *testing.T) {
	t.Parallel()
	for patterns, want := range map[string]string{
		"go.sum":                        "go.sum",
		"**/go.sum":                     ".hidden/go.sum a/b/go.sum a/go.sum go.sum",
		"a/**/go.sum":                   "a/b/go.sum a/go.sum",
		"*/go.sum":                      ".hidden/go.sum a/go.sum",
		"src":                           "src/deep/er/x.go src/main.go",
		"src/**":                        "src/deep/er/x.go src/main.go",
		"src/*.go":                      "src/main.go",
		"**/*.go|!src/deep":             "src/main.go",
		"!src|src/main.go":              "src/main.go",
		"**|!**/go.sum|!a|!b|!a.b|!src": "",
		"**/go.sum|!a/**|a/go.sum":      ".hidden/go.sum a/go.sum go.sum",
		"b/[[]x]":                       "b/[x]",
		"b/?.lock":                      "b/x.lock",
		"[!abg.]*/main.go":              "src/main.go",
		"# all|go.sum":                  "go.sum",
		"go.sum\n  a/z  \n":             "a/z go.sum",
		"b/x.lock|go.sum":               "go.sum b/x.lock",
		"/w/go.sum":                     "go.sum",
		"a":                             "a/b/go.sum a/b.txt a/go.sum a/z",
		"nothing":                       "",
		"":                              "",
		"**/a/**/b/**/go.sum":           "a/b/go.sum",
		"**/**/z/**":                    "a/z",
		".":                             ".hidden/go.sum a/b/go.sum a/b.txt a/go.sum a/z a.b/c b/[x] b/x.lock go.sum src/deep/er/x.go src/main.go",
	} {
		s, err := Compile("/w", strings.Split(patterns, "|"))
		if err != nil {
			t.Errorf("%q: %v", patterns, err)
			continue
		}
		got, err := s.Select(tree())
		for i := range got {
			got[i] = strings.TrimPrefix(got[i], "/w/")
		}
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%q: got %q, %v; want %q", patterns, got, err, want)
		}
	}
}

func TestRoots(t *testing.T) {
	t.Parallel()
	for patterns, want := range map[string]string{
		"**/x": "/w", "a/b/c": "/w/a/b/c", "a/*/c|b": "/w/b /w/a", "a|a/b|ab": "/w/ab /w/a", "!a|b|b": "/w/b", "!a": "",
	} {
		s, err := Compile("/w", strings.Split(patterns, "|"))
		if got := s.Roots(); err != nil || !slices.Equal(got, strings.Fields(want)) {
			t.Errorf("%q: roots %q, %v; want %q", patterns, got, err, want)
		}
	}
}

func TestCompileRefuses(t *testing.T) {
	t.Parallel()
	for _, p := range []string{"../x", "/etc/passwd", "a/../../x", "[a", "/wx", "!/"} {
		if s, err := Compile("/w", []string{p}); err == nil {
			t.Errorf("%q: got %v, want an error", p, s.patterns)
		}
	}
}

// A box can choose the paths, and a workflow the patterns.
func TestWorkIsBounded(t *testing.T) {
	t.Parallel()
	s, err := Compile("/w", []string{"**/" + strings.Repeat("a/", 500) + "b"})
	if err != nil {
		t.Fatal(err)
	}
	files := make([]string, 5000)
	for i := range files {
		files[i] = "/w" + strings.Repeat("/a", 1000)
	}
	if _, err := s.Select(files); !errors.Is(err, ErrTooMuch) {
		t.Errorf("got %v, want ErrTooMuch", err)
	}
}

func FuzzSelect(f *testing.F) {
	f.Add("**/a*b?[c]", "/w/x/axbyc")
	f.Add("!a/**", "/w/a/b")
	f.Fuzz(func(t *testing.T, pattern, file string) {
		s, err := Compile("/w", []string{pattern})
		if err != nil {
			return
		}
		for _, r := range s.Roots() {
			if r != "/w" && !strings.HasPrefix(r, "/w/") {
				t.Errorf("%q is searched in %q, outside of the root", pattern, r)
			}
		}
		if got, err := s.Select([]string{file}); err == nil && len(got) > 1 {
			t.Errorf("%q, %q: got %q", pattern, file, got)
		}
	})
}
