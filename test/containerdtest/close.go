package containerdtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// groupPrefix begins the names of the control groups of boxes.
const groupPrefix = "mayfly-"

// Close ends the daemon and removes all that it and its containers have on the
// machine.
func (d *Daemon) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	groups := d.groups("")
	err := d.Stop(ctx)
	if err != nil {
		err = errors.Join(err, d.Kill(ctx))
	}
	err = errors.Join(err, d.client.Close(), d.killAll(ctx))
	for _, m := range slices.Backward(d.mounts()) {
		err = errors.Join(err, unix.Unmount(m, unix.MNT_DETACH))
	}
	for _, g := range groups {
		if removeErr := os.Remove(g); removeErr != nil && !errors.Is(removeErr, os.ErrNotExist) {
			err = errors.Join(err, removeErr)
		}
	}
	if err := errors.Join(err, os.RemoveAll(d.dir)); err != nil {
		return fmt.Errorf("containerdtest: %w", err)
	}
	return nil
}

// Left is what the daemon's containers have on the machine: containers, tasks,
// snapshots of no image and leases that the daemon knows; and processes, mounts,
// bundles and control groups, of which it may know nothing. id is what the names
// of the control groups have in them, which are not the daemon's alone.
func (d *Daemon) Left(ctx context.Context, id string) ([]string, error) {
	var left []string
	containers, err := d.client.ContainerService().List(ctx)
	for _, c := range containers {
		left = append(left, "container "+c.ID)
	}
	all, taskErr := d.client.TaskService().List(ctx, &tasks.ListTasksRequest{})
	for _, t := range all.GetTasks() {
		left = append(left, "task "+t.ID+" "+t.Status.String())
	}
	held, leaseErr := d.client.LeasesService().List(ctx)
	for _, l := range held {
		left = append(left, "lease "+l.ID)
	}
	walkErr := d.client.SnapshotService("overlayfs").Walk(ctx, func(_ context.Context, s snapshots.Info) error {
		if s.Kind != snapshots.KindCommitted {
			left = append(left, "snapshot "+s.Name)
		}
		return nil
	})
	if err := errors.Join(err, taskErr, leaseErr, walkErr); err != nil {
		return nil, fmt.Errorf("containerdtest: %w", err)
	}
	for _, m := range d.mounts() {
		left = append(left, "mount "+m)
	}
	for _, g := range d.groups(id) {
		left = append(left, "control group "+g)
	}
	for pid, args := range d.processes() {
		if strings.Contains(args, "shim") {
			left = append(left, fmt.Sprintf("process %d %s", pid, args))
		}
	}
	bundles, _ := filepath.Glob(filepath.Join(d.file("state"), "io.containerd.runtime.v2.task", "*", "*")) // the pattern is well formed
	return append(left, bundles...), nil
}

// mounts are mount points below the directory of the daemon, outer first.
func (d *Daemon) mounts() []string {
	info, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	var out []string
	for line := range strings.Lines(string(info)) {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], d.dir+"/") {
			out = append(out, f[4])
		}
	}
	return out
}

// groups are control groups of boxes: those whose names have id in them, or those
// of processes of this daemon.
func (d *Daemon) groups(id string) []string {
	if id == "" {
		var out []string
		for pid := range d.processes() {
			for _, child := range children(pid) {
				out = append(out, groupsOf(child)...)
			}
		}
		return out
	}
	old, _ := filepath.Glob("/sys/fs/cgroup/*/" + groupPrefix + id + "*") // the pattern is well formed
	unified, _ := filepath.Glob("/sys/fs/cgroup/" + groupPrefix + id + "*")
	return append(old, unified...)
}

// groupsOf are those of a process, if it is in a box.
func groupsOf(pid int) (out []string) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid)) // it may have ended
	for line := range strings.Lines(string(b)) {
		_, path, _ := strings.Cut(strings.TrimSpace(line), ":/")
		if strings.HasPrefix(path, groupPrefix) {
			for _, root := range []string{"/sys/fs/cgroup/*/", "/sys/fs/cgroup/"} {
				found, _ := filepath.Glob(root + path)
				out = append(out, found...)
			}
		}
	}
	return out
}

// processes are those that have the directory of the daemon in their arguments,
// which are the daemon and the parents of containers.
func (d *Daemon) processes() map[int]string {
	out := map[int]string{}
	dirs, _ := filepath.Glob("/proc/[0-9]*") // the pattern is well formed
	for _, dir := range dirs {
		args, _ := os.ReadFile(dir + "/cmdline") // it may have ended
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err == nil && strings.Contains(string(args), d.dir+"/") {
			out[pid] = strings.ReplaceAll(string(args), "\x00", " ")
		}
	}
	delete(out, os.Getpid())
	return out
}

// killAll kills what the daemon left behind, and waits. A parent does not take
// its container with it.
func (d *Daemon) killAll(ctx context.Context) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		all := d.processes()
		if len(all) == 0 {
			return nil
		}
		for pid := range all {
			for _, child := range children(pid) {
				_ = syscall.Kill(child, syscall.SIGKILL) // it may have ended
			}
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("left by containerd: %v", all)
		case <-tick.C:
		}
	}
}

// children of a process.
func children(pid int) (out []int) {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid)) // it may have ended
	for _, file := range files {
		b, _ := os.ReadFile(file)
		for word := range strings.FieldsSeq(string(b)) {
			if child, err := strconv.Atoi(word); err == nil {
				out = append(out, child)
			}
		}
	}
	return out
}

// DeleteLease deletes the lease of that name, if there is one, and waits for the
// garbage collection.
func (d *Daemon) DeleteLease(ctx context.Context, id string) error {
	err := d.client.LeasesService().Delete(ctx, leases.Lease{ID: id}, leases.SynchronousDelete)
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// Collect has the garbage collected, which the daemon does in its own time: what
// it lists no longer may be on disk until then.
func (d *Daemon) Collect(ctx context.Context) error {
	l, err := d.client.LeasesService().Create(ctx, leases.WithRandomID())
	if err == nil {
		err = d.client.LeasesService().Delete(ctx, l, leases.SynchronousDelete)
	}
	if err != nil {
		return fmt.Errorf("containerdtest: collect: %w", err)
	}
	return nil
}
