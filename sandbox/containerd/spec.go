package containerd

import (
	"fmt"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

const (
	period = 100_000 // of CPU accounting in microseconds, the kernel's default

	// version of the specification (github.com/opencontainers/runtime-spec) that
	// has all that is used, so that an older OCI runtime takes it too.
	version = "1.0.2"
)

// spec is the container's confinement. Its root is an empty directory, seen by
// the guest only: see sandbox/engine for that of the box.
func (r *Runtime) spec(id string, s sandbox.Spec, first uint32) *specs.Spec {
	var capabilities []string
	for _, c := range engine.Capabilities(s.Isolation) {
		capabilities = append(capabilities, "CAP_"+c)
	}
	files := uint64(engine.MaxFiles)
	var own unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &own); err == nil { // it cannot fail
		files = min(files, own.Max)
	}
	filter := r.seccomp
	if s.Isolation == sandbox.GVisor { // it brings its own
		filter = nil
	}
	ids := []specs.LinuxIDMapping{{HostID: first, Size: kernel.Span}}
	return &specs.Spec{
		Version:  version,
		Hostname: engine.Host,
		Root:     &specs.Root{Path: "rootfs"},
		Process: &specs.Process{
			Args: r.state.GuestArgs(s), Cwd: "/", NoNewPrivileges: true,
			// None is inheritable, nor ambient: a user that is not root has none.
			Capabilities: &specs.LinuxCapabilities{Bounding: capabilities, Permitted: capabilities, Effective: capabilities},
			Rlimits:      []specs.POSIXRlimit{{Type: "RLIMIT_CORE"}, {Type: "RLIMIT_NOFILE", Hard: files, Soft: files}},
		},
		Mounts: r.mounts(),
		Linux: &specs.Linux{
			UIDMappings: ids, GIDMappings: ids,
			Namespaces: namespaceTypes(),
			Resources:  resources(s.Limits),
			// One of its own below the root of each hierarchy: a parent for all
			// would stay.
			CgroupsPath:   "/mayfly-" + id,
			Seccomp:       filter,
			MaskedPaths:   maskedPaths(),
			ReadonlyPaths: strings.Fields("/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger"),
		},
	}
}

func namespaceTypes() (all []specs.LinuxNamespace) {
	for _, t := range []specs.LinuxNamespaceType{
		specs.UserNamespace, specs.MountNamespace, specs.PIDNamespace, specs.NetworkNamespace,
		specs.IPCNamespace, specs.UTSNamespace, specs.CgroupNamespace,
	} {
		all = append(all, specs.LinuxNamespace{Type: t})
	}
	return all
}

func resources(l sandbox.Limits) *specs.LinuxResources {
	quota, cycle := l.MilliCPU*period/1000, uint64(period)
	return &specs.LinuxResources{
		Devices: []specs.LinuxDeviceCgroup{{Access: "rwm"}}, // none but the runtime's own
		Memory:  &specs.LinuxMemory{Limit: &l.Memory, Swap: &l.Memory},
		CPU:     &specs.LinuxCPU{Quota: &quota, Period: &cycle},
		Pids:    &specs.LinuxPids{Limit: &l.Pids},
	}
}

// maskedPaths tell of the machine, or do something to it.
func maskedPaths() []string {
	return strings.Fields(`/proc/acpi /proc/asound /proc/interrupts /proc/kcore /proc/keys /proc/latency_stats
/proc/sched_debug /proc/scsi /proc/timer_list /proc/timer_stats /sys/devices/virtual/powercap /sys/firmware`)
}

// mounts are the usual ones of a container, and the guest program, until the
// box has a root.
func (r *Runtime) mounts() []specs.Mount {
	const quiet = "nosuid,noexec,nodev"
	mount := func(kind, at, source, options string) specs.Mount {
		return specs.Mount{Type: kind, Destination: at, Source: source, Options: strings.Split(options, ",")}
	}
	return []specs.Mount{
		mount("proc", "/proc", "proc", quiet),
		mount("tmpfs", "/dev", "tmpfs", "nosuid,strictatime,mode=755,size=65536k"),
		mount("devpts", "/dev/pts", "devpts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5"),
		mount("tmpfs", "/dev/shm", "shm", fmt.Sprintf("%s,mode=1777,size=%d", quiet, engine.ShmBytes)),
		mount("mqueue", "/dev/mqueue", "mqueue", quiet),
		mount("sysfs", "/sys", "sysfs", quiet+",ro"),
		mount("cgroup", "/sys/fs/cgroup", "cgroup", quiet+",relatime,ro"),
		mount("bind", sandbox.Run, r.state.GuestDir(), "rbind,rprivate,ro,nosuid,nodev"),
	}
}
