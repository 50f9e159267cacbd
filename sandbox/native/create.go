package native

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/gvisor"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
	"github.com/mayfly-ci/mayfly/sandbox/native/boxinit"
)

const (
	runBytes = 64 << 20 // of /run/mayfly; counted as memory
	shmBytes = 64 << 20 // of /dev/shm; counted as memory
	// tmpfsInodes are added to those of an unprivileged box for what it starts
	// with, and are a little fewer, so that it never may make more than its limit.
	tmpfsInodes = 100
	// ownInodes are those of the file system and of the skeleton.
	ownInodes = 128
	maxFiles  = 1 << 16 // open files of a process, where the agent's own limit allows
)

// namespaces of a box: all that Linux has but time.
const namespaces = unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET |
	unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP

// Create implements sandbox.Runtime. Each outside effect comes after the record of
// the box and is named after it, so Destroy undoes a Create that ended anywhere.
func (r *Runtime) Create(ctx context.Context, name string, s sandbox.Spec) (sandbox.Sandbox, error) {
	limits, err := kernel.Limits(s.Limits, r.cfg.Limits)
	if err != nil {
		return nil, fmt.Errorf("native: box %s: %w", name, err)
	}
	s.Limits = limits
	if s.Image != "" && r.images == nil {
		return nil, fmt.Errorf("native: image %s: %w", s.Image, errNoImages)
	}
	if err := kernel.CheckMounts(s.Mounts); err != nil {
		return nil, fmt.Errorf("native: %w", err)
	}
	b, err := r.newBox(ctx, name, s.Isolation)
	if err != nil {
		return nil, fmt.Errorf("native: box %s: %w", name, err)
	}
	defer b.made()
	base, err := r.base(ctx, s.Limits)
	if err != nil {
		return nil, fmt.Errorf("native: %w", err)
	}
	release, err := r.names.Hold(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("native: %w", err)
	}
	defer release()
	if err := r.record(name, s); err != nil {
		return nil, err
	}
	r.mu.Lock()
	r.boxes[name] = b
	r.mu.Unlock()
	if err := r.build(ctx, b, s, base); err != nil {
		return nil, fmt.Errorf("native: box %s: %w", name, errors.Join(err, b.complained(), b.kill()))
	}
	return b, nil
}

// A base is what boxes are built from.
type base struct {
	etc      string // directory
	template string // disk file; empty if unprivileged
}

// etcAge is how long a box's /etc may lag behind the host's. Looking for a
// change takes some milliseconds.
const etcAge = time.Minute

// base makes what is missing of it.
func (r *Runtime) base(ctx context.Context, l sandbox.Limits) (base, error) {
	r.baseMu.Lock()
	defer r.baseMu.Unlock()
	dir := filepath.Join(r.cfg.StateDir, "base")
	if time.Since(r.etcSeen) > etcAge {
		etc, err := baseEtc(dir)
		if err != nil {
			return base{}, err
		}
		r.etc, r.etcSeen = etc, time.Now()
		if err := prune(dir, etc); err != nil {
			return base{}, err
		}
	}
	if r.cfg.Unprivileged {
		return base{etc: r.etc}, nil
	}
	file, err := kernel.Template{Dir: dir, Version: version, Skeleton: boxinit.Skeleton, Own: ownInodes}.Make(ctx, l.Disk, l.Inodes)
	return base{etc: r.etc, template: file}, err
}

