package runner

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/mayfly-ci/mayfly/runner/internal/seal"
)

// What is kept outlives the agent, cannot be read from the disk, is bound to its
// name, and is not written by who only reads.
func TestSafe(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, err := OpenState(dir)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := s.Safe("a").Load(); b != nil || err != nil {
		t.Errorf("Load before anything was saved = %q, %v; want nothing", b, err)
	}
	for _, want := range []string{"the first secret", "the second secret"} {
		if err := s.Safe("a").Save([]byte(want)); err != nil {
			t.Fatal(err)
		}
		if b, err := s.Safe("a").Load(); string(b) != want || err != nil {
			t.Errorf("Load = %q, %v; want %q", b, err, want)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	peeked, err := PeekState(dir)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := peeked.Safe("a").Load(); string(b) != "the second secret" || err != nil {
		t.Errorf("Load in another life = %q, %v", b, err)
	}
	if err := peeked.Safe("a").Save(nil); !errors.Is(err, errPeeked) {
		t.Errorf("Save without the lock = %v, want errPeeked", err)
	}
	file := filepath.Join(dir, "safe", "a")
	raw, err := os.ReadFile(file)
	info, serr := os.Stat(file)
	if err := errors.Join(err, serr); err != nil || bytes.Contains(raw, []byte("secret")) || info.Mode().Perm() != 0o600 {
		t.Errorf("on disk: %q, %v, %v; want it sealed and closed to others", raw, info, err)
	}
	if err := os.Rename(file, filepath.Join(dir, "safe", "b")); err != nil {
		t.Fatal(err)
	}
	if _, err := peeked.Safe("b").Load(); !errors.Is(err, seal.ErrSealed) {
		t.Errorf("under another name: Load = %v, want ErrSealed", err)
	}
}
