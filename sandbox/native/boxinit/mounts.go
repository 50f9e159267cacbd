package boxinit

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/gvisor/keeper"
	"github.com/mayfly-ci/mayfly/sandbox/mountpoint"
)

// stage is where the disk is mounted while the box is built. It must exist on
// every host, and what it hides is needed by descriptor only.
const stage = "/usr"

// newRoot is the directory of the disk that becomes the box's root.
const newRoot = stage + "/root"

const (
	plain  = unix.MS_NOSUID | unix.MS_NODEV
	data   = plain | unix.MS_NOEXEC
	modRO  = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV
	nodeRO = unix.MS_REMOUNT | unix.MS_BIND | unix.MS_RDONLY | data
)

type builder struct {
	*Setup
	fds []int
}

// filesystem makes the box's tree and enters it. Nothing of the host stays
// reachable: the old root is detached, and descriptors are closed.
func (b *builder) filesystem() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mounts private: %w", err)
	}
	root, rest := newRoot, []func() error{b.proc, b.dev, b.tmpfs, b.mounts}
	if b.GVisor() { // its kernel has such file systems of its own
		root, rest = yard, []func() error{b.mounts, b.outside}
	}
	for _, step := range append([]func() error{b.disk, b.root, b.layers, b.hide}, rest...) {
		if err := step(); err != nil {
			return err
		}
	}
	if err := enter(root); err != nil {
		return err
	}
	finish := b.furnish
	if b.GVisor() {
		finish = func() error { return inside(b.furnish, func() error { return keeper.MarkTmp(0, 0) }) }
	}
	if err := finish(); err != nil {
		return err
	}
	for _, fd := range b.fds {
		if err := unix.Close(fd); err != nil {
			return fmt.Errorf("close layer: %w", err)
		}
	}
	return nil
}

// disk mounts the box's disk at stage.
func (b *builder) disk() error {
	if b.Unprivileged {
		if err := b.memoryDisk(); err != nil {
			return err
		}
	} else if err := attach(b.fds[0], stage); err != nil {
		return fmt.Errorf("disk: %w", err)
	}
	return nil
}

// memoryDisk makes a tmpfs the disk. The layers are cloned first, since stage
// covers one of them.
func (b *builder) memoryDisk() error {
	b.fds = []int{-1}
	for _, l := range b.Layers {
		fd, err := unix.OpenTree(unix.AT_FDCWD, l.Source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
		if err != nil {
			return fmt.Errorf("layer %s: %w", l.Source, err)
		}
		b.fds = append(b.fds, fd)
		attr := unix.MountAttr{Attr_set: modRO}
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr); err != nil {
			return fmt.Errorf("layer %s read-only: %w", l.Source, err)
		}
	}
	b.fds = b.fds[1:]
	if err := mount("disk", stage, "tmpfs", plain, fmt.Sprintf("mode=755,size=%d,nr_inodes=%d", b.DiskBytes, b.DiskInodes)); err != nil {
		return err
	}
	return Skeleton(stage)
}

// mounts puts the directories of the host that this box sees below the new root.
func (b *builder) mounts() error {
	root, err := unix.Open(newRoot, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("new root: %w", err)
	}
	fds := b.fds[len(b.fds)-len(b.Layers):]
	for i, l := range b.Layers {
		if l.Mount {
			err = errors.Join(err, mountpoint.Attach(fds[i], root, l.Path, 0, 0))
		}
	}
	return errors.Join(err, unix.Close(root))
}

// layers puts the base below the new root, copy-on-write where it may change.
func (b *builder) layers() error {
	fds := b.fds
	if !b.Unprivileged {
		fds = fds[1+b.Image:]
	}
	if len(fds) != len(b.Layers) {
		return fmt.Errorf("layers: got %d descriptors for %d layers", len(fds), len(b.Layers))
	}
	for i, l := range b.Layers {
		if l.Mount {
			continue
		}
		target := newRoot + path.Clean(l.Path)
		if err := b.place(path.Clean(l.Path)); err != nil {
			return fmt.Errorf("layer %s: %w", l.Path, err)
		}
		if !l.Write {
			if err := attach(fds[i], target); err != nil {
				return fmt.Errorf("layer %s: %w", l.Path, err)
			}
			continue
		}
		n := strconv.Itoa(i)
		lower := stage + "/lower/" + n
		if err := attach(fds[i], lower); err != nil {
			return fmt.Errorf("layer %s: %w", l.Path, err)
		}
		options := "userxattr,lowerdir=" + lower + ",upperdir=" + stage + "/upper/" + n + ",workdir=" + stage + "/work/" + n
		if err := mount("overlay", target, "overlay", plain, options); err != nil {
			return err
		}
	}
	return nil
}

