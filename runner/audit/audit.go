// Package audit is the record of what was done, for whom and under which
// policy: tamper-evident, append-only, readable without Mayfly.
//
// The contract is [Sink]; [File] is the implementation, a hash chain of JSON
// lines (file.go). The package imports the standard library only.
package audit

import (
	"context"
	"time"
)

// An Event is one line of the record. Nothing in it is ever a secret.
type Event struct {
	Time   time.Time         `json:"time"`
	Job    string            `json:"job,omitempty"` // the agent's name for the job
	Action string            `json:"action"`        // "lease.revoke"; docs/audit.md lists them
	Object string            `json:"object,omitempty"`
	Result string            `json:"result,omitempty"` // "ok", or the error
	Detail map[string]string `json:"detail,omitempty"`
}

// A Sink stores events in order.
type Sink interface {
	// Append stores e. If it fails, the action that e describes must not go
	// ahead. Durable events are on disk when it returns (docs/adr/0004 says
	// which they are); the others survive the death of the agent, though not
	// of the machine.
	Append(ctx context.Context, e Event) error
}
