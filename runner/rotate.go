package runner

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner/internal/seal"
)

const sealFile = "seal.key"

// loadKey reads all sealing keys; to look is to make none.
func loadKey(path string, look bool) (*seal.Key, error) {
	return seal.LoadFrom(seal.Sources{File: path, Credentials: os.Getenv("CREDENTIALS_DIRECTORY"), Look: look})
}

// Keys is how many sealing keys there are, and whether the service manager gave
// the one that seals.
func (s *State) Keys() (n int, given bool) { return s.key.Count(), s.key.Given() }

// Rotate makes a new sealing key and seals the journal and the safes with it. A
// key that the service manager gives is the newest already, and no other is made.
// Those before open what they sealed, until Forget. It needs the state for itself.
func (s *State) Rotate() error {
	if s.lock == nil {
		return errPeeked
	}
	path := filepath.Join(s.Dir, sealFile)
	key, err := loadKey(path, false)
	if err == nil && !key.Given() {
		if err = seal.Rotate(path); err == nil {
			key, err = loadKey(path, false)
		}
	}
	if err != nil {
		return fmt.Errorf("state: %w", err)
	}
	*s.key = *key // the journal's too
	return s.reseal()
}

// reseal seals the journal and the safes with the newest key.
func (s *State) reseal() error {
	if err := s.journal.Reseal(); err != nil {
		return fmt.Errorf("state: %w", err)
	}
	safes, err := os.ReadDir(filepath.Join(s.Dir, "safe"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("state: %w", err)
	}
	for _, e := range safes {
		if strings.HasSuffix(e.Name(), unfinished) {
			continue // a crash left it
		}
		safe := s.Safe(e.Name())
		b, err := safe.Load()
		if err == nil {
			err = safe.Save(b)
		}
		clear(b)
		if err != nil {
			return err
		}
	}
	return nil
}

// Forget removes every sealing key but the one that seals. A rotation may have been
// killed in between, so the journal and the safes are sealed with that one first.
// What another sealed elsewhere, and was not sealed again, is lost.
func (s *State) Forget() error {
	if s.lock == nil {
		return errPeeked
	}
	if err := s.reseal(); err != nil {
		return err
	}
	path := filepath.Join(s.Dir, sealFile)
	if _, given := s.Keys(); given {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("state: %w", err)
		}
		return nil
	}
	return seal.Forget(path)
}

// Reseal opens a text that Seal made for name, and seals it with the newest key.
// One that is not sealed is returned as it is.
func (s *State) Reseal(name string, text creds.Secret) (string, bool, error) {
	in, err := s.Unseal(name, text)
	if err != nil || in.Since.IsZero() {
		return "", false, err
	}
	out, err := s.Seal(name, in.Secret, in.Since)
	return out, true, err
}
