package runner_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"

	"github.com/mayfly-ci/mayfly/runner"
)

// TestRecordingsAreBounded: 256 recordings are left, the youngest, and nothing
// else is removed from beside them.
func TestRecordingsAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		a := w.keeping(2)
		stop := w.serve(a)
		name, _ := w.failing()
		dir := filepath.Join(w.dir, "state", "shells")
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		old := func(i int) string { return fmt.Sprintf("19990101T%06d.000000000Z-mf-old-aaaa.jsonl", i) }
		for i := range 300 {
			if err := os.WriteFile(filepath.Join(dir, old(i)), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.WriteFile(filepath.Join(dir, "note"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		var out seen
		if _, err := a.Shell(t.Context(), runner.Shell{Job: name, Args: []string{"x"}, Stdout: out.output, Stderr: out.output}); err != nil {
			t.Fatal(err)
		}
		files, err := filepath.Glob(filepath.Join(dir, "*.jsonl"))
		if err != nil || len(files) != 256 {
			t.Fatalf("got %d recordings, %v, want 256", len(files), err)
		}
		slices.Sort(files)
		if first := filepath.Base(files[0]); first != old(45) {
			t.Errorf("the oldest that is left is %s, want %s: the youngest stay", first, old(45))
		}
		if mine, err := filepath.Glob(filepath.Join(dir, "*-"+name+"-*.jsonl")); err != nil || len(mine) != 1 {
			t.Errorf("of this shell: got %q, %v, want one recording", mine, err)
		}
		if _, err := os.Stat(filepath.Join(dir, "note")); err != nil {
			t.Errorf("a file that is no recording: %v", err)
		}
		stop()
		w.clean()
	})
}
