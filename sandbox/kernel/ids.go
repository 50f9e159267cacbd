package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// Span is how many user ids a box has: all that its files may be owned by.
const Span = 65536

// IDs hands out disjoint ranges of user ids. A range is held by a link named
// after its slot that points to the name of the box: made at once with its
// content, so that a crash leaves nothing that has no owner.
type IDs struct {
	Dir   string // where the links are
	First uint32 // the first id of the first range
	Slots int    // how many ranges there are
}

// Take holds a free range for the box.
func (d IDs) Take(name string) (first uint32, err error) {
	for slot := range d.Slots {
		err := os.Symlink(name, d.path(slot))
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("user ids: %w", err)
		}
		return d.First + uint32(slot)*Span, nil
	}
	return 0, fmt.Errorf("user ids: all %d ranges are in use: raise Slots or destroy boxes", d.Slots)
}

// Release frees what the box holds, if anything.
func (d IDs) Release(name string) error {
	entries, err := os.ReadDir(d.Dir)
	if err != nil {
		return fmt.Errorf("user ids: %w", err)
	}
	var all error
	for _, e := range entries {
		p := filepath.Join(d.Dir, e.Name())
		if to, err := os.Readlink(p); err != nil || to != name {
			continue // another's, or gone since
		}
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			all = errors.Join(all, fmt.Errorf("user ids: %w", err))
		}
	}
	return all
}

func (d IDs) path(slot int) string { return filepath.Join(d.Dir, strconv.Itoa(slot)) }

// IDMap makes files of a detached mount belong to the ids of a user namespace.
// Without it root in the box owns none of the files below it, and an overlay
// lets it neither append nor delete.
func IDMap(fd int, attributes uint64, ns *os.File) error {
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP | attributes, Userns_fd: uint64(ns.Fd())}
	err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		return fmt.Errorf("id-mapped mount (Linux 5.19 and a file system that has them): %w: %w", err, sandbox.ErrUnsupported)
	}
	if err != nil {
		return fmt.Errorf("id-mapped mount: %w", err)
	}
	return nil
}
