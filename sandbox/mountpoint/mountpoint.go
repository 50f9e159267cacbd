// Package mountpoint puts a detached mount into the tree of a box whose
// directories and links somebody else made.
//
// It is linked into process 1 of a box, which is small, and used by the runtimes
// whose agent makes the tree.
package mountpoint

import (
	"errors"
	"fmt"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// Attach moves the detached mount tree to the directory target of the tree that
// root, an open directory, is the root of. What of target is absent is made, and
// belongs to uid and gid. A link on the way is followed as in the box: it leads
// nowhere out of root. What is there and no directory is an error.
func Attach(tree, root int, target string, uid, gid int) error {
	at, err := open(root, target, uid, gid)
	if err == nil {
		err = unix.MoveMount(tree, "", at, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
		err = errors.Join(err, unix.Close(at))
	}
	if err != nil {
		return fmt.Errorf("mount at %s: %w", target, err)
	}
	return nil
}

// open opens a directory below root, which it makes if it is absent.
func open(root int, target string, uid, gid int) (int, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	at, err := unix.Openat2(root, ".", &how)
	if err != nil {
		return -1, err
	}
	sofar := ""
	for name := range strings.SplitSeq(strings.Trim(path.Clean("/"+target), "/"), "/") {
		sofar += "/" + name
		next, err := unix.Openat2(root, sofar, &how)
		if errors.Is(err, unix.ENOENT) {
			// A link that leads nowhere is there for mkdir, and stays refused.
			if err = unix.Mkdirat(at, name, 0o755); err == nil {
				err = unix.Fchownat(at, name, uid, gid, unix.AT_SYMLINK_NOFOLLOW)
			}
			if err == nil {
				next, err = unix.Openat2(root, sofar, &how)
			}
		}
		if err := errors.Join(err, unix.Close(at)); err != nil {
			return -1, err
		}
		at = next
	}
	return at, nil
}
