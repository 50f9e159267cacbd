package creds

import (
	"fmt"
	"io"
)

// A Secret is a value that must not be printed. Every formatting verb and
// every encoder sees [Placeholder]; only [Secret.Reveal] returns the value,
// and a test in test/ lists who may call it.
//
// The value sits behind a pointer because fmt calls no methods on the
// unexported fields of other structs: there it would print the value itself.
// The zero Secret is empty.
type Secret struct{ v *string }

// Placeholder is what a Secret prints as.
const Placeholder = "[secret]"

// NewSecret returns v as a Secret.
func NewSecret(v string) Secret { return Secret{&v} }

// Reveal returns the value. Call it only where the value leaves for its user.
func (s Secret) Reveal() string {
	if s.v == nil {
		return ""
	}
	return *s.v
}

// IsZero reports whether the Secret is empty, without revealing it.
func (s Secret) IsZero() bool { return s.v == nil || *s.v == "" }

// Format implements fmt.Formatter: a Stringer alone would leak under %d or %x.
func (Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, Placeholder) }

// String implements fmt.Stringer.
func (Secret) String() string { return Placeholder }

// GoString implements fmt.GoStringer.
func (Secret) GoString() string { return Placeholder }

// MarshalText implements encoding.TextMarshaler, which JSON and YAML honour.
func (Secret) MarshalText() ([]byte, error) { return []byte(Placeholder), nil }

// A Handle is what an issuer needs to revoke and probe a lease: often the
// credential itself. Like a Secret it prints as [Placeholder]; the journal
// stores it sealed. Plain byte slices are assignable to it.
type Handle []byte

// Format implements fmt.Formatter, for all verbs.
func (Handle) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, Placeholder) }

// String implements fmt.Stringer.
func (Handle) String() string { return Placeholder }

// MarshalText implements encoding.TextMarshaler, which JSON and YAML honour.
func (Handle) MarshalText() ([]byte, error) { return []byte(Placeholder), nil }
