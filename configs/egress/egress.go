// Package egress has the sets of egress rules that a policy may name: what a
// registry or a distribution needs to be read from, and no more.
package egress

import (
	"embed"
	"strings"
)

// files are the sets, by the name of the file.
//
//go:embed *.yaml
var files embed.FS

// Names are the sets that there are, in order.
func Names() []string {
	entries, err := files.ReadDir(".")
	if err != nil {
		return nil // there are files: they are embedded
	}
	var names []string
	for _, e := range entries {
		names = append(names, strings.TrimSuffix(e.Name(), ".yaml"))
	}
	return names
}

// Set is the text of a set, with the name of its file for positions. The text of
// one that is not there is empty, which is no set.
func Set(name string) (src []byte, file string) {
	file = name + ".yaml"
	src, err := files.ReadFile(file)
	if err != nil {
		return nil, file
	}
	return src, file
}
