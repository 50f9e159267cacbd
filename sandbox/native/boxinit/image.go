package boxinit

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// lowers is where the layers of an image are mounted while the box is built.
const lowers = stage + "/lower/0"

// root makes a mount point of the new root, because pivot_root wants one: the
// skeleton of the disk, or the image with the disk over it.
func (b *builder) root() error {
	if b.Image == 0 {
		return mount(newRoot, newRoot, "", unix.MS_BIND, "")
	}
	if uint64(len(b.fds)) < 1+b.Image {
		return fmt.Errorf("image: got %d descriptors for %d layers", len(b.fds), b.Image)
	}
	// Their mount points are no files of the box.
	if err := mount("lowers", lowers, "tmpfs", plain, "mode=755,size=1m,nr_inodes="+strconv.Itoa(2*MaxImage)); err != nil {
		return err
	}
	var dirs []string
	for i, fd := range b.fds[1 : 1+b.Image] {
		dir := lowers + "/" + strconv.Itoa(i)
		if err := os.Mkdir(dir, 0o755); err != nil {
			return fmt.Errorf("image: %w", err)
		}
		if err := attach(fd, dir); err != nil {
			return fmt.Errorf("image: %w", err)
		}
		dirs = append(dirs, dir)
	}
	options := "userxattr,lowerdir=" + strings.Join(dirs, ":") + ",upperdir=" + stage + "/upper/0,workdir=" + stage + "/work/0"
	if err := mount("image", newRoot, "overlay", plain, options); err != nil {
		return err
	}
	for _, p := range []string{"/proc", "/dev", "/sys", "/run/mayfly"} {
		if err := b.place(p); err != nil {
			return fmt.Errorf("image: %w", err)
		}
	}
	return nil
}

// place makes a directory of the new root, for a mount. What an image has in its
// way goes: a link would lead to a place of the host as this namespace still has
// it. Nobody else runs in the box yet.
func (b *builder) place(p string) error {
	if b.Image == 0 {
		return os.MkdirAll(newRoot+p, 0o755)
	}
	dir := newRoot
	for name := range strings.SplitSeq(strings.TrimPrefix(p, "/"), "/") {
		dir = filepath.Join(dir, name)
		st, err := os.Lstat(dir)
		if err == nil && st.IsDir() {
			continue
		}
		if err == nil {
			err = os.Remove(dir)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// furnish makes what every box has where the image has nothing, and the files of
// /etc that say who the box is. The root is that of the box, so that links of the
// image lead to places in it.
func (b *builder) furnish() error {
	if b.Image == 0 {
		return nil
	}
	const sticky = fs.ModeSticky | 0o777
	for _, d := range []directory{
		{"/workspace", 0o755}, {"/tmp", sticky}, {"/var", 0o755}, {"/var/tmp", sticky}, {"/etc", 0o755}, {"/root", 0o700},
	} {
		if st, err := os.Stat(d.path); err == nil && st.IsDir() {
			continue
		}
		if err := os.Remove(d.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("directory of the box: %w", err)
		}
		if err := errors.Join(os.Mkdir(d.path, 0o755), os.Chmod(d.path, d.mode)); err != nil {
			return fmt.Errorf("directory of the box: %w", err)
		}
	}
	for _, f := range b.Etc {
		name := filepath.Join("/etc", f.Name)
		if err := os.RemoveAll(name); err != nil { // the image's may be a link
			return fmt.Errorf("file of the box: %w", err)
		}
		if err := errors.Join(os.WriteFile(name, []byte(f.Content), 0o644), os.Chmod(name, 0o644)); err != nil {
			return fmt.Errorf("file of the box: %w", err)
		}
	}
	return nil
}
