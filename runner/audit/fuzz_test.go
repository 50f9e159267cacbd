package audit_test

import (
	"bytes"
	"errors"
	"path/filepath"
	"testing"

	"github.com/mayfly-ci/mayfly/runner/audit"
)

// Whatever is in the file: it is refused, or it is continued, and then nothing
// of it is gone and the new event is found.
func FuzzReopen(f *testing.F) {
	add := func(events ...audit.Event) {
		var head audit.Head
		var file []byte
		for _, e := range events {
			line := audit.Forge(head, e)
			head.Seq++
			head.Hash = string(line[len(line)-67 : len(line)-3])
			file = append(file, line...)
		}
		f.Add(file)
		f.Add(file[:len(file)-1])
		f.Add(file[:len(file)/2])
	}
	add(audit.Event{Time: at(1), Action: "a"})
	add(audit.Event{Time: at(1), Action: "a"}, audit.Event{Time: at(2), Action: "b", Detail: map[string]string{"k": "v"}})
	add(audit.Event{Time: at(1), Action: "a"}, audit.Event{Time: at(2), Action: "audit.continue", Object: "2026-12.jsonl"})
	add(audit.Event{Time: at(1), Action: "a"}, audit.Event{Time: at(2), Action: "audit.continue", Object: "../2026-12.jsonl"})
	add(audit.Event{Time: at(1), Action: "a"}, audit.Event{Time: at(2), Action: "audit.repaired"})
	f.Add([]byte("\n\n{}\n"))
	f.Fuzz(func(t *testing.T, before []byte) {
		dir := t.TempDir()
		write(t, dir, month, before)
		s, verr := audit.Verify(dir)
		if verr != nil && !errors.Is(verr, audit.ErrTampered) {
			t.Fatalf("Verify: %v", verr)
		}
		file, err := audit.OpenFile(dir, audit.FileOptions{})
		if err != nil {
			if verr == nil && s.Torn == 0 {
				t.Fatalf("OpenFile refuses what Verify likes: %v", err)
			}
			return
		}
		err = file.Append(t.Context(), audit.Event{Time: at(1), Action: "test.event", Object: "new"})
		if err := errors.Join(err, file.Close()); err != nil {
			t.Fatalf("Append: %v", err)
		}
		if !bytes.HasPrefix(content(t, dir, month), before) {
			t.Fatal("bytes of the file are gone")
		}
		events, err := read(dir)
		if err != nil {
			t.Fatalf("Read: %v", err)
		}
		if last := events[len(events)-1]; last.Object != "new" {
			t.Fatalf("last event: got %+v", last)
		}
		if names, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(names) > 3 {
			t.Fatalf("files: got %v, %v", names, err)
		}
	})
}
