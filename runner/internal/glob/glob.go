// Package glob matches the patterns of the expression hashFiles(): *, ? and
// [...] within a name, ** over any number of directories, and ! before a
// pattern that takes files out again. A pattern that names a directory means
// all that is below it.
//
// Source: @actions/glob in github.com/actions/toolkit, which the runner of
// GitHub hashes files with. What it finds is sorted here as it sorts.
package glob

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
)

// maxWork bounds the names that are compared for one Set: some seconds. The
// files come out of a box, which can make their paths as bad as it likes.
const maxWork = 1 << 26

// ErrTooMuch reports patterns and files that take too long to be compared.
var ErrTooMuch = errors.New("too many files for these patterns")

// A Set is patterns in their order, the last that matches a file decides. It is
// not safe for concurrent use.
type Set struct {
	patterns []pattern
	left     int
}

type pattern struct {
	exclude bool
	parts   []string // of the absolute path; "**" is any number of them
}

// Compile reads patterns below root, an absolute path. A pattern may have
// several lines, each of which is one; lines that begin with # are comments.
// One that is absolute or leads out of root is an error.
func Compile(root string, patterns []string) (*Set, error) {
	s := &Set{left: maxWork}
	for _, text := range patterns {
		for line := range strings.Lines(text) {
			line = strings.TrimSpace(line)
			if line == "" || line[0] == '#' {
				continue
			}
			p, err := compile(root, line)
			if err != nil {
				return nil, fmt.Errorf("pattern %q: %w", line, err)
			}
			s.patterns = append(s.patterns, p)
		}
	}
	return s, nil
}

func compile(root, text string) (pattern, error) {
	var p pattern
	for strings.HasPrefix(text, "!") {
		p.exclude = !p.exclude
		text = strings.TrimSpace(text[1:])
	}
	if !path.IsAbs(text) {
		text = root + "/" + text
	}
	text = path.Clean(text)
	if text != root && !strings.HasPrefix(text, root+"/") {
		return p, errors.New("it leads out of the workspace")
	}
	p.parts = strings.Split(strings.TrimPrefix(text, "/"), "/")
	for i, part := range p.parts {
		part = strings.ReplaceAll(part, "[!", "[^")
		if _, err := path.Match(part, ""); err != nil {
			return p, errors.New("a [ has no end")
		}
		p.parts[i] = part
	}
	return p, nil
}

// Roots are the directories and files below which everything that can match
// lies, none of them inside of another, in the order in which they are searched.
func (s *Set) Roots() []string {
	var roots []string
	for _, p := range s.patterns {
		if p.exclude {
			continue
		}
		n := slices.IndexFunc(p.parts, func(part string) bool { return strings.ContainsAny(part, `*?[\`) })
		if n < 0 {
			n = len(p.parts)
		}
		roots = append(roots, "/"+strings.Join(p.parts[:n], "/"))
	}
	var outer []string
	for i, r := range roots {
		inside := func(o string) bool { return strings.HasPrefix(r, o+"/") }
		if !slices.ContainsFunc(roots, inside) && !slices.Contains(roots[:i], r) {
			outer = append(outer, r)
		}
	}
	slices.Reverse(outer) // it takes the last one first
	return outer
}

// Select returns the files that match, sorted as they are found: root after
// root, directories in the order of their names.
func (s *Set) Select(files []string) ([]string, error) {
	var found []string
	for _, f := range files {
		is, err := s.matches(f)
		if err != nil {
			return nil, err
		}
		if is {
			found = append(found, f)
		}
	}
	roots := s.Roots()
	rank := func(f string) int {
		return slices.IndexFunc(roots, func(r string) bool { return f == r || strings.HasPrefix(f, r+"/") })
	}
	slices.SortFunc(found, func(a, b string) int {
		if d := rank(a) - rank(b); d != 0 {
			return d
		}
		return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/"))
	})
	return slices.Compact(found), nil
}

func (s *Set) matches(file string) (bool, error) {
	names := strings.Split(strings.TrimPrefix(file, "/"), "/")
	is := false
	for _, p := range s.patterns {
		if is == !p.exclude {
			continue // it would change nothing
		}
		if s.match(p.parts, names) {
			is = !p.exclude
		}
		if s.left < 0 {
			return false, ErrTooMuch
		}
	}
	return is, nil
}

// match says whether the parts match all names or a directory above them. It
// goes back to the last ** only, which is enough: an earlier one could take no
// other names that would help.
func (s *Set) match(parts, names []string) bool {
	p, n := 0, 0
	star, from := -1, 0
	for n < len(names) {
		s.left--
		switch {
		case s.left < 0:
			return false
		case p == len(parts):
			return true // what is below matches too
		case parts[p] == "**":
			star, from = p, n
			p++
			continue
		}
		if ok, err := path.Match(parts[p], names[n]); err == nil && ok {
			p, n = p+1, n+1
			continue
		}
		if star < 0 {
			return false
		}
		from++
		p, n = star+1, from
	}
	for p < len(parts) && parts[p] == "**" {
		p++
	}
	return p == len(parts)
}
