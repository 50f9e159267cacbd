package main

import (
	"encoding/json"
	"io"
)

// print writes v as JSON, or text for people.
func (c *call) print(o *options, v any, text string) error {
	if o.output == "json" {
		e := json.NewEncoder(c.stdout)
		e.SetEscapeHTML(false)
		return e.Encode(v)
	}
	_, err := io.WriteString(c.stdout, text)
	return err
}
