package engine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
	"github.com/mayfly-ci/mayfly/sandbox/mountpoint"
	"github.com/mayfly-ci/mayfly/sandbox/netns"
)

// Host is the host name of every box. A warm box has no job yet, so the name
// says nothing about one.
const Host = "mayfly"

const (
	// stage is where the disk is mounted while the root is built: the one place
	// that the container has for us, where the guest program lies until then.
	stage = sandbox.Run

	// ownInodes are 11 of ext4, the skeleton, one of the overlay, and what
	// builder makes in any image.
	ownInodes = 22
	runBytes  = 64 << 20 // of /run/mayfly; counted as memory
	plain     = unix.MS_NOSUID | unix.MS_NODEV
)

// skeleton makes what a disk has from its birth: the upper and the work
// directory of the overlay, and the mount point of the new root.
func skeleton(dir string) error {
	for _, d := range []string{"upper", "work", "root"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// enter finishes the box from inside its namespaces and returns the stream to
// the guest, which waits for a word on it.
func (b *Box) enter(ctx context.Context, mounts []sandbox.Mount) (net.Conn, error) {
	uid, gid, err := b.Process.Root()
	if err != nil {
		return nil, err
	}
	layers, err := b.layers()
	defer func() {
		for _, fd := range layers {
			_ = unix.Close(fd) // the box has it, or nobody
		}
	}()
	if err != nil {
		return nil, err
	}
	trees, err := b.Process.trees(mounts, uid != 0)
	defer func() {
		for _, fd := range trees {
			_ = unix.Close(fd) // the box has it, or nobody
		}
	}()
	if err != nil {
		return nil, err
	}
	stream, fds := -1, netns.FDs{TCP: -1, DNS: -1, Log: -1}
	err = kernel.In(b.Process.fd, unix.CLONE_NEWNS|unix.CLONE_NEWNET, func() (err error) {
		if err := netns.Setup(); err != nil {
			return fmt.Errorf("box network: %w", err)
		}
		if fds, err = netns.Open(); err != nil {
			return fmt.Errorf("box network: %w", err)
		}
		// The guest runs, and so needs its program no more, when it listens.
		if stream, err = b.Process.connect(ctx); err != nil {
			return err
		}
		build := &builder{uid, gid, layers}
		if err := build.build(b.Disk); err != nil {
			return err
		}
		return build.finish(b.Kernel, mounts, trees)
	})
	b.sockets = sandbox.Sockets{TCP: file(fds.TCP, "tcp"), DNS: file(fds.DNS, "dns"), Log: file(fds.Log, "log")}
	if stream < 0 {
		return nil, err
	}
	f := file(stream, "guest")
	conn, connErr := net.FileConn(f)
	err = errors.Join(err, connErr, f.Close()) // conn is a copy
	if err != nil && conn != nil {
		err = errors.Join(err, conn.Close())
	}
	if err != nil {
		return nil, err
	}
	return conn, nil
}

// layers are detached mounts of Layers.
func (b *Box) layers() (fds []int, err error) {
	ns, err := os.Open(proc(b.Process.pid, "ns", "user"))
	if err != nil {
		return nil, fmt.Errorf("user namespace: %w", err)
	}
	defer ns.Close() // the mounts have their own
	for _, l := range b.Layers {
		fd, err := unix.OpenTree(unix.AT_FDCWD, l, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if errors.Is(err, unix.ENOENT) {
			return fds, fmt.Errorf("layer %s is not here: the daemon has another file system, as one in a virtual machine or a container: %w: %w", l, err, sandbox.ErrUnsupported)
		}
		if err != nil {
			return fds, fmt.Errorf("layer %s: %w", l, err)
		}
		fds = append(fds, fd)
		if err := kernel.IDMap(fd, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV, ns); err != nil {
			return fds, fmt.Errorf("layer %s: %w", l, err)
		}
	}
	return fds, nil
}

func file(fd int, name string) *os.File {
	if fd < 0 {
		return nil
	}
	return os.NewFile(uintptr(fd), name)
}

// connect connects to the guest and makes sure that it is process 1: nobody
// else runs in the box yet, and this says so.
func (p *Process) connect(ctx context.Context) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("guest: %w", err)
	}
	err = kernel.Poll(ctx, "the guest does not listen", func() (bool, error) {
		err := unix.Connect(fd, &unix.SockaddrUnix{Name: wire.Address})
		if errors.Is(err, unix.ECONNREFUSED) && !p.ended() {
			return false, nil
		}
		return err == nil, err
	})
	var peer *unix.Ucred
	if err == nil {
		peer, err = unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	}
	if err == nil && int(peer.Pid) != p.pid {
		err = fmt.Errorf("process %d answers, and not process 1, which is %d", peer.Pid, p.pid)
	}
	if err != nil {
		return -1, errors.Join(fmt.Errorf("guest: %w: %w", err, sandbox.ErrDied), unix.Close(fd))
	}
	return fd, nil
}

// A builder makes the root of a box. It runs in the mount namespace of the
// container, whose processes see what it does. Files that it makes belong to
// root of the box.
type builder struct {
	uid, gid int
	layers   []int // of the root; none is the root of the container
}

func (b *builder) build(d *kernel.Disk) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mounts private: %w", err)
	}
	for _, step := range []func() error{
		func() error { return move(d.Mount, "", stage) }, b.overlay, enterRoot, b.directories, b.etc,
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// lower mounts the layers, whose number and length of name the kernel limits
// together, and returns them as the option of an overlay. They lie in the root of
// the container, which is a small tmpfs then.
func (b *builder) lower() (top, option string, err error) {
	if len(b.layers) == 0 {
		return "/", "/", nil
	}
	var all []string
	for i, fd := range b.layers {
		at := "/l" + strconv.Itoa(i)
		if err := os.Mkdir(at, 0o700); err != nil {
			return "", "", fmt.Errorf("layer: %w", err)
		}
		if err := move(fd, "", at); err != nil {
			return "", "", err
		}
		all = append(all, at)
	}
	return all[0], strings.Join(all, ":"), nil
}

// overlay puts the image under the disk, and what the engine mounted over it.
// An overlay shows the file system at / and nothing that is mounted below it, so
// the volumes of an image, and the files of /etc that the engine lends, stay out.
func (b *builder) overlay() error {
	top, lower, err := b.lower()
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(top, &st); err != nil {
		return fmt.Errorf("image: %w", err)
	}
	err = unix.Chown(stage+"/upper", int(st.Uid), int(st.Gid))
	if err == nil {
		err = unix.Chmod(stage+"/upper", st.Mode&0o7777)
	}
	if err != nil {
		return fmt.Errorf("disk: %w", err)
	}
	const root = stage + "/root"
	if err := attach("overlay", root, "overlay", "lowerdir="+lower+",upperdir="+stage+"/upper,workdir="+stage+"/work"); err != nil {
		return err
	}
	for _, p := range []string{"/proc", "/sys", "/dev"} {
		if err := b.mountPoint(root + p); err != nil {
			return err
		}
		if err := move(unix.AT_FDCWD, p, root+p); err != nil {
			return err
		}
	}
	return nil
}

// mountPoint makes a directory that the image does not have.
func (b *builder) mountPoint(p string) error {
	st, err := os.Lstat(p)
	if errors.Is(err, fs.ErrNotExist) {
		err = errors.Join(os.Mkdir(p, 0o755), os.Chown(p, b.uid, b.gid))
	} else if err == nil && !st.IsDir() {
		return fmt.Errorf("%s of the image is no directory: %w", filepath.Base(p), sandbox.ErrImage)
	}
	if err != nil {
		return fmt.Errorf("image: %w", err)
	}
	return nil
}

// trees opens the directories of the host that the box sees, outside of it.
func (p *Process) trees(mounts []sandbox.Mount, remapped bool) (fds []int, err error) {
	var userns *os.File
	if remapped && len(mounts) > 0 {
		if userns, err = os.Open(proc(p.pid, "ns", "user")); err != nil {
			return nil, fmt.Errorf("user namespace: %w", err)
		}
		defer userns.Close() // the mounts have their own
	}
	return kernel.OpenMounts(mounts, userns)
}

// Mount implements sandbox.Mounter. The guest idles: nothing of a job is in the
// box that could be in the way. What is mounted there the kernel of a gVisor box
// does not see.
func (b *Box) Mount(_ context.Context, mounts []sandbox.Mount) error {
	if b.Kernel != nil {
		return fmt.Errorf("mounts in a box that is there: %w", sandbox.ErrUnsupported)
	}
	if len(mounts) == 0 {
		return nil
	}
	if err := kernel.CheckMounts(mounts); err != nil {
		return err
	}
	uid, gid, err := b.Process.Root()
	if err != nil {
		return err
	}
	trees, err := b.Process.trees(mounts, uid != 0)
	defer func() {
		for _, fd := range trees {
			_ = unix.Close(fd) // the box has it, or nobody
		}
	}()
	if err != nil {
		return err
	}
	return kernel.In(b.Process.fd, unix.CLONE_NEWNS, func() error { return (&builder{uid: uid, gid: gid}).mounts(mounts, trees) })
}

// mounts puts them into the root.
func (b *builder) mounts(mounts []sandbox.Mount, trees []int) error {
	root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("new root: %w", err)
	}
	for i, m := range mounts {
		err = errors.Join(err, mountpoint.Attach(trees[i], root, m.Target, b.uid, b.gid))
	}
	return errors.Join(err, unix.Close(root))
}

