package kernel

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// MaxMounts is how many directories of the host a box may see (sandbox.Spec).
const MaxMounts = 4

// CheckMounts refuses mounts that no runtime makes, with sandbox.ErrUnsupported:
// too many, paths that are not absolute and clean, and targets that would cover
// what a box is made of, or one another.
func CheckMounts(mounts []sandbox.Mount) error {
	refuse := func(m sandbox.Mount, why string) error {
		return fmt.Errorf("mount of %q at %q: %s: %w", m.Source, m.Target, why, sandbox.ErrUnsupported)
	}
	if len(mounts) > MaxMounts {
		return fmt.Errorf("%d mounts, at most %d: %w", len(mounts), MaxMounts, sandbox.ErrUnsupported)
	}
	needed := []string{"/proc", "/sys", "/dev", "/etc", "/usr", sandbox.Run, sandbox.Workspace}
	own := []string{"/proc", "/sys", "/dev", sandbox.Run} // and the targets so far
	for _, m := range mounts {
		for _, p := range []string{m.Source, m.Target} {
			if !filepath.IsAbs(p) || filepath.Clean(p) != p || strings.ContainsRune(p, 0) || p == "/" {
				return refuse(m, "the paths must be absolute, clean and below /")
			}
		}
		for _, t := range append(needed, own...) {
			if m.Target == t || strings.HasPrefix(t, m.Target+"/") {
				return refuse(m, "it would cover "+t)
			}
		}
		for _, t := range own {
			if strings.HasPrefix(m.Target, t+"/") {
				return refuse(m, "it would lie in "+t)
			}
		}
		own = append(own, m.Target)
	}
	return nil
}

// OpenMount returns a detached mount of a directory of the host: read-only,
// without set-user-ID programs and devices, and deaf to what is mounted on the
// host later. If userns, a user namespace, is not nil, its files belong to the
// ids of that if the file system can do so, and to nobody otherwise. What is
// mounted below the directory is not in it.
func OpenMount(source string, userns *os.File) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return -1, fmt.Errorf("mount of %s: %w", source, err)
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		err = unix.ENOTDIR
	}
	if err == nil {
		attr := unix.MountAttr{
			Attr_set:    unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV,
			Propagation: unix.MS_PRIVATE,
		}
		if userns != nil {
			attr.Attr_set |= unix.MOUNT_ATTR_IDMAP
			attr.Userns_fd = uint64(userns.Fd())
		}
		err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr)
		if userns != nil && errors.Is(err, unix.EINVAL) {
			attr.Attr_set, attr.Userns_fd = attr.Attr_set&^unix.MOUNT_ATTR_IDMAP, 0
			err = unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr)
		}
	}
	if err != nil {
		return -1, errors.Join(fmt.Errorf("mount of %s: %w", source, err), unix.Close(fd))
	}
	return fd, nil
}

// OpenMounts is OpenMount of all of them, in order. What it returns is open, also
// beside an error.
func OpenMounts(mounts []sandbox.Mount, userns *os.File) (fds []int, err error) {
	for _, m := range mounts {
		fd, err := OpenMount(m.Source, userns)
		if err != nil {
			return fds, err
		}
		fds = append(fds, fd)
	}
	return fds, nil
}
