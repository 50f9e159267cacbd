//go:build !failpoint

package journal

func (l *Log) write(_ string, b []byte, durable bool) error {
	if _, err := l.f.Write(b); err != nil || !durable {
		return err
	}
	return l.f.Sync()
}
