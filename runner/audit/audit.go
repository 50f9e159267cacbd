// Package audit is the record of what was done, for whom and under which
// policy: tamper-evident, append-only, readable without Mayfly.
//
// The contract is [Sink], held by the suite in audit/audittest; [File] is the
// implementation. The package imports the standard library only.
//
// # The record on disk
//
// A directory holds one file a month, 2026-11.jsonl, and in each of them lines
// of JSON. A line is an [Event] between the fields of a chain:
//
//	{"seq":7,"prev":"…","time":"…","job":"…","action":"…",…,"hash":"…"}
//
// seq counts from 1 without a gap, across files. prev is the hash of the line
// before, 64 zeros for the first. hash is the SHA-256, in hexadecimal, of the
// bytes of the line without its newline and without its last field, so that
// they end in "}" again. To check line 7 by hand:
//
//	sed -n 7p 2026-11.jsonl | sed 's/,"hash":"[0-9a-f]*"}$/}/' | tr -d '\n' | sha256sum
//	sed -n 7p 2026-11.jsonl | jq -r .hash     # the same
//	sed -n 8p 2026-11.jsonl | jq -r .prev     # the same
//
// Lines are in the order of seq, never of time: a clock may jump. The next
// month's file begins when the clock says so and never goes back; the last
// line before it is an event audit.continue that names the file.
//
// A line that the power or a kill cut short stays where it is. The next writer
// ends it with a newline and appends an event audit.repaired, with the number
// and the SHA-256 of the bytes between the last good line and itself. Behind an
// audit.continue that was cut short, the old month goes on.
//
// The chain has no key. Whoever can write the directory can write a new chain,
// and can cut the end off this one: that is seen only by somebody who knows
// how it ended. So [Verify] returns the [Head] and takes heads that were kept
// elsewhere.
package audit

import (
	"context"
	"strings"
	"time"
)

// Durable reports whether an event must be on disk, and not only handed to the
// kernel, when Append returns: those behind which there is no return. An event
// takes every earlier one with it, so that what led to it is on disk as well.
// docs/adr/0004 has the reasons.
func Durable(action string) bool {
	switch action {
	case "job.complete", "lease.unprovable", "release.stuck", "reap":
		return true
	}
	return strings.HasPrefix(action, "audit.")
}

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
	// ahead. [Durable] events are on disk when it returns; the others survive
	// the death of the agent, though not of the machine. If ctx is done before
	// e is written, nothing is written. It is safe for concurrent use.
	Append(ctx context.Context, e Event) error
}

type jobKey struct{}

// WithJob returns a context in which what is done is done for a job. It reaches,
// through contracts that know nothing of it, whoever writes down what the agent
// asks of others.
func WithJob(ctx context.Context, job string) context.Context {
	return context.WithValue(ctx, jobKey{}, job)
}

// JobOf is the job that something is done for, "" if it is for none.
func JobOf(ctx context.Context) string {
	job, _ := ctx.Value(jobKey{}).(string)
	return job
}
