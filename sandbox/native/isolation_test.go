package native

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
)

func TestPrivileges(t *testing.T) {
	t.Parallel()
	b := create(t, newRuntime(t, config(t)), "box", sandbox.Spec{})
	out, _ := script(t, b, "cat /proc/self/status; ulimit -c; ls /proc/self/fd | tr '\\n' ' '")
	for _, want := range []string{
		"CapInh:\t0000000000000000", "CapPrm:\t00000000000004fb", "CapEff:\t00000000000004fb",
		"CapBnd:\t00000000000004fb", "CapAmb:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2", "\n0\n0 1 2 3 ",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("a step's status: got %s, want %q in it", out, want)
		}
	}
	// The same for process 1, and every thread of it, as the host sees them.
	pid := b.(*box).process.Pid
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(threads) == 0 {
		t.Fatalf("threads of process 1: %q, %v", threads, err)
	}
	for _, file := range threads {
		status, err := os.ReadFile(file)
		if err != nil {
			continue // it ended
		}
		for _, want := range []string{"CapPrm:\t00000000000004fb", "CapBnd:\t00000000000004fb", "NoNewPrivs:\t1", "Seccomp:\t2"} {
			if !strings.Contains(string(status), want) {
				t.Errorf("%s: got %s, want %q", file, status, want)
			}
		}
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range fds {
		to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, e.Name()))
		if err != nil {
			continue
		}
		if !strings.HasPrefix(to, "socket:") && !strings.HasPrefix(to, "anon_inode:") && to != "/dev/null" && !strings.HasPrefix(to, "/proc/1/") && !strings.HasPrefix(to, "/proc/self/") {
			t.Errorf("process 1 has descriptor %s on %s", e.Name(), to)
		}
	}
}

// Each of these works for root on the host, and must not in the box.
func TestDenied(t *testing.T) {
	t.Parallel()
	r := newRuntime(t, config(t))
	b := create(t, r, "box", sandbox.Spec{})
	for _, c := range []struct{ name, script, want string }{
		{"unshare", "unshare -U true", "Operation not permitted"},
		{"user namespace by clone", `/usr/bin/python3 -c 'import ctypes; l = ctypes.CDLL(None, use_errno=True); print(l.syscall(` + fmt.Sprint(unix.SYS_CLONE) + `, 0x10000011, 0, 0, 0, 0), ctypes.get_errno())'`, "-1 1"},
		{"clone3", `/usr/bin/python3 -c 'import ctypes; l = ctypes.CDLL(None, use_errno=True); print(l.syscall(435, 0, 0), ctypes.get_errno())'`, "-1 38"},
		{"newer call", `/usr/bin/python3 -c 'import ctypes; l = ctypes.CDLL(None, use_errno=True); print(l.syscall(2000, 0, 0), ctypes.get_errno())'`, "-1 38"},
		{"io_uring", `/usr/bin/python3 -c 'import ctypes; l = ctypes.CDLL(None, use_errno=True); print(l.syscall(425, 1, 0), ctypes.get_errno())'`, "-1 1"},
		{"mount", "mount -t tmpfs x /mnt", "permi"},
		{"remount", "mount -o remount,rw /proc/sys", "permi"},
		{"umount", "umount /usr", "must be superuser"},
		{"chroot", "chroot / true", "Operation not permitted"},
		{"vsock", `/usr/bin/python3 -c 'import socket; socket.socket(40, 1)'`, "not supported"},
		{"packet", `/usr/bin/python3 -c 'import socket; socket.socket(17, 3)'`, "not supported"},
		{"alg", `/usr/bin/python3 -c 'import socket; socket.socket(38, 5)'`, "not supported"},
		{"netfilter netlink", `/usr/bin/python3 -c 'import socket; socket.socket(16, 3, 12)'`, "not supported"},
		{"raw", `/usr/bin/python3 -c 'import socket; socket.socket(2, 3, 1)'`, "not permitted"},
		{"typing into a terminal", `script -qc "/usr/bin/python3 -c 'import fcntl; fcntl.ioctl(0, 0x5412, b\"x\")'" /dev/null`, "Operation not permitted"},
		{"device", "mknod /tmp/d b 7 0", "Operation not permitted"},
		{"addresses", "ip address add 10.0.0.1/8 dev lo", "Operation not permitted"},
		{"sysctl", "echo 1 > /proc/sys/kernel/panic", "Read-only file system"},
		{"sysrq", "echo h > /proc/sysrq-trigger; echo s=$(stat -c %t:%T /proc/sysrq-trigger)", "s="},
		{"kcore", "head -c 1 /proc/kcore | wc -c", "0"},
		{"memory of process 1", "cat /proc/1/mem", "denied"},
		{"environment of process 1", "cat /proc/1/environ", "denied"},
		{"descriptors of process 1", "readlink /proc/1/fd/3 || echo refused", "refused"},
		{"program of process 1", "readlink /proc/1/exe || echo refused", "refused"},
		{"kill process 1", "kill -9 1; echo alive", "alive"},
		{"shadow of the host", "cut -d: -f2 /etc/shadow | sort -u", "!\n"},
		{"home of the host", "ls -A /root /home | grep -v : | tr -d '\\n'; echo end", "end"},
		{"package manager settings", "ls -A /usr/local/etc | wc -l; ls /etc/npmrc /etc/pip.conf", "0\n"},
		{"state directory", "ls " + r.cfg.StateDir, "No such file"},
		{"key rings", `/usr/bin/python3 -c 'import ctypes; l = ctypes.CDLL(None, use_errno=True); print(l.syscall(` + fmt.Sprint(unix.SYS_KEYCTL) + `, 0, -3, 0), ctypes.get_errno())'`, "-1 1"},
		{"i386 calls", `printf 'int main(){int r;__asm__("int $0x80":"=a"(r):"a"(20));return r>0?0:1;}' > x.c && gcc x.c -o x; ./x; echo status $?`, "status 159"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.name == "i386 calls" && unix.SYS_KEYCTL != 250 {
				return // not this machine's
			}
			if out, _ := script(t, b, c.script); !strings.Contains(out, c.want) {
				t.Errorf("got %q, want %q in it", out, c.want)
			}
		})
	}
}

// A box sees its own mounts and nothing of the host's, and the host sees none.
func TestMounts(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	before, err := os.ReadFile("/usr/bin/env")
	if err != nil {
		t.Fatal(err)
	}
	b := create(t, newRuntime(t, cfg), "box", sandbox.Spec{})
	out, _ := script(t, b, "cat /proc/self/mountinfo")
	for line := range strings.Lines(out) {
		target := strings.Fields(line)[4]
		switch top := "/" + strings.SplitN(target, "/", 3)[1]; top {
		case "/", "/usr", "/etc", "/var", "/proc", "/dev", "/run":
		default:
			t.Errorf("mounted in the box: %s", line)
		}
	}
	for _, l := range leftovers(t, cfg.StateDir) {
		if strings.Contains(l, " - ") {
			t.Errorf("mounted on the host: %s", l)
		}
	}
	if _, exit := script(t, b, "echo broken > /usr/bin/env && rm /usr/bin/git"); exit.Code != 0 {
		t.Errorf("changing /usr in the box: got %+v, want success", exit)
	}
	after, err := os.ReadFile("/usr/bin/env")
	if err != nil || string(after) != string(before) {
		t.Errorf("/usr/bin/env of the host has changed (%v)", err)
	}
}
