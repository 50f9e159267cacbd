// Package image keeps the images that boxes are made of: it reads them from a
// registry, an archive or a directory, checks that each byte is what its digest
// says, and unpacks each layer once, whole or not at all.
//
// Nothing that an image says is believed. A manifest, a configuration or a layer
// that is not what its digest says is refused, and so is a layer that names a
// file outside of it, writes through a link that leads out, holds a device, puts
// a link where a box has a mount, or is larger than the limits, which are counted
// while it is read. What is refused leaves nothing behind. Extended attributes
// other than "user." are dropped, capabilities of files among them; owners above
// 65534, which no box has, become nobody. Set-user-ID programs stay: a box mounts
// the layers without their effect.
//
// A layer is a directory named after the digest of what was packed in it (its
// diff id), as a layer of overlayfs: what it deletes is a character device 0/0,
// and what it replaces has the attribute user.overlay.opaque, which an overlay
// inside a user namespace reads (Documentation/filesystems/overlayfs.rst,
// "userxattr"). Each layer is unpacked alone. So a directory that a layer names
// only as part of a path has the usual mode, and a path through a link of
// another layer is a path through a directory that replaces it; builders that
// pack what they see write neither.
//
// Formats: https://github.com/opencontainers/image-spec (manifest, index, config,
// layer, image-layout) and the archive of "docker save".
package image

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// When says when a registry is asked.
type When string

// Times at which a registry is asked. An image that is named by digest and is
// here is never asked for.
const (
	Missing When = "missing" // for a name that was not resolved before
	Always  When = "always"  // what a tag means, for every job
	Never   When = "never"   // only what is here, or comes from an archive or directory
)

// A Config says where images lie and where they may come from. Dir is required.
// The zero value allows no registry.
type Config struct {
	Dir  string // of the store's own, absolute
	Pull When   // "" is Missing
	// From lists what may be pulled: registry/repository, as it is or with :tag or
	// @digest. * is any text without a slash, ** any text.
	From []string
	// Sources are names that come from an archive or a layout directory and never
	// from a registry.
	Sources    map[string]string
	DigestOnly bool // every image must be named by digest

	CAFile       string   // certificates of registries, beside the system's
	Insecure     []string // registries, host or host:port, that are spoken to in plain HTTP
	TokenServers []string // hosts beside a registry itself that may see what a job pulls with

	// Out makes a transport one that leaves this machine; nil dials directly. The
	// environment's proxy is never used.
	Out func(*http.Transport) http.RoundTripper

	MaxBytes int64 // of an image, unpacked; 0 is 8 GiB
	MaxFiles int64 // of an image; 0 is 500,000

	KeepBytes int64         // of all images, unpacked, that are not in use; 0 is 40 GiB
	KeepAge   time.Duration // since the last use; 0 is 30 days

	// InUse names the digests that boxes are made of: they are kept.
	InUse func() ([]string, error)
	// Trace is called between outside effects, for crash tests.
	Trace func(point string)
}

const (
	defaultBytes = 8 << 30
	defaultFiles = 500_000
	defaultKeep  = 40 << 30
	defaultAge   = 30 * 24 * time.Hour
	// MaxLayers bounds an image, as the engines do whose images there are: one
	// message carries that many mounts, and the options of an overlay name them.
	MaxLayers = 128
)

// A Store is a directory of images. It may be used by several goroutines, and
// the directory by several processes.
type Store struct {
	cfg     Config
	sources map[string]string // by canonical name
	busy    busy
}

// Open prepares the directory and removes what a process that died left half
// done in it.
func Open(cfg Config) (*Store, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	if !filepath.IsAbs(cfg.Dir) {
		return nil, fmt.Errorf("images: directory %q is not absolute", cfg.Dir)
	}
	cfg.complete()
	s := &Store{cfg: cfg, sources: map[string]string{}}
	for name, path := range cfg.Sources {
		if n, err := ParseName(name); err == nil {
			s.sources[n.String()] = path
		}
	}
	for _, d := range []string{"layers", "images", "names", "work"} {
		if err := os.MkdirAll(s.path(d), 0o700); err != nil {
			return nil, fmt.Errorf("images: %w", err)
		}
	}
	return s, s.sweep()
}

