package configs

import (
	"path/filepath"

	"github.com/mayfly-ci/mayfly/configs/strict"
)

// A Section is the part of the file that one implementation understands. The
// zero Section is an empty one.
type Section struct {
	// Type names the implementation: the key "type", or else the name of the
	// section. It is "" for the gateway, of which there is one.
	Type string
	node strict.Node
}

// Decode stores the section in the struct that into points to, by the rules of
// strict.Node.Decode: only fields with a tag `yaml:"key"` are part of the file,
// and any other key is an error with its place. The key "type" is not passed on.
func (s Section) Decode(into any) error { return s.node.Without("type").Decode(into) }

// Errorf returns an error at the value of a key, or at the section if it has no
// such key: for owners that find a value wrong which was well written.
func (s Section) Errorf(key, format string, args ...any) error {
	return s.node.At(key).Errorf(format, args...)
}

// Path makes a path of the section relative to the file that it stands in.
func (s Section) Path(path string) string {
	return resolve(filepath.Dir(s.node.Pos().File), path)
}

// sectionNode reads the type of a section and keeps the rest.
type sectionNode struct {
	kind name
	node strict.Node
}

// DecodeNode implements strict.NodeDecoder.
func (s *sectionNode) DecodeNode(n strict.Node) error {
	s.node = n
	if !n.IsMapping() {
		return n.Errorf("want a mapping")
	}
	if kind := n.Get("type"); !kind.IsZero() {
		return kind.Decode(&s.kind)
	}
	return nil
}

func sections(nodes map[name]*sectionNode) map[string]Section {
	out := make(map[string]Section, len(nodes))
	for key, n := range nodes {
		s := Section{Type: string(key), node: n.node}
		if n.kind != "" {
			s.Type = string(n.kind)
		}
		out[string(key)] = s
	}
	return out
}
