package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A record is images/<digest>.json: an image whose layers are all here. When it
// was last used is the time of the file.
type record struct {
	Digest     string   `json:"digest"`
	Layers     []string `json:"layers"` // diff ids, hexadecimal, lowest first
	Bytes      int64    `json:"bytes"`  // unpacked
	Env        []string `json:"env,omitempty"`
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
	User       string   `json:"user,omitempty"`
	WorkingDir string   `json:"dir,omitempty"`
}

// An origin says who vouches for what a name means.
type origin string

const (
	fromRegistry origin = "registry" // then images.from must still allow it
	fromSource   origin = "source"   // then images.sources must still name it
	fromImport   origin = "import"   // an operator, by hand
)

// A binding is names/<hash of the name>.json: what a name meant when it was
// resolved last.
type binding struct {
	Name   string    `json:"name"`
	Digest string    `json:"digest"` // of the image for this machine
	Origin origin    `json:"origin"`
	At     time.Time `json:"at"`
}

func (s *Store) recordPath(digest string) string {
	return s.path("images", strings.TrimPrefix(digest, "sha256:")+".json")
}

func (s *Store) bindingPath(name string) string {
	sum := sha256.Sum256([]byte(name))
	return s.path("names", hex.EncodeToString(sum[:])+".json")
}

// use reads the record of an image and says that it is used now. An absent one
// is fs.ErrNotExist.
func (s *Store) use(digest string) (record, error) {
	if !isDigest(digest) {
		return record{}, refuse("%.100q names no image: a digest is wanted", digest)
	}
	r, err := load[record](s.recordPath(digest))
	if err != nil {
		return record{}, err
	}
	now := time.Now()
	return r, os.Chtimes(s.recordPath(digest), now, now)
}

// Layers are the directories of an image, by what Pull called Ref: the top one
// first, as overlayfs wants them. They stay while f runs; what must stay longer
// is named by Config.InUse before, or held open.
func (s *Store) Layers(ctx context.Context, ref string, f func(dirs []string) error) error {
	return s.locked(ctx, unix.LOCK_SH, func() error {
		r, err := s.use(ref)
		if errors.Is(err, fs.ErrNotExist) {
			return refuse("image %s is not here: pull it first", ref)
		}
		if err != nil {
			return fmt.Errorf("image %s: %w", ref, err)
		}
		var dirs []string
		for i := len(r.Layers) - 1; i >= 0; i-- {
			dirs = append(dirs, s.path("layers", r.Layers[i], "fs"))
		}
		return f(dirs)
	})
}

// save writes a file that appears whole. The directory is one of the store's.
func (s *Store) save(ctx context.Context, path string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("images: %w", err)
	}
	dir, done, err := s.work(ctx)
	if err != nil {
		return err
	}
	file := filepath.Join(dir, "new")
	err = os.WriteFile(file, b, 0o600)
	if err == nil {
		err = os.Rename(file, path)
	}
	if err := errors.Join(err, done()); err != nil {
		return fmt.Errorf("images: %w", err)
	}
	return nil
}

func load[T any](path string) (T, error) {
	var v T
	b, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(b, &v)
	}
	return v, err
}

// all reads every file of a directory of the store by what load reads. What was
// removed meanwhile is left out.
func all[T any](dir string) (map[string]T, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("images: %w", err)
	}
	out := map[string]T{}
	for _, e := range entries {
		p := filepath.Join(dir, e.Name())
		v, err := load[T](p)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("images: %s: %w", p, err)
		}
		out[p] = v
	}
	return out, nil
}

// An Entry is an image that is here.
type Entry struct {
	Digest string    `json:"digest"`
	Names  []string  `json:"names,omitempty"` // that meant it when they were resolved last
	Bytes  int64     `json:"bytes"`           // unpacked, layers that others have too included
	Layers int       `json:"layers"`
	Used   time.Time `json:"used"` // last
	InUse  bool      `json:"in_use"`
	// Imported says that an operator imported it: Prune keeps it.
	Imported bool `json:"imported,omitempty"`
}

// List says which images are here, the one that was used last first.
func (s *Store) List(ctx context.Context) ([]Entry, error) {
	var out []Entry
	err := s.locked(ctx, unix.LOCK_SH, func() (err error) {
		out, err = s.list()
		return err
	})
	return out, err
}
