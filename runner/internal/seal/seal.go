// Package seal keeps what the journal must remember and nobody may read:
// the handles of leases. A [Key] lives in a file beside the journal that only
// the agent's user can read, or is given by the service manager, so that a copy
// of the journal alone is worth nothing. AES-256-GCM with a random nonce, bound to the name it is for.
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
	"slices"
)

// ErrSealed reports bytes that this key did not seal for this name: the key
// file was replaced, or the record was edited.
var ErrSealed = errors.New("sealed with another key or for another name")

const keyBytes = 32

// keysMax is how many keys there may be: the one that seals, and those before it.
const keysMax = 16

// Credential is the name that a key has among the credentials of a service
// (systemd.exec(5), LoadCredential).
const Credential = "seal.key"

// A Key seals with the newest of its keys and opens with each. It cannot be
// printed: the ciphers hide it.
type Key struct {
	aeads []cipher.AEAD // the first seals
	given bool          // it is the service manager's
}

// Sources say where keys are. Those of the service manager come first.
type Sources struct {
	File        string // made if there is no key at all, unless Look
	Credentials string // directory of the service manager; "" is none
	Look        bool   // beside an agent: nothing is made
}

// Load reads the key file, or makes it if it is absent. It refuses a file that
// others can read.
func Load(path string) (*Key, error) { return LoadFrom(Sources{File: path}) }

// LoadFrom reads all keys that there are.
func LoadFrom(from Sources) (*Key, error) {
	k := &Key{}
	if from.Credentials != "" {
		path := filepath.Join(from.Credentials, Credential)
		raw, err := os.ReadFile(path)
		switch {
		case err == nil:
			k.given = true
			if err := k.add(path, raw); err != nil {
				return nil, err
			}
		case !errors.Is(err, fs.ErrNotExist):
			return nil, fmt.Errorf("seal key: %w", err)
		}
	}
	raw, err := os.ReadFile(from.File)
	if errors.Is(err, fs.ErrNotExist) && (k.given || from.Look) {
		return k, nil
	}
	if errors.Is(err, fs.ErrNotExist) {
		raw, err = create(from.File)
	}
	if errors.Is(err, fs.ErrExist) { // somebody beside us was first
		raw, err = os.ReadFile(from.File)
	}
	if err != nil {
		return nil, fmt.Errorf("seal key: %w", err)
	}
	info, err := os.Stat(from.File)
	if err != nil {
		return nil, fmt.Errorf("seal key: %w", err)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("seal key %s: mode %v lets others read it: chmod 600, and rotate what it sealed", from.File, info.Mode().Perm())
	}
	return k, k.add(from.File, raw)
}

// add takes the keys of a file, and wipes what was read.
func (k *Key) add(path string, raw []byte) error {
	defer clear(raw)
	if n := len(raw) / keyBytes; len(raw)%keyBytes != 0 || n < 1 || n > keysMax {
		return fmt.Errorf("seal key %s: %d bytes, want %d for each of at most %d keys: restore it from a backup; without it leases are revoked by name only", path, len(raw), keyBytes, keysMax)
	}
	for one := range slices.Chunk(raw, keyBytes) {
		block, err := aes.NewCipher(one)
		if err != nil {
			return fmt.Errorf("seal key: %w", err)
		}
		aead, err := cipher.NewGCMWithRandomNonce(block)
		if err != nil {
			return fmt.Errorf("seal key: %w", err)
		}
		k.aeads = append(k.aeads, aead)
	}
	return nil
}

// Count is how many keys there are. Without one nothing can be sealed.
func (k *Key) Count() int { return len(k.aeads) }

// Given reports that the service manager gave the key that seals.
func (k *Key) Given() bool { return k.given }

// Rotate puts a new key before those of the file. What they sealed they open
// still, until Forget.
func Rotate(path string) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("seal key: %w", err)
	}
	defer clear(raw)
	all := make([]byte, keyBytes, keyBytes+len(raw))
	defer func() { clear(all) }()
	if len(raw)/keyBytes >= keysMax {
		return fmt.Errorf("seal key %s: %d keys, and no more are kept: forget those before the newest first", path, keysMax)
	}
	if _, err := rand.Read(all); err != nil {
		return err
	}
	all = append(all, raw...)
	return replace(path, all)
}

// Forget leaves the newest key of the file alone.
func Forget(path string) error {
	raw, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("seal key: %w", err)
	}
	defer clear(raw)
	if len(raw) <= keyBytes {
		return nil
	}
	return replace(path, raw[:keyBytes])
}

// replace changes the file so that a crash leaves the old one or the new. The new
// one is on disk when it returns: others are sealed with it then, maybe on other
// disks.
func replace(path string, raw []byte) error {
	dir := filepath.Dir(path)
	f, err := write(dir, raw)
	if err != nil {
		return fmt.Errorf("seal key: %w", err)
	}
	if err := os.Rename(f, path); err != nil {
		return errors.Join(fmt.Errorf("seal key: %w", err), os.Remove(f))
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("seal key: %w", err)
	}
	return errors.Join(d.Sync(), d.Close())
}

// write makes a file of the directory with the content, on disk.
func write(dir string, raw []byte) (string, error) {
	f, err := os.CreateTemp(dir, ".seal-*") // mode 0600
	if err != nil {
		return "", err
	}
	_, err = f.Write(raw)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return "", errors.Join(err, os.Remove(f.Name()))
	}
	return f.Name(), nil
}

// create writes a new key so that a crash leaves either no key or a whole one.
func create(path string) ([]byte, error) {
	raw := make([]byte, keyBytes)
	if _, err := rand.Read(raw); err != nil {
		return nil, err
	}
	f, err := write(filepath.Dir(path), raw)
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.Remove(f) }()
	if err := os.Link(f, path); err != nil {
		return nil, err
	}
	return raw, syncDir(filepath.Dir(path))
}

// Seal encrypts b for name. Nil stays nil, and without a key (see Sources.Look)
// everything is nil.
func (k *Key) Seal(name string, b []byte) []byte {
	if b == nil || len(k.aeads) == 0 {
		return nil
	}
	return k.aeads[0].Seal(nil, nil, b, []byte(name))
}

// Open decrypts what Seal made for the same name. It returns ErrSealed if it
// cannot.
func (k *Key) Open(name string, sealed []byte) ([]byte, error) {
	if sealed == nil {
		return nil, nil
	}
	for _, aead := range k.aeads {
		b, err := aead.Open(nil, nil, sealed, []byte(name))
		if err != nil {
			continue
		}
		if b == nil {
			b = []byte{}
		}
		return b, nil
	}
	return nil, fmt.Errorf("handle of %s: %w", name, ErrSealed)
}
