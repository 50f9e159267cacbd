// Package strict reads YAML that must be understood to the last key: the
// agent's configuration and the policy file.
//
// It accepts less than YAML does, because these files are read by people who
// must be able to see what is allowed: one document, no anchors, aliases, merge
// keys or tags, no duplicate key, and text where text is wanted (5432 is not
// "5432"). Every problem is found in one pass, and each says file:line:column.
//
// The package knows nothing of Mayfly. The YAML itself is read by
// go.yaml.in/yaml/v4; its own strict mode names Go types in its errors and does
// not work on the sections of a file, so the tree is decoded here.
package strict

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
)

const (
	// MaxSize is the largest file that is read, in bytes: a policy of ten
	// thousand rules fits, and nothing that is bigger was written by hand.
	MaxSize = 1 << 20
	// maxDepth bounds the nesting, and so the recursion of every walk.
	maxDepth = 64
	// maxProblems bounds what one file reports.
	maxProblems = 100
)

// A Pos is a place in a file. Lines and columns count from 1.
type Pos struct {
	File   string
	Line   int
	Column int
}

// String returns file:line:column, without a column that is not known.
func (p Pos) String() string {
	if p.Column == 0 {
		return fmt.Sprintf("%s:%d", p.File, p.Line)
	}
	return fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Column)
}

// An Error is a problem at a place.
type Error struct {
	Pos Pos
	Err error
}

// Error returns "file:line:column: problem".
func (e *Error) Error() string { return e.Pos.String() + ": " + e.Err.Error() }

// Unwrap returns the problem without its place.
func (e *Error) Unwrap() error { return e.Err }

// Join joins problems in the order of their places, each once. It returns nil
// if there are none. Behind the hundredth it only counts.
func Join(errs ...error) error {
	all := flatten(nil, errs)
	slices.SortStableFunc(all, func(a, b error) int {
		p, q := place(a), place(b)
		return cmp.Or(cmp.Compare(p.Line, q.Line), cmp.Compare(p.Column, q.Column))
	})
	all = slices.CompactFunc(all, func(a, b error) bool { return a.Error() == b.Error() })
	if more := len(all) - maxProblems; more > 0 {
		all = append(all[:maxProblems], fmt.Errorf("and %d more problems", more))
	}
	return errors.Join(all...)
}

func flatten(all, errs []error) []error {
	for _, err := range errs {
		if err == nil {
			continue
		}
		if j, ok := err.(interface{ Unwrap() []error }); ok {
			all = flatten(all, j.Unwrap())
			continue
		}
		all = append(all, err)
	}
	return all
}

func place(err error) Pos {
	var e *Error
	if errors.As(err, &e) {
		return e.Pos
	}
	return Pos{}
}

// Parse reads one YAML document. file is its name in every position. An empty
// file is an error: whoever wants the defaults does not name a file.
func Parse(src []byte, file string) (Node, error) {
	at := func(line int, err error) error { return &Error{Pos{File: file, Line: line}, err} }
	if len(src) > MaxSize {
		return Node{}, at(1, fmt.Errorf("file is larger than %d bytes", MaxSize))
	}
	if !utf8.Valid(src) {
		return Node{}, at(1+bytes.Count(validPrefix(src), []byte("\n")), errors.New("text is not UTF-8"))
	}
	dec := yaml.NewDecoder(bytes.NewReader(src))
	doc, err := decodeOne(dec)
	switch {
	case errors.Is(err, io.EOF):
		return Node{}, at(1, errors.New("file is empty"))
	case err != nil:
		return Node{}, syntaxError(file, err)
	}
	root := Node{file: file, y: doc.Content[0]}
	if second, err := decodeOne(dec); err == nil {
		return Node{}, root.with(second).Errorf("second document: the file must hold one")
	} else if !errors.Is(err, io.EOF) {
		return Node{}, syntaxError(file, err)
	}
	if root.isNull() {
		return Node{}, root.Errorf("file is empty")
	}
	if err := Join(root.check(0, nil)...); err != nil {
		return Node{}, err
	}
	return root, nil
}

// decodeOne reads the next document. The library panics on states that it
// believes impossible; a file must not be able to end the agent that way.
func decodeOne(dec *yaml.Decoder) (doc *yaml.Node, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("yaml: %v", v)
		}
	}()
	doc = new(yaml.Node)
	if err := dec.Decode(doc); err != nil {
		return nil, err
	}
	if doc.Kind != yaml.DocumentNode || len(doc.Content) != 1 {
		return nil, errors.New("yaml: not a document")
	}
	return doc, nil
}

func syntaxError(file string, err error) error {
	var p *yaml.ParserError
	if errors.As(err, &p) {
		return &Error{Pos{file, max(p.Line, 1), p.Column}, errors.New(p.Message)}
	}
	return &Error{Pos{File: file, Line: 1}, errors.New(strings.TrimPrefix(err.Error(), "yaml: "))}
}

func validPrefix(b []byte) []byte {
	for i := 0; i < len(b); {
		r, n := utf8.DecodeRune(b[i:])
		if r == utf8.RuneError && n == 1 {
			return b[:i]
		}
		i += n
	}
	return b
}

// check refuses the parts of YAML that hide what a file says.
func (n Node) check(depth int, errs []error) []error {
	y := n.y
	switch {
	case depth > maxDepth:
		return append(errs, n.Errorf("nested deeper than %d levels", maxDepth))
	case y.Kind == yaml.AliasNode || y.Anchor != "":
		return append(errs, n.Errorf("anchors and aliases are not allowed: write the value out"))
	case y.Style&yaml.TaggedStyle != 0:
		return append(errs, n.Errorf("tags are not allowed: remove %s", y.Tag))
	}
	if y.Kind == yaml.MappingNode {
		errs = n.checkKeys(errs)
	}
	for _, c := range y.Content {
		errs = n.with(c).check(depth+1, errs)
	}
	return errs
}

func (n Node) checkKeys(errs []error) []error {
	first := map[string]int{}
	for k := range n.pairs() {
		key := k.y.Value
		switch line, seen := first[key]; {
		case k.y.Kind == yaml.ScalarNode && k.y.Tag == "!!merge":
			errs = append(errs, k.Errorf("merge keys are not allowed: write the values out"))
		case k.y.Kind != yaml.ScalarNode || k.y.Tag != "!!str":
			errs = append(errs, k.Errorf("key is not text: put it in quotes"))
		case seen:
			errs = append(errs, k.Errorf("key %q is already set in line %d", key, line))
		default:
			first[key] = k.y.Line
		}
	}
	return errs
}
