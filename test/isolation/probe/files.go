package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

var errAbsent = errors.New("not found")

// files are the ways to what lies in a file system, and to what a process was
// started with.
func files() map[string]probe {
	return map[string]probe{
		"read":     {2, func(a []string) error { return read(a[0], a[1]) }},
		"open":     {1, func(a []string) error { return readable(a[0]) }},
		"link":     {1, func(a []string) error { _, err := os.Readlink(a[0]); return err }},
		"find":     {1, func(a []string) error { return find("/", a[0]) }},
		"sockets":  {0, func([]string) error { return sockets() }},
		"fds":      {0, func([]string) error { return descriptors() }},
		"status":   {1, func(a []string) error { return status(a[0]) }},
		"handle":   {2, func(a []string) error { return byHandle(a[0], a[1]) }},
		"setuid":   {3, func(a []string) error { return setuid(a[0], a[1], a[2]) }},
		"writable": {1, func(a []string) error { return writable(a[0]) }},
		"copy":     {2, func(a []string) error { return copySelf(a[0], a[1]) }},
	}
}

func read(file, token string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if !bytes.Contains(b, []byte(token)) {
		return fmt.Errorf("%s: %w", file, errAbsent)
	}
	return nil
}

// readable reads a byte.
func readable(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.Read(make([]byte, 1))
	return err
}

// find looks for a file whose name contains token, everywhere but where the
// tests put none.
func find(dir, token string) error {
	found := ""
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		switch {
		case strings.Contains(filepath.Base(p), token):
			found = p
			return fs.SkipAll
		case e == nil || err != nil:
			return nil
		case p == "/proc" || p == "/sys" || p == "/usr/share" || p == "/usr/lib" || p == "/usr/local/go":
			return fs.SkipDir
		}
		return nil
	})
	if err == nil && found == "" {
		err = errAbsent
	}
	return err
}

// sockets finds a socket in the file system.
func sockets() error {
	found := ""
	err := filepath.WalkDir("/", func(p string, e fs.DirEntry, err error) error {
		switch {
		case e == nil || err != nil:
			return nil
		case p == "/proc" || p == "/sys" || p == "/usr":
			return fs.SkipDir
		case e.Type() == fs.ModeSocket:
			found = p
			return fs.SkipAll
		}
		return nil
	})
	if err == nil && found == "" {
		err = errAbsent
	}
	fmt.Println(found)
	return err
}

// descriptors prints what is open beside 0, 1 and 2, and fails if nothing is.
// Those of the Go runtime are epoll and event descriptors.
func descriptors() error {
	found := false
	for fd := 3; fd < 1024; fd++ {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		if err != nil {
			continue
		}
		to, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
		if err == nil && flags&unix.FD_CLOEXEC == 0 { // what we opened ourselves closes
			fmt.Println(fd, to)
			found = true
		}
	}
	if !found {
		return errAbsent
	}
	return nil
}

func status(pid string) error {
	b, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(b)
	return err
}

// byHandle reads a file by open_by_handle_at(2), which asks for no permission
// to the directories above it.
func byHandle(file, token string) error {
	handle, _, err := unix.NameToHandleAt(unix.AT_FDCWD, file, 0)
	if err != nil {
		return fmt.Errorf("name_to_handle_at: %w", err)
	}
	dir, err := os.Open(filepath.Dir(file))
	if err != nil {
		return err
	}
	defer dir.Close()
	fd, err := unix.OpenByHandleAt(int(dir.Fd()), handle, unix.O_RDONLY|unix.O_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open_by_handle_at: %w", err)
	}
	f := os.NewFile(uintptr(fd), file)
	defer f.Close()
	b, err := io.ReadAll(f)
	if err == nil && !bytes.Contains(b, []byte(token)) {
		err = errAbsent
	}
	return err
}

// setuid reads a file as nobody with a program that is setuid root: a copy of
// this one.
func setuid(program, file, token string) error {
	cmd := exec.Command(program, "read", file, token)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}

// writable writes a file below a mount, in each way that there is to make it
// writable first.
func writable(dir string) error {
	file := filepath.Join(dir, "new")
	write := func() error { return os.WriteFile(file, []byte("new"), 0o644) }
	var errs []error
	for _, change := range []func() error{
		func() error { return nil },
		func() error { return unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND, "") },
		func() error { return unix.Mount("", dir, "", unix.MS_REMOUNT, "") },
		func() error {
			return unix.MountSetattr(unix.AT_FDCWD, dir, 0, &unix.MountAttr{Attr_clr: unix.MOUNT_ATTR_RDONLY})
		},
		func() error { return unix.Unmount(dir, unix.MNT_DETACH) },
		func() error { return unix.Mount("tmpfs", dir, "tmpfs", 0, "") },
	} {
		err := change()
		if err == nil {
			err = write()
		}
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// copySelf makes a setuid copy of this program and a file that only root reads.
func copySelf(program, file string) error {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(program, self, 0o755), os.Chmod(program, 0o755|os.ModeSetuid),
		os.WriteFile(file, []byte("root's own"), 0o600))
}

// terminal types a character into a terminal of its own by TIOCSTI.
func terminal() error {
	signal.Ignore(unix.SIGHUP) // it is the last to use it
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer master.Close()
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		return err
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		return err
	}
	_, _ = unix.Setsid() // we may lead a session already
	slave, err := os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer slave.Close()
	c := byte('x')
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, slave.Fd(), unix.TIOCSTI, uintptr(unsafe.Pointer(&c))); e != 0 {
		return e
	}
	return nil
}
