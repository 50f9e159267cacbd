// Package mask replaces secrets in a stream of bytes by [Text].
//
// A [Set] holds the secrets of a job, each in the encodings in which tools
// print it; a [Writer] masks a stream with a Set. The result depends on the
// bytes of the stream alone and never on how they were cut into writes.
//
// What is masked is every byte that belongs to some occurrence of some needle
// (a secret in one of its encodings). Bytes next to each other that are masked
// become one [Text]; all other bytes pass unchanged. So overlapping and nested
// secrets need no order among them, and a value that is repeated without a gap
// does not tell how often.
//
// A mask stops accidents and not intent: whoever has a secret can print it
// reversed.
package mask

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"github.com/mayfly-ci/mayfly/creds"
)

// Text stands in the output where a secret stood. A value that itself contains
// asterisks can appear again where a Text meets the bytes beside it.
const Text = "***"

// MinLen is the least number of bytes that is masked, of a value and of a line
// of it, without the white space around it. Three bytes of base64 alphabet
// stand in four megabytes of arbitrary text sixteen times by chance, and a
// short word far more often: the log would be unreadable, and what is missing
// from it would tell the value.
const MinLen = 4

// ErrTooShort reports a value none of whose lines has [MinLen] bytes. It is not
// masked: the caller must not let it reach a log, or refuse it.
var ErrTooShort = errors.New("too short to be masked")

// A Set is an immutable set of secrets; any number of Writers may use it at
// once. It prints as [creds.Placeholder]. Make one with [New].
//
// It is compiled when it is first used. That costs time in proportion to all
// its secrets and most for those of many lines: 100 secrets with ten private
// keys among them take some tens of milliseconds.
type Set struct {
	values []creds.Secret
	// matcher compiles once. It is a function so that the needles, which are
	// plain strings, are out of reach for whatever prints structs.
	matcher func() *matcher
	short   error // why values are missing from the set, or nil
}

// New returns the set of values. Empty values are left out, and so are those
// that [Set.Err] then reports.
func New(values []creds.Secret) *Set {
	set, _ := new(Set).With(values...) // Err has the error
	return set
}

// With returns a set that has values too. s is unchanged; a Writer follows
// with [Writer.Use]. The error wraps [ErrTooShort] once for each value that
// cannot be masked and gives its position; the set has the other values even
// then.
func (s *Set) With(values ...creds.Secret) (*Set, error) {
	all := slices.Clone(s.values)
	var short error
	for i, v := range values {
		switch {
		case v.IsZero():
		case tooShort(v.Reveal()):
			short = errors.Join(short, fmt.Errorf("value %d of %d: under %d bytes: %w", i+1, len(values), MinLen, ErrTooShort))
		default:
			all = append(all, v)
		}
	}
	return &Set{
		values:  all,
		matcher: sync.OnceValue(func() *matcher { return compile(needlesOf(all)) }),
		short:   errors.Join(s.short, short),
	}, short
}

// Err returns what [Set.With] returned for all values of the set: it is nil if
// each of them is masked, and wraps [ErrTooShort] otherwise.
func (s *Set) Err() error { return s.short }

// Mask returns text with its secrets masked, for what does not go through a
// Writer: an error, a name, a whole file.
func (s *Set) Mask(text string) string {
	b := []byte(text)
	spans := merge(s.matcher().scan(b, nil))
	if len(spans) == 0 {
		return text
	}
	out, _ := render(nil, b, spans, false)
	return string(out)
}

// Format implements fmt.Formatter, for all verbs: the set is made of secrets.
func (Set) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, creds.Placeholder) }

// MarshalText implements encoding.TextMarshaler, which JSON and YAML honour.
func (Set) MarshalText() ([]byte, error) { return []byte(creds.Placeholder), nil }

// tooShort reports whether no line of v is long enough.
func tooShort(v string) bool {
	for line := range strings.Lines(v) {
		if len(strings.TrimSpace(line)) >= MinLen {
			return false
		}
	}
	return true
}