// Validate says what is wrong with a configuration, without its Dir. It reads
// CAFile, and looks at nothing else of the machine.
func (c *Config) Validate() error {
	switch c.Pull {
	case "", Missing, Always, Never:
	default:
		return fmt.Errorf("images: pull %q: write missing, always or never", c.Pull)
	}
	for name, path := range c.Sources {
		if _, err := ParseName(name); err != nil {
			return fmt.Errorf("images: source %q: %w", name, err)
		}
		if !filepath.IsAbs(path) {
			return fmt.Errorf("images: source %s: %q is not an absolute path", name, path)
		}
	}
	if c.MaxBytes < 0 || c.MaxFiles < 0 || c.KeepBytes < 0 || c.KeepAge < 0 {
		return errors.New("images: a limit is negative")
	}
	for _, p := range c.From {
		if err := checkPattern(p); err != nil {
			return err
		}
	}
	if c.CAFile != "" {
		if _, err := roots(c.CAFile); err != nil {
			return err
		}
	}
	return nil
}

// CheckName says whether a rule of the policy may name that image. Whether there
// is one is for Pull to find out.
func (c *Config) CheckName(name string) error {
	n, err := ParseName(name)
	if err == nil && c.DigestOnly && n.Digest == "" {
		err = refuse("image %s is named by tag, and images.digest_only wants @sha256:…", n)
	}
	return err
}

func (c *Config) complete() {
	if c.Pull == "" {
		c.Pull = Missing
	}
	orDefault(&c.MaxBytes, defaultBytes)
	orDefault(&c.MaxFiles, defaultFiles)
	orDefault(&c.KeepBytes, defaultKeep)
	orDefault(&c.KeepAge, defaultAge)
	if c.InUse == nil {
		c.InUse = func() ([]string, error) { return nil, nil }
	}
	if c.Trace == nil {
		c.Trace = func(string) {}
	}
}

func orDefault[T int64 | time.Duration](v *T, def T) {
	if *v == 0 {
		*v = def
	}
}

func (s *Store) path(parts ...string) string {
	return filepath.Join(append([]string{s.cfg.Dir}, parts...)...)
}

// work makes a directory of this process for something half done. The lock on it
// tells other processes that it is in use, until done removes it. The lock of the
// store keeps them from looking in between.
func (s *Store) work(ctx context.Context) (dir string, done func() error, err error) {
	var own *os.File
	err = s.locked(ctx, unix.LOCK_SH, func() error {
		if dir, err = os.MkdirTemp(s.path("work"), "w-"); err != nil {
			return fmt.Errorf("images: %w", err)
		}
		if own, err = os.Open(dir); err != nil {
			return fmt.Errorf("images: %w", err)
		}
		return unix.Flock(int(own.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	})
	if err != nil {
		return "", nil, err // what was made is swept by the next process
	}
	return dir, func() error { return errors.Join(os.RemoveAll(dir), own.Close()) }, nil
}

// sweep removes the work of processes that are gone.
func (s *Store) sweep() error {
	return s.locked(context.Background(), unix.LOCK_EX, func() error {
		entries, err := os.ReadDir(s.path("work"))
		if err != nil {
			return fmt.Errorf("images: %w", err)
		}
		var all error
		for _, e := range entries {
			dir := s.path("work", e.Name())
			f, err := os.Open(dir)
			if err != nil {
				continue // its process removed it
			}
			if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
				all = errors.Join(all, os.RemoveAll(dir))
			}
			all = errors.Join(all, f.Close())
		}
		if all != nil {
			return fmt.Errorf("images: half done: %w", all)
		}
		return nil
	})
}

// locked holds the lock of the store, shared or exclusive: what is looked up
// under a shared one is not removed meanwhile. Nobody holds it for long.
func (s *Store) locked(ctx context.Context, how int, do func() error) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	f, err := os.OpenFile(s.path("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("images: %w", err)
	}
	for err = unix.EINTR; errors.Is(err, unix.EINTR); {
		err = unix.Flock(int(f.Fd()), how)
	}
	if err == nil {
		err = do()
	}
	return errors.Join(err, f.Close())
}

// refuse is an error that wraps sandbox.ErrImage.
func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: %w", fmt.Errorf(format, args...), sandbox.ErrImage)
}
