package native

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
	"github.com/mayfly-ci/mayfly/sandbox/native/boxinit"
)

// verdict runs the filter on a call, as the kernel does.
func verdict(t *testing.T, info *arch.Info, nr, machine uint32, args ...uint64) uint32 {
	t.Helper()
	raw, err := filter(info.Name)
	if err != nil || len(raw)%8 != 0 || len(raw)/8 > 4096 {
		t.Fatalf("filter: %d bytes, %v", len(raw), err)
	}
	vm, err := bpf.NewVM(program(info))
	if err != nil {
		t.Fatal(err)
	}
	// The VM reads big-endian, the kernel native words: so write them swapped.
	data := make([]byte, 64)
	put := func(off int, v uint32) {
		data[off], data[off+1], data[off+2], data[off+3] = byte(v>>24), byte(v>>16), byte(v>>8), byte(v)
	}
	put(dataNumber, nr)
	put(dataArch, machine)
	for i, a := range args {
		put(dataArgs+8*i, uint32(a))
		put(dataArgs+8*i+4, uint32(a>>32))
	}
	got, err := vm.Run(data)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(got)
}

func TestFilter(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"amd64", "arm64"} {
		info, err := arch.GetInfo(name)
		if err != nil {
			t.Fatal(err)
		}
		info = &arch.Info{Name: name, ID: info.ID, SyscallNames: info.SyscallNames}
		call := func(call string, args ...uint64) uint32 {
			n, ok := info.SyscallNames[call]
			if !ok {
				t.Fatalf("%s: no call %s", name, call)
			}
			return verdict(t, info, uint32(n), uint32(info.ID), args...)
		}
		for _, c := range []string{"read", "write", "openat", "execve", "exit_group", "futex", "getrandom", "statx", "pidfd_open", "mknodat", "prlimit64", "landlock_create_ruleset"} {
			if got := call(c); got != retAllow {
				t.Errorf("%s %s: got %#x, want allowed", name, c, got)
			}
		}
		for _, c := range []string{
			"unshare", "setns", "mount", "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "fsopen", "fsmount", "fsconfig", "fspick",
			"mount_setattr", "bpf", "perf_event_open", "keyctl", "add_key", "request_key", "io_uring_setup", "io_uring_enter", "io_uring_register",
			"userfaultfd", "kexec_load", "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "open_by_handle_at", "name_to_handle_at",
			"init_module", "finit_module", "delete_module", "reboot", "swapon", "swapoff", "settimeofday", "clock_settime", "clock_adjtime", "adjtimex",
			"acct", "syslog", "fanotify_init", "quotactl", "kcmp", "process_madvise", "move_pages", "sethostname", "setdomainname", "vhangup",
		} {
			if got := call(c); got != retEPERM {
				t.Errorf("%s %s: got %#x, want EPERM", name, c, got)
			}
		}
		for _, c := range []struct {
			what      string
			got, want uint32
		}{
			{"clone3", call("clone3"), retENOSYS},
			{"newer", verdict(t, info, 1000, uint32(info.ID)), retENOSYS},
			{"x32 or newest", verdict(t, info, 0x40000000, uint32(info.ID)), retENOSYS},
			{"other machine", verdict(t, info, 0, 0x40000003), retKill},
			{"thread", call("clone", unix.CLONE_VM|unix.CLONE_THREAD|unix.CLONE_SIGHAND), retAllow},
			{"fork", call("clone", uint64(syscall.SIGCHLD)), retAllow},
			{"clone of a user namespace", call("clone", unix.CLONE_NEWUSER|uint64(syscall.SIGCHLD)), retEPERM},
			{"clone of a mount namespace", call("clone", unix.CLONE_NEWNS), retEPERM},
			{"unix", call("socket", unix.AF_UNIX, 1, 0), retAllow},
			{"inet", call("socket", unix.AF_INET, 1, 0), retAllow},
			{"inet6", call("socket", unix.AF_INET6, 2, 0), retAllow},
			{"inet with a high half", call("socket", 7<<32|unix.AF_VSOCK, 1, 0), retErrno(unix.EAFNOSUPPORT)},
			{"route", call("socket", unix.AF_NETLINK, 3, unix.NETLINK_ROUTE), retAllow},
			{"netfilter", call("socket", unix.AF_NETLINK, 3, unix.NETLINK_NETFILTER), retErrno(unix.EAFNOSUPPORT)},
			{"vsock", call("socket", unix.AF_VSOCK, 1, 0), retErrno(unix.EAFNOSUPPORT)},
			{"packet", call("socket", unix.AF_PACKET, 3, 0), retErrno(unix.EAFNOSUPPORT)},
			{"alg", call("socket", unix.AF_ALG, 5, 0), retErrno(unix.EAFNOSUPPORT)},
			{"window size", call("ioctl", 0, unix.TIOCGWINSZ), retAllow},
			{"TIOCSTI", call("ioctl", 0, unix.TIOCSTI), retEPERM},
			{"TIOCSTI with a high half", call("ioctl", 0, 1<<32|unix.TIOCSTI), retEPERM},
			{"TIOCLINUX", call("ioctl", 0, unix.TIOCLINUX), retEPERM},
			{"asking for the personality", call("personality", 0xffffffff), retAllow},
			{"no randomisation", call("personality", 0x40000), retEPERM},
		} {
			if c.got != c.want {
				t.Errorf("%s %s: got %#x, want %#x", name, c.what, c.got, c.want)
			}
		}
	}
	if _, err := filter("riscv64"); err == nil {
		t.Error("filter for riscv64: got nil, want an error")
	}
}

