// Package kernel is what the runtimes that share this machine's kernel ask of it
// alike: a sized disk for a box, the system calls that a box may make, threads
// that pass through namespaces and control groups.
package kernel

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
)

const (
	// groupBytes and groupInodes are ext4's units: inodes come in multiples of
	// a block of them per block group.
	groupBytes  = 128 << 20
	groupInodes = 16
	// journalBytes is the least that ext4 takes, and comes on top of the size.
	journalBytes = 4 << 20
	// minDisk leaves room for a skeleton.
	minDisk = 8 << 20
	// shutdown is EXT4_IOC_SHUTDOWN, _IOR('X', 125, __u32), and noFlush is
	// EXT4_GOING_FLAGS_NOLOGFLUSH (fs/ext4/ext4.h).
	shutdown = 0x8004587D
	noFlush  = 2
)

// prefetch is how many groups of blocks ext4 gets ready beside the one that it
// needs (Documentation/ABI/testing/sysfs-fs-ext4). By itself it takes all of them,
// whose bitmaps lie side by side, when the first directory is made: that is a
// millisecond of a new box, for groups that most boxes never use.
const prefetch = "/sys/fs/ext4/loop%d/mb_prefetch"

// A Disk is the private file system of one box: an unlinked sparse file, as a
// loop device, as ext4. All three end with their last user, so nothing of it
// outlives the box and the agent, whatever ends them.
type Disk struct {
	Loop  int      // number of the loop device
	Mount int      // detached mount, until its owner closes it
	Root  *os.File // its root directory, to act on the file system
}

// A Template says what disks are copied from.
type Template struct {
	Dir      string                 // where the formatted files lie, one for each size
	Version  string                 // another one is another file: raise it with the skeleton
	Skeleton func(dir string) error // what every disk has from its birth
	Own      int64                  // inodes that the file system and the maker of the box take, at least
}

// options names those of mkfs in the names of templates; raise it with them.
const options = "2"

// Make returns the path of a formatted file of that size, made on first use. No
// more than the asked inodes are free on it, and fewer by less than a block of
// them for each group. A size that is too small is sandbox.ErrUnsupported.
func (t Template) Make(ctx context.Context, size, inodes int64) (string, error) {
	groups := (size + journalBytes + groupBytes - 1) / groupBytes
	per := (inodes + t.Own) / groups / groupInodes * groupInodes
	if size < minDisk || per*groups <= t.Own {
		return "", fmt.Errorf("disk of %d bytes and %d files: at least %d bytes and %d files: %w",
			size, inodes, minDisk, (groups+1)*groupInodes, sandbox.ErrUnsupported)
	}
	p := filepath.Join(t.Dir, fmt.Sprintf("disk-%s.%s-%d-%d.ext4", options, t.Version, size, inodes))
	if _, err := os.Stat(p); err == nil {
		return p, nil
	}
	work, err := os.MkdirTemp(t.Dir, ".new-")
	if err != nil {
		return "", fmt.Errorf("disk template: %w", err)
	}
	err = t.format(ctx, work, size, per*groups)
	if err == nil {
		err = os.Rename(filepath.Join(work, "disk"), p)
	}
	if err := errors.Join(err, os.RemoveAll(work)); err != nil {
		return "", fmt.Errorf("disk template: %w", err)
	}
	return p, nil
}

// format makes work/disk. No box survives a crash, so the journal is of no use
// as such, but without one ext4 does not take the inode of a file deleted in
// the last minutes and looks past each of them for every new file: 20,000 files
// made, deleted and made again took 19 s instead of 0.4 s. Inode tables and the
// journal are left as the holes they are.
func (t Template) format(ctx context.Context, work string, size, inodes int64) error {
	tree := filepath.Join(work, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	if err := t.Skeleton(tree); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "mkfs.ext4", "-q", "-F", "-b", "4096", "-I", "256", "-m", "0",
		"-N", strconv.FormatInt(inodes, 10), "-G", "1024", "-J", "size="+strconv.Itoa(journalBytes>>20),
		"-O", "has_journal,^resize_inode,^huge_file,sparse_super2,metadata_csum,uninit_bg,flex_bg",
		"-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0", "-d", tree,
		filepath.Join(work, "disk"), strconv.FormatInt((size+journalBytes)>>10, 10)+"k")
	cmd.Env = []string{"PATH=/usr/sbin:/sbin:/usr/bin:/bin", "MKE2FS_CONFIG=/dev/null"}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.ext4 (package e2fsprogs): %w: %s", err, out)
	}
	return nil
}

// NewDisk makes a disk from a file that Template.Make returned. Its own file
// lies, without a name, in dir.
func NewDisk(template, dir string) (*Disk, error) {
	file, err := os.OpenFile(dir, unix.O_TMPFILE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("disk: file: %w", err)
	}
	defer file.Close() // the loop device has its own
	if err := clone(file, template); err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	device, number, err := attachLoop(file)
	if err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	defer device.Close() // the file system has its own
	d := &Disk{Loop: number, Mount: -1}
	if d.Mount, err = mountDisk(device.Name()); err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	fd, err := unix.Openat(d.Mount, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("disk: root: %w", err), unix.Close(d.Mount))
	}
	d.Root = os.NewFile(uintptr(fd), "disk")
	_ = os.WriteFile(fmt.Sprintf(prefetch, number), []byte("0"), 0) // what is lost without is time
	return d, nil
}

