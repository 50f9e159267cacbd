package runner

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/mayfly-ci/mayfly/runner/internal/seal"
)

// A Safe holds a small secret that outlives the agent, sealed with the key of the
// state: a provider's registration, say.
type Safe struct {
	path, name string
	key        *seal.Key
	mine       bool // the state is held, not only read
}

// Safe returns the one of that name, a name of a configuration's section. It
// need not exist.
func (s *State) Safe(name string) *Safe {
	return &Safe{path: filepath.Join(s.Dir, "safe", name), name: "safe/" + name, key: s.key, mine: s.lock != nil}
}

// Load returns what was saved last, nil if nothing was.
func (s *Safe) Load() ([]byte, error) {
	sealed, err := os.ReadFile(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	b, err := s.key.Open(s.name, sealed)
	if err != nil {
		return nil, fmt.Errorf("state %s: %w: restore seal.key, or remove the file to begin afresh", s.path, err)
	}
	return b, nil
}

// Save replaces it. It is on disk when Save returns. A state that was opened
// for reading refuses.
func (s *Safe) Save(b []byte) error {
	if !s.mine {
		return errPeeked
	}
	dir := filepath.Dir(s.path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("state: %w", err)
	}
	err := replace(s.path, s.key.Seal(s.name, b))
	if err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
