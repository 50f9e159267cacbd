package engine

import (
	"encoding/json"
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

// A verdict is what a filter says of a call.
type verdict struct {
	allowed bool
	errno   unix.Errno
}

// judge is the filter of the native runtime, as its rules are meant.
func judge(name string, args []uint64) verdict {
	if slices.Contains(kernel.Allowed(), name) {
		return verdict{allowed: true}
	}
	for _, r := range kernel.Rules() {
		if r.Name != name {
			continue
		}
		v := uint32(args[r.Arg])
		if r.Inner != nil && v == r.Inner.Value {
			if uint32(args[r.Inner.Arg]) == r.Inner.Required {
				return verdict{allowed: true}
			}
			return verdict{errno: r.Errno}
		}
		if r.Mask != 0 {
			v &= r.Mask
		}
		if slices.Contains(r.Values, v) != r.Except {
			return verdict{allowed: true}
		}
		return verdict{errno: r.Errno}
	}
	return verdict{errno: unix.EPERM}
}

// apply is the filter that the engine is given, as libseccomp reads it. It
// fails the test if two entries fit.
func apply(t *testing.T, calls []call, name string, args []uint64) verdict {
	t.Helper()
	fits := func(c call) bool {
		return slices.Contains(c.Names, name) && !slices.ContainsFunc(c.Args, func(a condition) bool {
			return a.Op != opMasked || args[a.Index]&a.Value != a.ValueTwo
		})
	}
	got, n := verdict{errno: unix.EPERM}, 0
	for _, c := range calls {
		if !fits(c) {
			continue
		}
		n++
		switch {
		case c.Action == actAllow:
			got = verdict{allowed: true}
		case c.Action == actErrno && c.ErrnoRet != nil:
			got = verdict{errno: *c.ErrnoRet}
		}
	}
	if n > 1 {
		t.Errorf("%s%x: %d entries fit", name, args, n)
	}
	return got
}

// What the filter of the native runtime says, that of the engine says too.
func TestFilterIsTheSame(t *testing.T) {
	t.Parallel()
	text, err := Profile("amd64")
	if err != nil {
		t.Fatal(err)
	}
	var p struct {
		DefaultAction string   `json:"defaultAction"`
		Architectures []string `json:"architectures"`
		Syscalls      []call   `json:"syscalls"`
	}
	if err := json.Unmarshal([]byte(text), &p); err != nil {
		t.Fatal(err)
	}
	if p.DefaultAction != actErrno || len(p.Architectures) != 1 {
		t.Errorf("got %q for %q, want %s for one architecture", p.DefaultAction, p.Architectures, actErrno)
	}
	values := []uint64{0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 38, 40, 0x20000, 0x20008, 0x40000, math.MaxUint32, math.MaxUint64}
	values = append(values, unix.TIOCSTI, unix.TIOCLINUX, unix.TIOCSETD, unix.TIOCGWINSZ, 1<<32|unix.TIOCSTI, 1<<32|unix.AF_VSOCK, 1<<32|unix.AF_NETLINK)
	for bit := range 33 {
		values = append(values, 1<<bit, 1<<bit|unix.TIOCSTI)
	}
	names := append(kernel.Allowed(), "mount", "ptrace", "bpf", "unshare", "io_uring_setup")
	for _, r := range kernel.Rules() {
		names = append(names, r.Name)
	}
	n := 0
	for _, name := range names {
		for _, a := range values {
			for _, c := range []uint64{0, 1, 12, 1 << 32} {
				for _, args := range [][]uint64{{a, 0, c}, {0, a, c}} {
					n++
					if got, want := apply(t, p.Syscalls, name, args), judge(name, args); got != want {
						t.Fatalf("%s%x: the engine's filter says %+v, the native %+v", name, args, got, want)
					}
				}
			}
		}
	}
	t.Logf("%d calls judged by %d entries", n, len(p.Syscalls))
	if _, err := Profile("riscv64"); err == nil {
		t.Error("profile for riscv64: got nil, want an error")
	}
}

func TestGroups(t *testing.T) {
	t.Parallel()
	const v1 = `21 20 0:1 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
22 20 0:2 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
23 20 0:3 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids
24 20 0:4 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
25 20 0:5 /docker/x /other rw - cgroup cgroup rw,memory
`
	const v2 = "21 20 0:1 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n"
	for _, c := range []struct {
		name, own, mounts string
		want              groups
	}{
		{
			"version 1", "9:memory:/docker/id\n8:cpu,cpuacct:/docker/id\n7:pids:/docker/id\n0::/\n", v1,
			groups{"/sys/fs/cgroup/memory/docker/id", "/sys/fs/cgroup/pids/docker/id", "/sys/fs/cgroup/cpu,cpuacct/docker/id"},
		},
		{"version 2", "0::/system.slice/docker-id.scope\n", v2, groups{"/sys/fs/cgroup/system.slice/docker-id.scope", "/sys/fs/cgroup/system.slice/docker-id.scope", "/sys/fs/cgroup/system.slice/docker-id.scope"}},
		{"no pids", "9:memory:/docker/id\n8:cpu,cpuacct:/docker/id\n0::/\n", v1, groups{}},
		{"nothing", "", "", groups{}},
		{"another root", "0::/../x\n", v2, groups{}},
	} {
		got, err := findGroups(c.own, c.mounts)
		if (err != nil) != (c.want == groups{}) || err == nil && got != c.want || err != nil && !errors.Is(err, sandbox.ErrUnsupported) {
			t.Errorf("%s: got %+v, %v, want %+v", c.name, got, err, c.want)
		}
	}
}

// A daemon that accepts limits and does not enforce them is found out.
func TestLimited(t *testing.T) {
	t.Parallel()
	l := sandbox.Limits{Memory: 64 << 20, Pids: 60, MilliCPU: 100}
	for _, c := range []struct {
		name  string
		files map[string]string
		ok    bool
	}{
		{"version 1", map[string]string{"memory.limit_in_bytes": "67108864\n", "pids.max": "60\n", "cpu.cfs_quota_us": "10000\n"}, true},
		{"version 2", map[string]string{"memory.max": "67108864\n", "pids.max": "60\n", "cpu.max": "10000 100000\n"}, true},
		{"no memory", map[string]string{"memory.limit_in_bytes": "9223372036854771712\n", "pids.max": "60\n", "cpu.cfs_quota_us": "10000\n"}, false},
		{"no pids", map[string]string{"memory.max": "67108864\n", "pids.max": "max\n", "cpu.max": "10000 100000\n"}, false},
		{"no cpu", map[string]string{"memory.limit_in_bytes": "67108864\n", "pids.max": "60\n", "cpu.cfs_quota_us": "-1\n"}, false},
		{"nothing", nil, false},
	} {
		dir := t.TempDir()
		for name, content := range c.files {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := (groups{dir, dir, dir}).limited(l); (err == nil) != c.ok {
			t.Errorf("%s: got %v, want enforced %v", c.name, err, c.ok)
		}
	}
}

// A process of another container, or of none, is not taken for process 1.
func TestForeignProcess(t *testing.T) {
	t.Parallel()
	const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for _, pid := range []int{os.Getpid(), 1 << 22, 1, 0} {
		if _, err := FindProcess(pid, id); !errors.Is(err, sandbox.ErrUnsupported) && !errors.Is(err, sandbox.ErrDied) {
			t.Errorf("process %d: got %v, want refused", pid, err)
		}
	}
	// This test runs in no container, and with all that root may.
	p := &Process{pid: os.Getpid(), fd: -1}
	for _, wall := range []sandbox.Isolation{sandbox.Kernel, sandbox.GVisor} {
		if err := p.confined(wall); !errors.Is(err, sandbox.ErrUnsupported) {
			t.Errorf("confined %q: got %v, want ErrUnsupported", wall, err)
		}
	}
}

// TestInstall: an agent that was killed while it wrote the guest leaves half of
// it, which the next one removes.
func TestInstall(t *testing.T) {
	dir := t.TempDir()
	half := filepath.Join(dir, unfinished+"1")
	if err := errors.Join(os.Mkdir(half, 0o700), os.WriteFile(filepath.Join(half, "guest"), []byte("ha"), 0o500)); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time it is there already
		name, err := install(dir, []byte("program"))
		if err != nil {
			t.Fatal(err)
		}
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 1 || entries[0].Name() != name {
			t.Errorf("after install: got %v, %v, want %s alone", entries, err, name)
		}
	}
}