// build makes the box. What it acquires is in b or found by name.
func (r *Runtime) build(ctx context.Context, b *box, s sandbox.Spec, from base) error {
	first, err := r.ids.Take(b.name)
	if err != nil {
		return err
	}
	b.first = first
	r.cfg.Trace("native.ids")
	disk := func() (*kernel.Disk, error) { return nil, nil }
	if !r.cfg.Unprivileged {
		disk = kernel.StartDisk(from.template, r.dir(b.name))
	}
	far, err := r.begin(b, s.Limits, first)
	var derr error
	b.disk, derr = disk()
	defer b.disk.Detach() // the box has it, or nobody
	err = errors.Join(err, derr)
	setup := r.plan(s, from.etc)
	var fds []int
	if err == nil && !r.cfg.Unprivileged { // the guest makes its network meanwhile
		fds, err = r.mounts(ctx, b, s.Image, setup)
		defer func() {
			for _, fd := range fds {
				_ = unix.Close(fd) // sent, or of no use
			}
		}()
		r.cfg.Trace("native.disk")
	}
	if err == nil && b.runsc != nil {
		setup.Platform = r.runsc.Platform()
		setup.Bundle, err = bundle(setup)
	}
	if err == nil {
		err = far.send(setup.Encode(), b.withDisk(fds))
	}
	if err != nil {
		return errors.Join(err, far.close())
	}
	r.cfg.Trace("native.sent")
	sockets, err := far.receive(ctx)
	if err != nil {
		return errors.Join(err, far.close())
	}
	b.sockets = sockets
	r.cfg.Trace("native.ready")
	b.Client, err = guest.New(ctx, far.control, guest.Config{})
	if b.runsc != nil {
		b.keeper = far.setup // whose end is the box's
		return err
	}
	return errors.Join(err, far.setup.Close())
}

// begin makes the control groups and starts the guest in them.
func (r *Runtime) begin(b *box, l sandbox.Limits, first uint32) (*sockets, error) {
	if r.groups != nil {
		if err := r.groups.make(b.name, l); err != nil {
			return nil, err
		}
		r.cfg.Trace("native.cgroup")
	}
	far, err := r.start(b, first)
	if err == nil {
		r.cfg.Trace("native.started")
	}
	return far, err
}

// plan is the Setup of a box. An unprivileged box cannot change its base:
// it has one user id, and none of the base's files is owned by it.
func (r *Runtime) plan(s sandbox.Spec, etc string) *boxinit.Setup {
	if s.Image != "" {
		return r.planImage(s)
	}
	write := !r.cfg.Unprivileged
	layers := []boxinit.Layer{{Path: "/usr", Source: "/usr", Write: write}, {Path: "/etc", Source: etc, Write: write}}
	const packages = "/var/lib/dpkg"
	if _, err := os.Stat(packages); err == nil {
		layers = append(layers, boxinit.Layer{Path: packages, Source: packages, Write: write})
	}
	for _, p := range r.cfg.Base {
		layers = append(layers, boxinit.Layer{Path: p, Source: p})
	}
	layers = append(layers, mountsOf(s)...)
	setup := &boxinit.Setup{
		Unprivileged: r.cfg.Unprivileged,
		Layers:       layers,
		Hide:         append([]string{"/usr/local/etc"}, r.cfg.Hide...),
		RunBytes:     runBytes, ShmBytes: shmBytes, Files: maxFiles,
		Filter: r.filter,
	}
	if r.cfg.Unprivileged {
		setup.DiskBytes, setup.DiskInodes = uint64(s.Limits.Disk), uint64(s.Limits.Inodes)+tmpfsInodes
		setup.Processes = uint64(s.Limits.Pids)
	}
	setup.Expires = expires(s)
	return setup
}

// mountsOf are the directories of the host that a box sees beside its base.
func mountsOf(s sandbox.Spec) []boxinit.Layer {
	var layers []boxinit.Layer
	for _, m := range s.Mounts {
		layers = append(layers, boxinit.Layer{Path: m.Target, Source: m.Source, Mount: true})
	}
	return layers
}

// expires is when the guest ends itself, in seconds; 0 is never.
func expires(s sandbox.Spec) uint64 {
	if s.Expires.IsZero() {
		return 0
	}
	return uint64(max(s.Expires.Unix(), 1))
}