// hide covers directories that may hold what the job must not see.
func (b *builder) hide() error {
	for i, p := range b.Hide {
		target := newRoot + path.Clean(p)
		if st, err := os.Lstat(target); err != nil || !st.IsDir() {
			continue // absent on this host, so there is nothing to hide
		}
		if err := mount(stage+"/hide/"+strconv.Itoa(i), target, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	return nil
}

// proc mounts the box's own /proc without what tells about the host or acts
// on it. The list is runc's, and a little longer.
func (b *builder) proc() error {
	root := newRoot + "/proc"
	if err := mount("proc", root, "proc", data, ""); err != nil {
		return err
	}
	for _, name := range []string{
		"kcore", "keys", "key-users", "kmsg", "kpagecount", "kpageflags", "kpagecgroup", "latency_stats",
		"sched_debug", "slabinfo", "sysrq-trigger", "timer_list", "timer_stats", "vmallocinfo", "interrupts",
	} {
		err := unix.Mount("/dev/null", root+"/"+name, "", unix.MS_BIND, "")
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("mask /proc/%s: %w", name, err)
		}
	}
	for _, name := range []string{"acpi", "scsi", "asound"} {
		err := unix.Mount(stage+"/empty", root+"/"+name, "", unix.MS_BIND, "")
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("mask /proc/%s: %w", name, err)
		}
	}
	for _, name := range []string{"bus", "fs", "irq", "sys"} {
		p := root + "/" + name
		err := unix.Mount(p, p, "", unix.MS_BIND|unix.MS_REC, "")
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err == nil {
			err = unix.Mount("", p, "", nodeRO, "")
		}
		if err != nil {
			return fmt.Errorf("read-only /proc/%s: %w", name, err)
		}
	}
	return nil
}

// dev makes the few devices that programs expect. A user namespace cannot make
// nodes, so they are binds of the host's, which every user may open anyway.
func (b *builder) dev() error {
	root := newRoot + "/dev"
	if err := mount("dev", root, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=755,size=64k,nr_inodes=128"); err != nil {
		return err
	}
	for _, name := range []string{"null", "zero", "full", "random", "urandom", "tty"} {
		p := root + "/" + name
		if err := os.WriteFile(p, nil, 0o666); err != nil {
			return fmt.Errorf("device: %w", err)
		}
		if err := mount("/dev/"+name, p, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	for _, name := range []string{"pts", "shm"} {
		if err := os.Mkdir(root+"/"+name, 0o755); err != nil {
			return fmt.Errorf("device: %w", err)
		}
	}
	options := "newinstance,ptmxmode=0666,mode=0620"
	if !b.Unprivileged {
		options += ",gid=5" // tty; without root only one group is mapped
	}
	if err := mount("devpts", root+"/pts", "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, options); err != nil {
		return err
	}
	if err := mount("shm", root+"/shm", "tmpfs", plain, fmt.Sprintf("mode=1777,size=%d,nr_inodes=16384", b.ShmBytes)); err != nil {
		return err
	}
	for name, to := range map[string]string{
		"ptmx": "pts/ptmx", "fd": "/proc/self/fd",
		"stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(to, root+"/"+name); err != nil {
			return fmt.Errorf("device: %w", err)
		}
	}
	return nil
}

// tmpfs makes the directory of secrets, which never reaches a disk.
func (b *builder) tmpfs() error {
	return mount("run", newRoot+"/run/mayfly", "tmpfs", plain, fmt.Sprintf("mode=755,size=%d,nr_inodes=16384", b.RunBytes))
}

// enter makes a mount the root and drops everything else.
func enter(root string) error {
	if err := unix.Chdir(root); err != nil {
		return fmt.Errorf("new root: %w", err)
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach the old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("new root: %w", err)
	}
	return nil
}

func attach(fd int, target string) error {
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach at %s: %w", target, err)
	}
	return nil
}

func mount(source, target, kind string, flags uintptr, options string) error {
	if err := unix.Mount(source, target, kind, flags, options); err != nil {
		return fmt.Errorf("mount %s at %s: %w", source, target, err)
	}
	return nil
}
