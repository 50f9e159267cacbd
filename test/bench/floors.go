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
	"time"
)

// floors are what starting something costs without us.
type floors struct {
	tool   string // test/bench/floor
	root   string // empty directory for it
	bundle string // of runc
	taken  map[string][]float64
	rounds int
}

const (
	floorFork = "floor: fork and exec of true"
	floorBox  = "floor: clone with all namespaces, overlay, pivot_root, true"
	floorRunc = "floor: runc run of true over a read-only /usr"
)

func newFloors(w *world) (*floors, error) {
	f := &floors{tool: w.path("tools/floor"), root: w.path("floor"), bundle: w.path("runc"), taken: map[string][]float64{}}
	rootfs := filepath.Join(f.bundle, "rootfs")
	err := errors.Join(os.Mkdir(f.root, 0o755), os.MkdirAll(rootfs+"/usr", 0o755), os.Mkdir(rootfs+"/proc", 0o755))
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
	f.rounds++
	box := exec.CommandContext(ctx, f.tool, f.root)
	id := []syscall.SysProcIDMap{{HostID: 1 << 29, Size: 65536}}
	box.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET |
			syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS | syscall.CLONE_NEWCGROUP,
		UidMappings: id, GidMappings: id, GidMappingsEnableSetgroups: true, Credential: &syscall.Credential{},
	}
	name := fmt.Sprintf("mayfly-bench-%d-%d", os.Getpid(), f.rounds)
	for _, c := range []struct {
		what string
		cmd  *exec.Cmd
	}{
		{floorFork, exec.CommandContext(ctx, "/usr/bin/true")},
		{floorBox, box},
		{floorRunc, exec.CommandContext(ctx, "runc", "--root", f.bundle+"/state", "run", "--bundle", f.bundle, name)},
	} {
		c.cmd.Stderr = os.Stderr
		start := time.Now()
		if err := c.cmd.Run(); err != nil {
			return fmt.Errorf("%s: %w", c.what, err)
		}
		f.taken[c.what] = append(f.taken[c.what], ms(time.Since(start)))
	}
	return nil
}

// forget drops the samples so far.
func (f *floors) forget() { clear(f.taken) }

func (f *floors) rows(t *table) {
	for _, what := range []string{floorFork, floorBox, floorRunc} {
		t.info(what, "ms", f.taken[what]...)
	}
}
