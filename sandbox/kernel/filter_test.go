package kernel

import (
	"slices"
	"syscall"
	"testing"

	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// verdict runs the filter on a call, as the kernel does.
func verdict(t *testing.T, info *arch.Info, nr, machine uint32, args ...uint64) uint32 {
	t.Helper()
	raw, err := Filter(info.Name)
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
	if _, err := Filter("riscv64"); err == nil {
		t.Error("filter for riscv64: got nil, want an error")
	}
}

// The table names each call once, and only calls that some machine has.
func TestFilterTable(t *testing.T) {
	t.Parallel()
	names := Allowed()
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
