package gitea

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// BenchmarkLog is the agent's own part of a megabyte of log: rows, and their
// text for the server.
func BenchmarkLog(b *testing.B) {
	line := []byte(strings.Repeat("compile <a> & \"b\" ", 5) + "\n")
	b.SetBytes(int64(len(line)))
	l := newJobLog()
	for b.Loop() {
		if err := l.Write(time.Now(), 0, line); err != nil {
			b.Fatal(err)
		}
		if len(l.rows) == batchRows {
			if _, err := json.Marshal(l.batch(1)); err != nil {
				b.Fatal(err)
			}
			l.rows, l.size = nil, 0
		}
	}
}
