package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// grace is how long an image stays that was just used: a job has pulled it and
// is about to make its box.
const grace = time.Hour

// list is List under the lock of the store.
func (s *Store) list() ([]Entry, error) {
	records, err := all[record](s.path("images"))
	if err != nil {
		return nil, err
	}
	names, err := all[binding](s.path("names"))
	if err != nil {
		return nil, err
	}
	used, err := s.cfg.InUse()
	if err != nil {
		return nil, fmt.Errorf("images: which are in use: %w", err)
	}
	var out []Entry
	for path, r := range records {
		st, err := os.Stat(path)
		if err != nil {
			return nil, fmt.Errorf("images: %w", err)
		}
		e := Entry{Digest: r.Digest, Bytes: r.Bytes, Layers: len(r.Layers), Used: st.ModTime(), InUse: slices.Contains(used, r.Digest)}
		for _, b := range names {
			if b.Digest == r.Digest {
				e.Names = append(e.Names, b.Name)
				e.Imported = e.Imported || b.Origin == fromImport
			}
		}
		slices.Sort(e.Names)
		out = append(out, e)
	}
	slices.SortFunc(out, func(a, b Entry) int { return b.Used.Compare(a.Used) })
	return out, nil
}

// Prune removes the images that were not used for KeepAge, and then those that
// were used least lately until the rest is no larger than KeepBytes. An image of
// a box stays, one that was used within the hour, and one that an operator
// imported, which no registry may have. Then it removes the layers that no image
// has. It returns the digests of what it removed.
func (s *Store) Prune(ctx context.Context) ([]string, error) {
	return s.prune(ctx, time.Now())
}

func (s *Store) prune(ctx context.Context, now time.Time) (gone []string, err error) {
	dir, done, err := s.work(ctx)
	if err != nil {
		return nil, err
	}
	// What goes is renamed under the lock, and removed, which takes longer,
	// without it.
	err = s.locked(ctx, unix.LOCK_EX, func() error {
		entries, err := s.list()
		if err != nil {
			return err
		}
		gone = s.victims(entries, now)
		if err := s.forget(gone); err != nil {
			return err
		}
		s.cfg.Trace("image.forgotten")
		return s.orphans(dir, now)
	})
	s.cfg.Trace("image.pruned")
	if err := errors.Join(err, done()); err != nil {
		return gone, fmt.Errorf("images: prune: %w", err)
	}
	return gone, nil
}

// Remove forgets what a name means. Prune removes the image, unless another name
// means it, or it is in use.
func (s *Store) Remove(ctx context.Context, name string) error {
	n, err := ParseName(name)
	if err != nil {
		return err
	}
	err = s.locked(ctx, unix.LOCK_EX, func() error { return os.Remove(s.bindingPath(n.String())) })
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("image %s is not here", n)
	}
	return err
}

// victims are the digests of the images to be removed. entries begin with the
// one that was used last.
func (s *Store) victims(entries []Entry, now time.Time) []string {
	stays := func(e Entry) bool { return e.InUse || e.Imported || now.Sub(e.Used) < grace }
	var sum int64
	for _, e := range entries {
		if stays(e) {
			sum += e.Bytes
		}
	}
	var out []string
	for _, e := range entries {
		switch {
		case stays(e):
		case now.Sub(e.Used) > s.cfg.KeepAge || sum+e.Bytes > s.cfg.KeepBytes:
			out = append(out, e.Digest)
		default:
			sum += e.Bytes
		}
	}
	return out
}

// forget removes the records of images, and the names that meant them.
func (s *Store) forget(digests []string) error {
	names, err := all[binding](s.path("names"))
	if err != nil {
		return err
	}
	var all error
	for path, b := range names {
		if slices.Contains(digests, b.Digest) {
			all = errors.Join(all, os.Remove(path))
		}
	}
	for _, d := range digests {
		all = errors.Join(all, os.Remove(s.recordPath(d)))
	}
	return all
}

// orphans moves the layers that no image has into dir. One that is younger than
// the grace may belong to an image that is being pulled.
func (s *Store) orphans(dir string, now time.Time) error {
	records, err := all[record](s.path("images"))
	if err != nil {
		return err
	}
	has := map[string]bool{}
	for _, r := range records {
		for _, l := range r.Layers {
			has[l] = true
		}
	}
	entries, err := os.ReadDir(s.path("layers"))
	if err != nil {
		return err
	}
	var all error
	for _, e := range entries {
		st, err := e.Info()
		if err != nil || has[e.Name()] || now.Sub(st.ModTime()) < grace {
			continue
		}
		all = errors.Join(all, os.Rename(s.path("layers", e.Name()), filepath.Join(dir, e.Name())))
	}
	return all
}
