package agenttest

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// inside is set in the environment of the tests that Main runs in namespaces.
const inside = "MAYFLY_TEST_INSIDE"

// program is the mayfly that Main built.
func program() string { return "/tmp/mayfly" }

// enter makes what a private machine has of its own. Process 1 of the namespace
// is the shell, which buries the orphans that a killed agent leaves. What other
// tests have mounted below their directories goes first: it would vanish from here
// too when they end.
const enter = `while read -r _ _ _ _ at _; do
	case $at in /tmp/* | /var/tmp/*) umount -l "$at" 2>/dev/null || true ;; esac
done </proc/self/mountinfo
mount --bind "$` + inside + `" /tmp
for d in /var/tmp /dev/shm /run; do mount -t tmpfs -o mode=1777 tmpfs $d; done
"$@"
exit $?`

// Main is the TestMain of a package whose tests start agents. It builds mayfly
// and runs the tests with namespaces of their own for processes, mounts and the
// network (which has loopback only), and with empty directories for temporary
// files, which are on the same disk as ever. The machine's control groups and
// loop devices are those of all: a World has names of its own there. What the
// tests need to be built beside mayfly is built by with, into the directory that
// will be /tmp.
func Main(m *testing.M, with ...func(dir string) error) {
	if os.Getenv(inside) == "" {
		os.Exit(outside(with))
	}
	if err := loopback(); err != nil {
		fmt.Fprintln(os.Stderr, "agenttest: loopback:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func outside(with []func(dir string) error) int {
	runtime.LockOSThread() // the death signal is bound to the thread
	dir, err := os.MkdirTemp("", "mayfly-agenttest-")
	if err == nil {
		err = errors.Join(os.Chmod(dir, 0o777|os.ModeSticky), build(filepath.Join(dir, "mayfly")), copySelf(filepath.Join(dir, "test")))
	}
	for _, prepare := range with {
		if err == nil {
			err = prepare(dir)
		}
	}
	if err == nil {
		err = runInside(dir)
	}
	err = errors.Join(err, os.RemoveAll(dir))
	if err != nil {
		fmt.Fprintln(os.Stderr, "agenttest:", err)
		return 1
	}
	return 0
}

func runInside(dir string) error {
	// The file in which go test wants to read what a test depends on is out of
	// reach in there.
	args := slices.DeleteFunc(slices.Clone(os.Args[1:]), func(a string) bool { return strings.HasPrefix(a, "-test.testlogfile") })
	cmd := exec.Command("unshare", slices.Concat([]string{
		"--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc", "--propagation=private",
		"sh", "-ec", enter, "sh", "/tmp/test",
	}, args)...)
	cmd.Env = append(os.Environ(), inside+"="+dir, "TMPDIR=/tmp")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("tests in namespaces of their own: %w", err)
	}
	return nil
}

func build(to string) error {
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", to, "github.com/mayfly-ci/mayfly/cmd/mayfly")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build mayfly: %w: %s", err, out)
	}
	return nil
}

func copySelf(to string) (err error) {
	from, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err == nil {
		_, err = io.Copy(f, from)
		err = errors.Join(err, f.Close())
	}
	return errors.Join(err, from.Close())
}

func loopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	lo, err := unix.NewIfreq("lo")
	if err == nil {
		lo.SetUint16(unix.IFF_UP)
		err = unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo)
	}
	return errors.Join(err, unix.Close(fd))
}
