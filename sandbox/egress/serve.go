package egress

import "net/http"

// Reserved is the domain of the names that the agent itself answers for. No rule
// opens a name in it, and no gateway asks a resolver about one. The domain above it
// is reserved for private use (ICANN, 29 July 2024).
const Reserved = "mayfly.internal"

// A Served is a name below Reserved that the agent answers for, inside of one box
// and for as long as what opened it is. Requests to it are judged and written down
// as others are, and nothing is dialled.
type Served struct {
	// Rule has the ID, the Name, which no other open Served of the box has, and the
	// Port. Its Protocol is HTTP: nothing leaves the box's own loopback. The rest is
	// empty.
	Rule Rule
	// Local is a port of 127.0.0.1 in the box that leads to it too, for programs that
	// take credentials from loopback alone; 0 is none. The box must be attached, and
	// nothing else may listen there (syscall.EADDRINUSE).
	Local uint16
	// Handler answers. The context of a request ends when the name is withdrawn.
	Handler http.Handler
}