// StartDisk is NewDisk for a maker that has something else to do: most of it is
// waiting for the kernel. It must call wait.
func StartDisk(template, dir string) (wait func() (*Disk, error)) {
	var d *Disk
	done := make(chan error, 1)
	go func() {
		var err error
		d, err = NewDisk(template, dir)
		done <- err
	}()
	return func() (*Disk, error) { err := <-done; return d, err }
}

// clone copies what is allocated in the template and leaves the rest a hole.
func clone(to *os.File, template string) error {
	from, err := os.Open(template)
	if err != nil {
		return fmt.Errorf("template: %w", err)
	}
	defer from.Close() // read only
	st, err := from.Stat()
	if err != nil {
		return fmt.Errorf("template: %w", err)
	}
	if err := to.Truncate(st.Size()); err != nil {
		return fmt.Errorf("size: %w", err)
	}
	for end := int64(0); ; {
		start, err := from.Seek(end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("template: %w", err)
		}
		if end, err = from.Seek(start, unix.SEEK_HOLE); err != nil {
			return fmt.Errorf("template: %w", err)
		}
		for in, out := start, start; in < end; {
			n, err := unix.CopyFileRange(int(from.Fd()), &in, int(to.Fd()), &out, int(end-in), 0)
			if err == nil && n == 0 {
				err = io.ErrUnexpectedEOF
			}
			if err != nil {
				return fmt.Errorf("copy template: %w", err)
			}
		}
	}
}

// attachLoop puts the file behind a free loop device that frees itself when
// its last user closes it.
func attachLoop(file *os.File) (*os.File, int, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, 0, fmt.Errorf("loop devices: %w", err)
	}
	defer control.Close() // no state
	for range 100 {
		number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, 0, fmt.Errorf("loop devices: %w", err)
		}
		device, err := os.OpenFile("/dev/loop"+strconv.Itoa(number), os.O_RDWR, 0)
		if err != nil {
			return nil, 0, fmt.Errorf("loop device: %w", err)
		}
		err = unix.IoctlLoopConfigure(int(device.Fd()), &unix.LoopConfig{
			Fd: uint32(file.Fd()), Size: 4096,
			Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR},
		})
		if err == nil {
			return device, number, nil
		}
		if err := errors.Join(err, device.Close()); !errors.Is(err, unix.EBUSY) {
			return nil, 0, fmt.Errorf("loop device %d: %w", number, err)
		} // another box took it first
	}
	return nil, 0, errors.New("loop devices: none stayed free for long enough to take it")
}

// mountDisk mounts the device nowhere. Nothing of a box is worth waiting for the
// real disk: no barriers, no order of data and metadata, rare commits.
func mountDisk(device string) (int, error) {
	fd, err := unix.Fsopen("ext4", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("ext4: %w", err)
	}
	defer unix.Close(fd) // the mount has its own
	err = errors.Join(
		unix.FsconfigSetString(fd, "source", device),
		unix.FsconfigSetFlag(fd, "noinit_itable"),
		unix.FsconfigSetFlag(fd, "nobarrier"),
		unix.FsconfigSetString(fd, "data", "writeback"),
		unix.FsconfigSetString(fd, "commit", "300"),
		unix.FsconfigCreate(fd),
	)
	if err != nil {
		return -1, fmt.Errorf("ext4 on %s: %w", device, err)
	}
	mount, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
	if err != nil {
		return -1, fmt.Errorf("ext4 on %s: mount: %w", device, err)
	}
	return mount, nil
}

// Discard drops what the box wrote instead of writing it back, and lets go of
// the root. The box must be dead.
func (d *Disk) Discard() error {
	err := unix.IoctlSetPointerInt(int(d.Root.Fd()), shutdown, noFlush)
	if err != nil {
		err = fmt.Errorf("disk: discard: %w", err)
	}
	return errors.Join(err, d.Root.Close())
}

// Gone waits until no loop device has a file of dir. number is the device to
// look at, or negative to look at all.
func Gone(ctx context.Context, dir string, number int) error {
	pattern := "/sys/block/loop*/loop/backing_file"
	if number >= 0 {
		pattern = strings.Replace(pattern, "*", strconv.Itoa(number), 1)
	}
	dir, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("disk: %w", err)
	}
	return Poll(ctx, "disk: a loop device is in use", func() (bool, error) {
		files, err := filepath.Glob(pattern)
		for _, f := range files {
			backing, err := os.ReadFile(f)
			if err == nil && strings.HasPrefix(string(backing), dir+"/") {
				return false, nil
			}
		}
		return err == nil, err
	})
}

// Detach lets go of the mount, which a box may have by now. Of no disk there is
// none.
func (d *Disk) Detach() {
	if d != nil && d.Mount >= 0 {
		_ = unix.Close(d.Mount) // a mount has nothing to write
		d.Mount = -1
	}
}
