// Package seal keeps what the journal must remember and nobody may read:
// the handles of leases. A [Key] lives in a file beside the journal that only
// the agent's user can read, so that a copy of the journal alone is worth
// nothing. AES-256-GCM with a random nonce, bound to the name it is for.
package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// ErrSealed reports bytes that this key did not seal for this name: the key
// file was replaced, or the record was edited.
var ErrSealed = errors.New("sealed with another key or for another name")

const keyBytes = 32

// A Key seals and opens. It cannot be printed: the cipher hides it.
type Key struct{ aead cipher.AEAD }

// Load reads the key file, or makes it if it is absent. It refuses a file that
// others can read.
func Load(path string) (*Key, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		raw, err = create(path)
	}
	if errors.Is(err, fs.ErrExist) { // somebody beside us was first
		raw, err = os.ReadFile(path)
	}
	if err != nil {
		return nil, fmt.Errorf("seal key: %w", err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("seal key: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("seal key %s: mode %v lets others read it: chmod 600, and rotate what it sealed", path, info.Mode().Perm())
	}
	if len(raw) != keyBytes {
		return nil, fmt.Errorf("seal key %s: %d bytes, want %d: restore it from a backup; without it leases are revoked by name only", path, len(raw), keyBytes)
	}
	block, err := aes.NewCipher(raw)
	if err != nil {
		return nil, fmt.Errorf("seal key: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, fmt.Errorf("seal key: %w", err)
	}
	clear(raw)
	return &Key{aead}, nil
}

// create writes a new key so that a crash leaves either no key or a whole one.
func create(path string) ([]byte, error) {
	raw := make([]byte, keyBytes)
	if _, err := rand.Read(raw); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".seal-*") // mode 0600
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.Remove(f.Name()) }()
	_, err = f.Write(raw)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return nil, err
	}
	return raw, os.Link(f.Name(), path)
}

// Seal encrypts b for name. Nil stays nil.
func (k *Key) Seal(name string, b []byte) []byte {
	if b == nil {
		return nil
	}
	return k.aead.Seal(nil, nil, b, []byte(name))
}

// Open decrypts what Seal made for the same name. It returns ErrSealed if it
// cannot.
func (k *Key) Open(name string, sealed []byte) ([]byte, error) {
	if sealed == nil {
		return nil, nil
	}
	b, err := k.aead.Open(nil, nil, sealed, []byte(name))
	if err != nil {
		return nil, fmt.Errorf("handle of %s: %w", name, ErrSealed)
	}
	if b == nil {
		b = []byte{}
	}
	return b, nil
}
