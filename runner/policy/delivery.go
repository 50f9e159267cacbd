package policy

import (
	"fmt"
	"slices"
	"strings"
)

// Delivery says for the record how the lease reaches its user: "env PGUSER, file
// db.pass, brokered registry.example:443 GET /x".
func (l Lease) Delivery() string {
	var all []string
	for name := range l.Env {
		all = append(all, "env "+name)
	}
	for name := range l.Files {
		all = append(all, "file "+name)
	}
	for _, t := range l.Tools {
		all = append(all, "tool "+string(t))
	}
	slices.Sort(all)
	for _, b := range l.Broker {
		text := fmt.Sprintf("brokered %s:%d", b.Rule.Name, b.Rule.Port)
		for _, r := range b.Rule.Requests {
			text += " " + strings.Join(r.Methods, "|") + " " + r.Path
		}
		all = append(all, text)
	}
	if l.Uses > 0 {
		all = append(all, fmt.Sprintf("at most %d uses", l.Uses))
	}
	return strings.Join(all, ", ")
}
