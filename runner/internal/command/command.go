// Package command finds workflow commands in what a step prints, such as
//
//	::error file=app.js,line=1::Missing semicolon
//
// Sources: "Workflow commands for GitHub Actions" at docs.github.com, and where
// it is silent ActionCommand.cs in github.com/actions/runner. What such a
// command does is for others to say.
package command

import (
	"bytes"
	"strings"
)

// A Command is one line, with its escapes undone. Names of commands and of
// properties are in lower case: they are the same in any.
type Command struct {
	Name       string
	Properties map[string]string
	Message    string
}

// Parse reads a line without its end. It is no command if it does not begin,
// behind white space, with ::name:: or ::name properties::.
func Parse(line []byte) (Command, bool) {
	rest, ok := bytes.CutPrefix(bytes.TrimLeft(line, space), []byte(mark))
	if !ok {
		return Command{}, false
	}
	head, message, ok := strings.Cut(string(rest), mark)
	if !ok {
		return Command{}, false
	}
	name, properties, _ := strings.Cut(head, " ")
	if name == "" {
		return Command{}, false
	}
	c := Command{Name: strings.ToLower(name), Properties: map[string]string{}, Message: unescape(message, false)}
	for property := range strings.SplitSeq(properties, ",") {
		k, v, ok := strings.Cut(property, "=")
		if k = strings.ToLower(strings.TrimSpace(k)); ok && k != "" {
			c.Properties[k] = unescape(v, true)
		}
	}
	return c, true
}

// unescape knows two more escapes in a property, which ends at : and at a comma.
func unescape(s string, property bool) string {
	if !strings.Contains(s, "%") {
		return s
	}
	pairs := []string{"%0D", "\r", "%0A", "\n", "%25", "%"}
	if property {
		pairs = append(pairs, "%3A", ":", "%2C", ",")
	}
	return strings.NewReplacer(pairs...).Replace(s)
}