// start starts the guest in its namespaces and control groups.
func (r *Runtime) start(b *box, first uint32) (*sockets, error) {
	near, guestEnds, err := socketPairs()
	if err != nil {
		return nil, err
	}
	// One slot for each descriptor, up to the program's own.
	files := make([]*os.File, boxinit.RunscFD+1)
	copy(files[boxinit.ControlFD:], guestEnds)
	if r.cfg.Unprivileged {
		life, err := r.lockLife(b.name)
		if err != nil {
			return nil, errors.Join(err, near.close(), closeAll(guestEnds))
		}
		files[boxinit.LifeFD], guestEnds = life, append(guestEnds, life)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, errors.Join(err, near.close(), closeAll(guestEnds))
	}
	files[0], files[1], files[2], files[boxinit.GuestFD] = null, null, null, r.guest
	if b.runsc != nil {
		if b.complaint, err = gvisor.NewComplaint(); err != nil {
			return nil, errors.Join(err, near.close(), closeAll(append(guestEnds, null)))
		}
		files[2], files[boxinit.RunscFD] = b.complaint, b.runsc
	}
	run := func(attr *syscall.SysProcAttr) error {
		r.namespace(attr, first)
		b.process, err = os.StartProcess("/proc/self/fd/"+strconv.Itoa(boxinit.GuestFD),
			[]string{"mayfly-guest", "box"}, &os.ProcAttr{Dir: "/", Env: []string{}, Files: files, Sys: attr})
		return err
	}
	if r.groups != nil {
		err = r.groups.spawn(b.name, run)
	} else {
		err = run(&syscall.SysProcAttr{})
	}
	err = errors.Join(err, closeAll(append(guestEnds, null)))
	if b.process != nil {
		go b.reap()
		if r.cfg.Unprivileged {
			err = errors.Join(err, r.recordProcess(b.name, b.process.Pid))
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start the guest: %w", err), near.close())
	}
	return near, nil
}

// namespace maps the ids of the box: the whole range as root, and otherwise
// only the user who runs the agent, whom the kernel lets map himself.
func (r *Runtime) namespace(attr *syscall.SysProcAttr, first uint32) {
	attr.Cloneflags = namespaces
	attr.Setsid = true
	attr.Credential = &syscall.Credential{NoSetGroups: r.cfg.Unprivileged}
	if r.cfg.Unprivileged {
		attr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Geteuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getegid(), Size: 1}}
		return
	}
	attr.UidMappings = []syscall.SysProcIDMap{{HostID: int(first), Size: kernel.Span}}
	attr.GidMappings = attr.UidMappings
	attr.GidMappingsEnableSetgroups = true
}

// mounts makes the layers, mapped to the ids of the box as the disk is from now
// on, and says in the setup how many of them are the image's.
func (r *Runtime) mounts(ctx context.Context, b *box, ref string, setup *boxinit.Setup) (fds []int, err error) {
	ns, err := os.Open("/proc/" + strconv.Itoa(b.process.Pid) + "/ns/user")
	if err != nil {
		return nil, fmt.Errorf("user namespace: %w", err)
	}
	defer ns.Close() // the mounts have their own
	if err := kernel.IDMap(b.disk.Mount, 0, ns); err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	if ref != "" {
		err := r.images.Layers(ctx, ref, func(dirs []string) (err error) {
			setup.Image = uint64(len(dirs))
			fds, err = lend(fds, dirs, ns)
			return err
		})
		if err != nil {
			return fds, err
		}
	}
	for _, l := range setup.Layers {
		if !l.Mount {
			if fds, err = lend(fds, []string{l.Source}, ns); err != nil {
				return fds, err
			}
			continue
		}
		fd, err := kernel.OpenMount(l.Source, ns)
		if err != nil {
			return fds, err
		}
		fds = append(fds, fd)
	}
	return fds, nil
}

// lend adds a mount of each directory to fds, read-only and mapped to the ids of
// a box.
func lend(fds []int, dirs []string, ns *os.File) ([]int, error) {
	for _, dir := range dirs {
		fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return fds, fmt.Errorf("layer %s: %w", dir, err)
		}
		fds = append(fds, fd)
		if err := kernel.IDMap(fd, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV, ns); err != nil {
			return fds, fmt.Errorf("layer %s: %w", dir, err)
		}
	}
	return fds, nil
}

// closeAll closes files that were handed on.
func closeAll(files []*os.File) error {
	var all error
	for _, f := range files {
		all = errors.Join(all, f.Close())
	}
	return all
}

// startTime is when a process started, in clock ticks since boot: with its
// pid it names the process for ever (proc_pid_stat(5), field 22).
func startTime(pid int) (string, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return "", err
	}
	_, rest, _ := strings.Cut(string(b), ") ") // the guest's own name has no ")"
	fields := strings.Fields(rest)
	if len(fields) > 0 && fields[0] == "Z" {
		return "", fmt.Errorf("process %d has ended", pid)
	}
	if len(fields) < 20 {
		return "", fmt.Errorf("stat of process %d is malformed", pid)
	}
	return fields[19], nil
}