// enterRoot makes the overlay the root of every process of the container, the
// guest's and this thread's included, and lets go of the old one.
func enterRoot() error {
	if err := unix.Chdir(stage + "/root"); err != nil {
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

// directories makes those that every box has, where the image has none.
func (b *builder) directories() error {
	const sticky = fs.ModeSticky | 0o777
	for _, d := range []struct {
		path string
		mode fs.FileMode
	}{{sandbox.Workspace, 0o755}, {"/tmp", sticky}, {"/var", 0o755}, {"/var/tmp", sticky}, {"/run", 0o755}, {sandbox.Run, 0o755}} {
		if st, err := os.Stat(d.path); err == nil && st.IsDir() {
			continue
		}
		if err := errors.Join(os.Mkdir(d.path, 0o755), os.Chmod(d.path, d.mode), os.Chown(d.path, b.uid, b.gid)); err != nil {
			return fmt.Errorf("directory of the box: %w", err)
		}
	}
	return nil
}

// finish puts what is not of the image into the root, which is that of this thread
// by now. A kernel of its own has such file systems itself.
func (b *builder) finish(k *Kernel, mounts []sandbox.Mount, trees []int) error {
	if k == nil {
		if err := b.run(); err != nil {
			return err
		}
		return b.mounts(mounts, trees)
	}
	if err := b.mounts(mounts, trees); err != nil {
		return err
	}
	return b.yard(k.bundle)
}

// run makes the directory of secrets, which never reaches a disk.
func (b *builder) run() error {
	return attach("run", sandbox.Run, "tmpfs", fmt.Sprintf("mode=755,size=%d,nr_inodes=16384,uid=%d,gid=%d", runBytes, b.uid, b.gid))
}

// etc writes the files that say who the box is and whom it asks for names.
func (b *builder) etc() error {
	if err := b.mountPoint("/etc"); err != nil { // a link may lead into /proc
		return err
	}
	for name, content := range map[string]string{
		"/etc/hosts": "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback " + Host + "\n" +
			egress.Self.String() + " " + Host + "\n",
		"/etc/hostname":    Host + "\n",
		"/etc/resolv.conf": "nameserver " + egress.Resolver.String() + "\noptions timeout:5 attempts:2 ndots:1\n",
	} {
		// The image's may be a link.
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("file of the box: %w", err)
		}
		if err := errors.Join(os.WriteFile(name, []byte(content), 0o644), os.Chmod(name, 0o644), os.Chown(name, b.uid, b.gid)); err != nil {
			return fmt.Errorf("file of the box: %w", err)
		}
	}
	return nil
}

// move moves a mount: the one at a path, or a detached one.
func move(fd int, from, to string) error {
	flags := 0
	if from == "" {
		flags = unix.MOVE_MOUNT_F_EMPTY_PATH
	}
	if err := unix.MoveMount(fd, from, unix.AT_FDCWD, to, flags); err != nil {
		return fmt.Errorf("move the mount %s to %s: %w", from, to, err)
	}
	return nil
}

func attach(source, target, kind, options string) error {
	if err := unix.Mount(source, target, kind, plain, options); err != nil {
		return fmt.Errorf("mount %s at %s: %w", source, target, err)
	}
	return nil
}