// The table names each call once, and only calls that some machine has.
func TestFilterTable(t *testing.T) {
	t.Parallel()
	names := kernel.Allowed()
	sorted := slices.Compact(slices.Sorted(slices.Values(names)))
	if len(sorted) != len(names) {
		t.Errorf("the table has %d names, %d of them different", len(names), len(sorted))
	}
	for _, n := range names {
		_, amd := arch.X86_64.SyscallNames[n]
		_, arm := arch.AARCH64.SyscallNames[n]
		if !amd && !arm {
			t.Errorf("%s: no machine has it", n)
		}
	}
}

func TestSetupMessage(t *testing.T) {
	t.Parallel()
	want := &boxinit.Setup{
		Layers: []boxinit.Layer{{Path: "/usr", Source: "/usr", Write: true}, {Path: "/opt/x", Source: "/y"}},
		Hide:   []string{"/a", "/b"}, RunBytes: 1, ShmBytes: 2, DiskBytes: 3, DiskInodes: 4, Processes: 5, Files: 6, Expires: 7,
		Filter: []byte{1, 2, 3}, Unprivileged: true,
	}
	b := want.Encode()
	got, err := boxinit.Decode(b)
	if err != nil || string(got.Encode()) != string(b) || got.Layers[1] != want.Layers[1] || got.Hide[1] != "/b" || got.Expires != 7 {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	for n := range b {
		if _, err := boxinit.Decode(b[:n]); err == nil {
			t.Errorf("the first %d of %d bytes: got nil, want an error", n, len(b))
		}
	}
}

// tree copies a recorded hierarchy to where it may be written.
func tree(t *testing.T, name string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(filepath.Join("testdata", name))); err != nil {
		t.Fatal(err)
	}
	return dir
}

