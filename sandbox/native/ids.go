package native

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
)

// span is how many user ids a box has: all that its files may be owned by.
const span = 65536

// ids hands out disjoint ranges of user ids. A range is held by a link named
// after its slot that points to the name of the box: made at once with its
// content, so that a crash leaves nothing that has no owner.
type ids struct {
	dir   string
	first uint32
	slots int
}

// take holds a free range for the box.
func (d ids) take(name string) (first uint32, err error) {
	for slot := range d.slots {
		err := os.Symlink(name, d.path(slot))
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("user ids: %w", err)
		}
		return d.first + uint32(slot)*span, nil
	}
	return 0, fmt.Errorf("user ids: all %d ranges are in use: raise Slots or destroy boxes", d.slots)
}

// release frees what the box holds, if anything.
func (d ids) release(name string) error {
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return fmt.Errorf("user ids: %w", err)
	}
	var all error
	for _, e := range entries {
		p := filepath.Join(d.dir, e.Name())
		if to, err := os.Readlink(p); err != nil || to != name {
			continue // another's, or gone since
		}
		if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			all = errors.Join(all, fmt.Errorf("user ids: %w", err))
		}
	}
	return all
}

func (d ids) path(slot int) string { return filepath.Join(d.dir, strconv.Itoa(slot)) }
