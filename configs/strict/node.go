package strict

import (
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"

	"go.yaml.in/yaml/v4"
)

// A Node is a part of a file that was parsed. The zero Node is an absent part:
// it decodes as an empty mapping. Nodes never change.
type Node struct {
	file string
	y    *yaml.Node
}

// IsZero reports whether the part is absent.
func (n Node) IsZero() bool { return n.y == nil }

// IsMapping reports whether the part has keys, or is empty and so could have.
func (n Node) IsMapping() bool { return n.isNull() || n.y.Kind == yaml.MappingNode }

// Pos says where the part begins.
func (n Node) Pos() Pos {
	if n.y == nil {
		return Pos{File: n.file, Line: 1}
	}
	return Pos{n.file, n.y.Line, n.y.Column}
}

// Errorf returns an *Error at the node.
func (n Node) Errorf(format string, args ...any) error {
	return &Error{n.Pos(), fmt.Errorf(format, args...)}
}

// Text returns the text of a scalar as it stands in the file, "" for anything
// else. It is for errors and for values that need the spelling.
func (n Node) Text() string {
	if n.y == nil || n.y.Kind != yaml.ScalarNode {
		return ""
	}
	return n.y.Value
}

// Get returns the value of a key of a mapping, absent if there is no such key.
func (n Node) Get(key string) Node {
	for k, v := range n.pairs() {
		if k.y.Value == key {
			return v
		}
	}
	return Node{file: n.file}
}

// At returns the value of a key, or the mapping itself if there is no such
// key: a problem with what was not said has the place of its neighbours.
func (n Node) At(key string) Node {
	if v := n.Get(key); !v.IsZero() {
		return v
	}
	return n
}

// Without returns the mapping without a key, for a section in which one key
// is read by somebody else.
func (n Node) Without(key string) Node {
	if n.y == nil || n.y.Kind != yaml.MappingNode {
		return n
	}
	cut := *n.y
	cut.Content = nil
	for k, v := range n.pairs() {
		if k.y.Value != key {
			cut.Content = append(cut.Content, k.y, v.y)
		}
	}
	return n.with(&cut)
}

// Pairs returns the keys and values of a mapping in the order of the file.
func (n Node) Pairs() iter.Seq2[Node, Node] { return n.pairs() }

// Items returns the values of a sequence, and a scalar or mapping as its only
// item: "one or a list of them".
func (n Node) Items() []Node {
	switch {
	case n.isNull():
		return nil
	case n.y.Kind != yaml.SequenceNode:
		return []Node{n}
	}
	items := make([]Node, len(n.y.Content))
	for i, c := range n.y.Content {
		items[i] = n.with(c)
	}
	return items
}

// JSON returns the part as JSON with sorted keys, nil if it is absent. Text
// stays text, whole numbers stay exact.
func (n Node) JSON() (json.RawMessage, error) {
	if n.isNull() {
		return nil, nil
	}
	v, err := n.value()
	if err != nil {
		return nil, Join(err)
	}
	b, err := json.Marshal(v)
	if err != nil {
		return nil, &Error{n.Pos(), err}
	}
	return b, nil
}

func (n Node) value() (any, error) {
	var errs []error
	switch n.y.Kind {
	case yaml.MappingNode:
		m := map[string]any{}
		for k, c := range n.pairs() {
			v, err := c.value()
			m[k.y.Value] = v
			errs = append(errs, err)
		}
		return m, errors.Join(errs...)
	case yaml.SequenceNode:
		list := []any{}
		for _, c := range n.Items() {
			v, err := c.value()
			list = append(list, v)
			errs = append(errs, err)
		}
		return list, errors.Join(errs...)
	case yaml.ScalarNode:
		return n.scalar()
	}
	return nil, n.Errorf("not a value")
}

// scalar gives JSON the value of a scalar. Dates stay text: JSON has none, and
// what YAML makes of them surprises.
func (n Node) scalar() (any, error) {
	if n.y.Tag == "!!str" || n.y.Tag == "!!timestamp" {
		return n.y.Value, nil
	}
	if digits := strings.TrimPrefix(n.y.Value, "-"); n.y.Tag == "!!int" && digits != "0" && (digits[0] == '0' || strings.Trim(digits, "0123456789") != "") {
		return nil, n.Errorf("%s: write the number in decimal", n.y.Value) // 010 is 8 to some and 10 to others
	}
	var v any
	if err := n.y.Decode(&v); err != nil {
		return nil, n.Errorf("%q: %w", n.y.Value, cause(err))
	}
	if _, err := json.Marshal(v); err != nil {
		return nil, n.Errorf("%q has no JSON form", n.y.Value)
	}
	return v, nil
}

// cause returns the library's error without the line, which we know better.
func cause(err error) error {
	var e *yaml.UnmarshalError
	if errors.As(err, &e) {
		return e.Err
	}
	return err
}

func (n Node) with(y *yaml.Node) Node { return Node{n.file, y} }

func (n Node) isNull() bool {
	return n.y == nil || n.y.Kind == yaml.ScalarNode && n.y.Tag == "!!null"
}

func (n Node) pairs() iter.Seq2[Node, Node] {
	return func(yield func(Node, Node) bool) {
		if n.y == nil || n.y.Kind != yaml.MappingNode {
			return
		}
		for pair := range slices.Chunk(n.y.Content, 2) {
			if len(pair) < 2 || !yield(n.with(pair[0]), n.with(pair[1])) {
				return
			}
		}
	}
}

// kind names what the node is, for "want a list, got text".
func (n Node) kind() string {
	switch {
	case n.isNull():
		return "nothing"
	case n.y.Kind == yaml.MappingNode:
		return "a mapping"
	case n.y.Kind == yaml.SequenceNode:
		return "a list"
	}
	switch n.y.Tag {
	case "!!str":
		return "text"
	case "!!int", "!!float":
		return "the number " + n.y.Value
	case "!!bool":
		return "true or false"
	}
	return n.y.Tag
}