func content(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// Version 2 has been tried on a recorded tree of plain files only.
func TestCgroupV2(t *testing.T) {
	t.Parallel()
	root := tree(t, "cgroup2")
	h, err := findHierarchy([]byte("30 1 0:26 / "+root+" rw - cgroup2 cgroup2 rw\n"), "mayfly")
	if err != nil {
		t.Fatal(err)
	}
	if got := content(t, root+"/mayfly/cgroup.subtree_control"); got != "+memory +pids +cpu" {
		t.Errorf("controllers of the parent: got %q", got)
	}
	if got := h.dirs("box"); len(got) != 1 || got[0] != root+"/mayfly/box" {
		t.Errorf("dirs: got %q", got)
	}
	// The kernel fills a new group; a directory needs help.
	v, ok := h.(v2)
	if !ok {
		t.Fatalf("got %T, want version 2", h)
	}
	for _, s := range v.settings(sandbox.Limits{Memory: 1 << 20, Pids: 10, MilliCPU: 1500}) {
		want := map[string]string{"memory.max": "1048576", "memory.swap.max": "0", "pids.max": "10", "cpu.max": "150000 100000"}[s.file]
		if s.value != want {
			t.Errorf("%s: got %q, want %q", s.file, s.value, want)
		}
		if _, err := os.Stat(root + "/mayfly/recorded/" + s.file); err != nil {
			t.Errorf("%s: the recorded group has no such file", s.file)
		}
	}
	if n, err := h.kills("recorded"); err != nil || n != 3 {
		t.Errorf("kills: got %d, %v, want 3", n, err)
	}
}

// An agent that a service manager put into the group that it delegated makes
// room there for the groups of its boxes.
func TestCgroupV2Delegated(t *testing.T) {
	t.Parallel()
	root := tree(t, "cgroup2")
	unit := root + "/system.slice/mayfly.service"
	if err := os.MkdirAll(unit+"/agent", 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(unit+"/agent/cgroup.procs", "")
	write(root+"/system.slice/cgroup.procs", "1"+strconv.Itoa(os.Getpid())+"\n") // somebody else
	write(unit+"/cgroup.procs", "1\n"+strconv.Itoa(os.Getpid())+"\n")
	if _, err := findHierarchy([]byte("30 1 0:26 / "+root+" rw - cgroup2 cgroup2 rw\n"), "system.slice/mayfly.service/abc"); err != nil {
		t.Fatal(err)
	}
	if got := content(t, unit+"/agent/cgroup.procs"); got != "0" {
		t.Errorf("the group beside the boxes': got %q, want this process to move there", got)
	}
	if got := content(t, unit+"/abc/cgroup.subtree_control"); got != "+memory +pids +cpu" {
		t.Errorf("controllers: got %q", got)
	}
	if _, err := os.Stat(root + "/system.slice/agent"); err == nil {
		t.Error("a group was made where this process is not")
	}
}

func TestCgroupV1(t *testing.T) {
	t.Parallel()
	root := tree(t, "cgroup1")
	info := ""
	for _, c := range []string{"memory", "pids", "cpu,cpuacct"} {
		info += "30 1 0:26 / " + root + "/" + c + " rw - cgroup cgroup rw," + c + "\n"
	}
	info += "30 1 0:26 / " + root + "/unified rw - cgroup2 cgroup2 rw\n" // hybrid
	h, err := findHierarchy([]byte(info), "mayfly")
	if err != nil {
		t.Fatal(err)
	}
	if got := h.dirs("box"); len(got) != 3 || got[2] != root+"/cpu,cpuacct/mayfly/box" {
		t.Errorf("dirs: got %q", got)
	}
	if n, err := h.kills("recorded"); err != nil || n != 2 {
		t.Errorf("kills: got %d, %v, want 2", n, err)
	}
	if _, err := findHierarchy([]byte("1 0 8:1 / / rw - ext4 /dev/a rw\n"), "mayfly"); !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("no hierarchy: got %v, want ErrUnsupported", err)
	}
}

func TestPrune(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	old := time.Now().Add(-baseAge - time.Hour)
	for name, at := range map[string]time.Time{"etc-current": old, "etc-old": old, "disk-old": old, "etc-young": time.Now()} {
		if err := errors.Join(os.Mkdir(filepath.Join(dir, name), 0o755), os.Chtimes(filepath.Join(dir, name), at, at)); err != nil {
			t.Fatal(err)
		}
	}
	if err := prune(dir, filepath.Join(dir, "etc-current")); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(dir + "/*")
	if err != nil || len(left) != 2 {
		t.Errorf("left: got %q, %v, want the current and the young one", left, err)
	}
}
