package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// floors are what starting something costs without us.
type floors struct {
	tool   string // test/bench/floor
	root   string // empty directory for it
	bundle string // of runc
	runsc  string // gVisor's program, for floorRunsc
	taken  map[string][]float64
	rounds int
}

const (
	floorFork = "floor: fork and exec of true"
	floorBox  = "floor: clone with all namespaces, overlay, pivot_root, true"
	floorRunc = "floor: runc run of true over a read-only /usr"

	floorRunsc = "floor: runsc run of true over the same"
)

// newFloors makes what they need below a directory of the world.
func newFloors(w *world, name string) (*floors, error) {
	dir := w.path(name)
	f := &floors{tool: w.path("tools/floor"), root: dir + "/box", bundle: dir + "/runc", taken: map[string][]float64{}}
	rootfs := filepath.Join(f.bundle, "rootfs")
	err := errors.Join(os.MkdirAll(f.root, 0o755), os.MkdirAll(rootfs+"/usr", 0o755), os.Mkdir(rootfs+"/proc", 0o755))
	for _, name := range []string{"lib", "lib64"} {
		err = errors.Join(err, os.Symlink("usr/"+name, filepath.Join(rootfs, name)))
	}
	b, jerr := json.Marshal(runcConfig())
	return f, errors.Join(err, jerr, os.WriteFile(filepath.Join(f.bundle, "config.json"), b, 0o644))
}

// runcConfig is a minimal bundle of the OCI runtime specification 1.0.2.
func runcConfig() map[string]any {
	type object = map[string]any
	var namespaces []object
	for _, kind := range []string{"pid", "network", "ipc", "uts", "mount", "cgroup"} {
		namespaces = append(namespaces, object{"type": kind})
	}
	return object{
		"ociVersion": "1.0.2",
		"process": object{
			"user": object{"uid": 0, "gid": 0}, "args": []string{"/usr/bin/true"}, "cwd": "/", "noNewPrivileges": true,
		},
		"root": object{"path": "rootfs", "readonly": true},
		"mounts": []object{
			{"destination": "/proc", "type": "proc", "source": "proc"},
			{"destination": "/usr", "type": "bind", "source": "/usr", "options": []string{"bind", "ro"}},
		},
		"linux": object{"namespaces": namespaces},
	}
}

// round does each once.
func (f *floors) round(ctx context.Context) error {
	for _, what := range []string{floorFork, floorBox, floorRunc} {
		if err := f.one(ctx, what); err != nil {
			return err
		}
	}
	return nil
}

// one does one of them once.
func (f *floors) one(ctx context.Context, what string) error {
	f.rounds++
	cmd := f.command(ctx, what)
	cmd.Stderr = os.Stderr
	took, err := timed(cmd.Run)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	f.taken[what] = append(f.taken[what], took)
	return nil
}

func (f *floors) command(ctx context.Context, what string) *exec.Cmd {
	name := fmt.Sprintf("mayfly-bench-%d-%d", os.Getpid(), f.rounds)
	switch what {
	case floorBox:
		box := exec.CommandContext(ctx, f.tool, f.root)
		id := []syscall.SysProcIDMap{{HostID: 1 << 29, Size: 65536}}
		box.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET |
				syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS | syscall.CLONE_NEWCGROUP,
			UidMappings: id, GidMappings: id, GidMappingsEnableSetgroups: true, Credential: &syscall.Credential{},
		}
		return box
	case floorRunc:
		return exec.CommandContext(ctx, "runc", "--root", f.bundle+"/state", "run", "--bundle", f.bundle, name)
	case floorRunsc:
		return exec.CommandContext(ctx, f.runsc, "--root="+f.runscState(), "--platform=systrap",
			"--network=none", "--ignore-cgroups", "run", "--bundle="+f.bundle, name)
	}
	return exec.CommandContext(ctx, "/usr/bin/true")
}

func (f *floors) runscState() string { return f.bundle + "/runsc" }

// close removes what runsc leaves mounted.
func (f *floors) close() error {
	err := unix.Unmount(f.runscState()+"/null-netns", unix.MNT_DETACH)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) { // it ran nothing
		return nil
	}
	return err
}

// forget drops the samples so far.
func (f *floors) forget() { clear(f.taken) }

func (f *floors) rows(t *table) {
	for _, what := range []string{floorFork, floorBox, floorRunc, floorRunsc} {
		if len(f.taken[what]) > 0 {
			t.info(what, "ms", f.taken[what]...)
		}
	}
}
