package mask

import "github.com/mayfly-ci/mayfly/creds"

// Needles returns what is searched for, for the oracle of the tests.
func Needles(values []creds.Secret) []string { return needlesOf(New(values).values) }

// Held returns how many bytes w holds back.
func Held(w *Writer) int { return len(w.state().buf) }

// Room returns the bytes of memory that w's buffers take.
func Room(w *Writer) int {
	s := w.state()
	return cap(s.buf) + cap(s.out) + 16*cap(s.spans)
}
