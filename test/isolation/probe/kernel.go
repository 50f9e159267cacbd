package main

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kernel are calls that a box has no use for.
func kernel() map[string]probe {
	calls := map[string]func() error{
		"unshare": func() error { return unix.Unshare(unix.CLONE_NEWUTS) },
		"userns":  func() error { return child(unix.CLONE_NEWUSER) },
		"clone":   func() error { return child(unix.CLONE_NEWUTS) },
		"setns":   setns,
		"mount":   func() error { return unix.Mount("probe", "/mnt", "tmpfs", 0, "") },
		"bind":    func() error { return unix.Mount("/proc/sys", "/mnt", "", unix.MS_BIND|unix.MS_REC, "") },
		"remount": func() error { return unix.Mount("", "/proc", "", unix.MS_REMOUNT, "") },
		"chroot":  func() error { return unix.Chroot("/") },
		"fsopen":  func() error { return closing(unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)) },
		"opentree": func() error {
			return closing(unix.OpenTree(unix.AT_FDCWD, "/", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC))
		},
		"mknod": mknod,
		"bpf":   bpf,
		"keyctl": func() error {
			_, err := unix.AddKey("user", "probe", []byte("x"), unix.KEY_SPEC_PROCESS_KEYRING)
			return err
		},
		"io_uring":    func() error { p := make([]byte, 120); return closing(call3(unix.SYS_IO_URING_SETUP, 1, &p[0], 0)) },
		"perf":        perf,
		"userfaultfd": func() error { return closing(call3(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, nil, 0)) },
		"fanotify":    func() error { return closing(unix.FanotifyInit(unix.FAN_CLASS_NOTIF|unix.FAN_CLOEXEC, unix.O_RDONLY)) },
		"modify_ldt":  func() error { _, err := call3(sysModifyLdt, 0, new(byte), 1); return err },
		"hostname":    func() error { return unix.Sethostname([]byte("probe")) },
		"kcmp": func() error {
			_, _, e := unix.Syscall6(unix.SYS_KCMP, uintptr(os.Getpid()), uintptr(os.Getpid()), 0, 0, 0, 0)
			return errno(e)
		},
		"sysctl": func() error {
			return os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 0"), 0)
		},
		"int80":   int80,
		"tiocsti": terminal,
	}
	table := map[string]probe{}
	for name, f := range calls {
		table[name] = probe{0, func([]string) error {
			runtime.LockOSThread() // what it changes ends with the process
			return f()
		}}
	}
	return table
}

func errno(e unix.Errno) error {
	if e != 0 {
		return e
	}
	return nil
}

func call3(number uintptr, a int, b *byte, c int) (int, error) {
	r, _, e := unix.Syscall(number, uintptr(a), uintptr(unsafe.Pointer(b)), uintptr(c))
	return int(r), errno(e)
}

// closing ends a call whose result is a descriptor.
func closing(fd int, err error) error {
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func setns() error {
	f, err := os.Open("/proc/self/ns/uts")
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Setns(int(f.Fd()), unix.CLONE_NEWUTS)
}

// mknod makes the device of a disk.
func mknod() error {
	const p = "/tmp/mayfly-probe-device"
	if err := unix.Mknod(p, unix.S_IFBLK|0o600, int(unix.Mkdev(7, 0))); err != nil {
		return err
	}
	return os.Remove(p)
}

// bpf makes an array of one element: BPF_MAP_CREATE (bpf(2)).
func bpf() error {
	attr := struct{ kind, key, value, entries, flags uint32 }{2, 4, 4, 1, 0}
	r, _, e := unix.Syscall(unix.SYS_BPF, unix.BPF_MAP_CREATE, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if e != 0 {
		return e
	}
	return unix.Close(int(r))
}

// perf counts page faults of this process.
func perf() error {
	attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_SOFTWARE, Config: unix.PERF_COUNT_SW_PAGE_FAULTS, Bits: unix.PerfBitExcludeKernel | unix.PerfBitExcludeHv}
	attr.Size = uint32(unsafe.Sizeof(attr))
	return closing(unix.PerfEventOpen(&attr, 0, -1, -1, unix.PERF_FLAG_FD_CLOEXEC))
}
