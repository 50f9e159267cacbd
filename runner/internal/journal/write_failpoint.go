//go:build failpoint

package journal

import "github.com/mayfly-ci/mayfly/runner/internal/failpoint"

// write cuts each record in two, so that a crash between them leaves the torn
// line that a real crash would.
func (l *Log) write(at string, b []byte, durable bool) error {
	if at == "journal."+string(opLease) {
		_, err := l.f.Write(b)
		return err
	}
	half := len(b) / 2
	if _, err := l.f.Write(b[:half]); err != nil {
		return err
	}
	failpoint.Here(at + ".torn")
	if _, err := l.f.Write(b[half:]); err != nil || !durable {
		return err
	}
	failpoint.Here(at + ".written")
	return l.f.Sync()
}
