package dockertest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"
	"github.com/docker/docker/api/types/volume"
	"golang.org/x/sys/unix"
)

// Close ends the daemon and removes all that it and its containers have on the
// machine.
func (d *Daemon) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	err := d.Stop(ctx)
	if err != nil {
		err = errors.Join(err, d.Kill(ctx))
	}
	err = errors.Join(err, d.engine.Close(), d.killAll(ctx), d.net.Close())
	for _, m := range slices.Backward(d.mounts()) {
		err = errors.Join(err, unix.Unmount(m, unix.MNT_DETACH))
	}
	for _, dir := range slices.Backward(d.groups()) {
		err = errors.Join(err, os.Remove(dir))
	}
	if err := errors.Join(err, os.RemoveAll(d.dir)); err != nil {
		return fmt.Errorf("dockertest: %w", err)
	}
	return nil
}

// Left is what the daemon's containers have on the machine: containers,
// networks and volumes that the daemon knows; and processes, control groups,
// mounts and network namespaces, of which it may know nothing.
func (d *Daemon) Left(ctx context.Context) ([]string, error) {
	var left []string
	containers, err := d.engine.ContainerList(ctx, container.ListOptions{All: true})
	for _, c := range containers {
		left = append(left, "container "+strings.Join(c.Names, " ")+" "+c.State)
	}
	volumes, volumeErr := d.engine.VolumeList(ctx, volume.ListOptions{})
	for _, v := range volumes.Volumes {
		left = append(left, "volume "+v.Name)
	}
	networks, networkErr := d.engine.NetworkList(ctx, network.ListOptions{})
	for _, n := range networks {
		if !slices.Contains([]string{"none", "host", "bridge"}, n.Name) {
			left = append(left, "network "+n.Name)
		}
	}
	if err := errors.Join(err, volumeErr, networkErr); err != nil {
		return nil, fmt.Errorf("dockertest: %w", err)
	}
	for _, m := range d.mounts() {
		if m != d.data() { // the daemon binds it to itself
			left = append(left, "mount "+m)
		}
	}
	for _, g := range d.groups() {
		if filepath.Base(g) != d.parent {
			left = append(left, "control group "+g)
		}
	}
	for pid, args := range d.processes() {
		if strings.Contains(args, "shim") {
			left = append(left, fmt.Sprintf("process %d %s", pid, args))
		}
	}
	if n := len(d.layers()); n > d.snapshots {
		left = append(left, fmt.Sprintf("%d layers in containerd", n-d.snapshots))
	}
	for _, kind := range []string{"overlay2", "containers", "volumes"} {
		entries, err := os.ReadDir(filepath.Join(d.data(), kind))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("dockertest: %w", err)
		}
		for _, e := range entries {
			if e.IsDir() && kind != "overlay2" || strings.HasSuffix(e.Name(), "-init") {
				left = append(left, kind+"/"+e.Name())
			}
		}
	}
	return left, nil
}

// layers are those that containerd has, of images and of containers, if it has
// any at all.
func (d *Daemon) layers() []string {
	found, _ := filepath.Glob(d.data() + "/containerd/daemon/io.containerd.snapshotter.v1.overlayfs/snapshots/*") // the pattern is well formed
	return found
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

// groups are the control groups of the daemon, outer first.
func (d *Daemon) groups() []string {
	var out []string
	for _, pattern := range []string{"/sys/fs/cgroup/*/" + d.parent, "/sys/fs/cgroup/" + d.parent} {
		roots, _ := filepath.Glob(pattern) // the pattern is well formed
		for _, root := range roots {
			_ = filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
				if err == nil && e.IsDir() {
					out = append(out, path)
				}
				return nil // of a group that has gone meanwhile nothing is left
			})
		}
	}
	return out
}

// processes are those that have the directory of the daemon in their arguments,
// which are the daemon, its containerd and the parents of containers; and those
// in its control groups.
func (d *Daemon) processes() map[int]string {
	out := map[int]string{}
	dirs, _ := filepath.Glob("/proc/[0-9]*") // the pattern is well formed
	for _, dir := range dirs {
		args, _ := os.ReadFile(dir + "/cmdline") // it may have ended
		groups, _ := os.ReadFile(dir + "/cgroup")
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err == nil && (strings.Contains(string(args), d.dir+"/") || strings.Contains(string(groups), d.parent)) {
			out[pid] = strings.ReplaceAll(string(args), "\x00", " ")
		}
	}
	delete(out, os.Getpid())
	return out
}

// killAll kills what the daemon left behind, and waits.
func (d *Daemon) killAll(ctx context.Context) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		all := d.processes()
		if len(all) == 0 {
			return nil
		}
		for pid := range all {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("left by dockerd: %v", all)
		case <-tick.C:
		}
	}
}
