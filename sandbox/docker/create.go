package docker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/mount"
	"github.com/docker/docker/api/types/versions"
	"github.com/docker/docker/client"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

const (
	// host is the host name of every box. A warm box has no job yet, so the name
	// says nothing about one.
	host     = "mayfly"
	shmBytes = 64 << 20 // of /dev/shm; counted as memory
	maxFiles = 1 << 16  // open files of a process, where the daemon's own limit allows

	// minVersion of the engine API is the first with private control group
	// namespaces (Docker 20.10).
	minVersion = "1.41"

	// restart is how long a daemon may be away before a call that needs it gives
	// up. Only Destroy waits for longer.
	restart = 30 * time.Second
)

// patiently calls do again while the daemon does not answer. It is for calls
// that may be repeated.
func (r *Runtime) patiently(ctx context.Context, do func() error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, restart, fmt.Errorf("the daemon at %s was away for %v", r.cfg.Host, restart))
	defer cancel()
	var last error
	err := kernel.Poll(ctx, "wait for the daemon", func() (bool, error) {
		last = do()
		if client.IsErrConnectionFailed(last) && !errors.Is(last, os.ErrPermission) {
			return false, nil
		}
		return true, last
	})
	if err != nil && last != nil && !errors.Is(err, last) {
		return errors.Join(err, last)
	}
	return err
}

// reach waits for the daemon and refuses one that is too old.
func (r *Runtime) reach(ctx context.Context) error {
	if err := r.patiently(ctx, func() error { _, err := r.engine.Ping(ctx); return err }); err != nil {
		return err
	}
	r.engine.NegotiateAPIVersion(ctx)
	if v := r.engine.ClientVersion(); versions.LessThan(v, minVersion) {
		return fmt.Errorf("the daemon speaks engine API %s, and %s (Docker 20.10) is needed: %w", v, minVersion, sandbox.ErrUnsupported)
	}
	return nil
}

// Create implements sandbox.Runtime. Each outside effect comes after the record
// of the box and is named after it, so Destroy undoes a Create that ended
// anywhere.
func (r *Runtime) Create(ctx context.Context, name string, s sandbox.Spec) (sandbox.Sandbox, error) {
	b, err := r.create(ctx, name, s)
	if err != nil {
		return nil, fmt.Errorf("docker: box %s: %w", name, err)
	}
	return b, nil
}

func (r *Runtime) create(ctx context.Context, name string, s sandbox.Spec) (*box, error) {
	release, err := r.names.Hold(ctx, name)
	if err != nil {
		return nil, err
	}
	defer release()
	if s.Limits, err = kernel.Limits(s.Limits, r.cfg.Limits); err != nil {
		return nil, err
	}
	if s.Isolation != sandbox.Kernel || len(s.Mounts) > 0 {
		return nil, fmt.Errorf("isolation %q and %d mounts: %w", s.Isolation, len(s.Mounts), sandbox.ErrUnsupported)
	}
	if s.Image == "" {
		s.Image = r.cfg.Image
	}
	template, err := r.template(ctx, s.Limits)
	if err != nil {
		return nil, err
	}
	if err := r.reach(ctx); err != nil {
		return nil, err
	}
	if err := r.record(name, record{s.Labels, s.Expires, s.Image}); err != nil {
		return nil, err
	}
	b := &box{name: name}
	r.mu.Lock()
	r.boxes[name] = b
	r.mu.Unlock()
	if err := r.build(ctx, b, s, template); err != nil {
		return nil, errors.Join(err, b.kill())
	}
	return b, nil
}

// build makes what the record names. What it acquires is in b or found by name.
func (r *Runtime) build(ctx context.Context, b *box, s sandbox.Spec, template string) error {
	id, err := r.container(ctx, b.name, s)
	if err != nil {
		return err
	}
	if b.disk, err = kernel.NewDisk(template, r.dir(b.name)); err != nil {
		return err
	}
	defer b.disk.Detach() // the box has it, or nobody
	r.cfg.Trace("docker.disk")
	if err := r.engine.ContainerStart(ctx, id, container.StartOptions{}); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	r.cfg.Trace("docker.started")
	c, err := r.engine.ContainerInspect(ctx, id)
	if err != nil {
		return fmt.Errorf("inspect: %w", err)
	}
	if !c.State.Running {
		return fmt.Errorf("the guest ended with %d as it began %s: %w", c.State.ExitCode, c.State.Error, sandbox.ErrDied)
	}
	if b.process, err = findProcess(c.State.Pid, id); err != nil {
		return err
	}
	if b.groups, err = b.process.groups(); err != nil {
		return err
	}
	if err := errors.Join(b.process.confined(), b.groups.limited(s.Limits)); err != nil {
		return err
	}
	conn, err := b.enter(ctx)
	if err != nil {
		return err
	}
	r.cfg.Trace("docker.entered")
	if _, err := conn.Write([]byte{0}); err != nil { // the word that the guest waits for
		return errors.Join(fmt.Errorf("guest: %w", err), conn.Close())
	}
	b.Client, err = guest.New(ctx, conn, guest.Config{})
	r.cfg.Trace("docker.ready")
	return err
}

// container asks the engine for a container and notes that it has answered.
func (r *Runtime) container(ctx context.Context, name string, s sandbox.Spec) (string, error) {
	c, err := r.engine.ContainerCreate(ctx, r.config(s), r.hostConfig(s), nil, nil, name)
	r.cfg.Trace("docker.created")
	if err == nil || !client.IsErrConnectionFailed(err) && ctx.Err() == nil {
		if err := os.WriteFile(filepath.Join(r.dir(name), answered), nil, 0o600); err != nil {
			return "", err
		}
		r.cfg.Trace("docker.answered")
	}
	switch {
	case errdefs.IsConflict(err):
		return "", fmt.Errorf("%w: %w", sandbox.ErrExists, err)
	case errdefs.IsNotFound(err):
		return "", fmt.Errorf("image %s is not on this machine, and nothing is pulled: docker pull it first: %w: %w", s.Image, err, sandbox.ErrUnsupported)
	case err != nil && strings.Contains(err.Error(), "bind source path does not exist"):
		return "", fmt.Errorf("the daemon does not see the state directory: it has another file system, as one in a virtual machine or a container: %w: %w", err, sandbox.ErrUnsupported)
	case err != nil:
		return "", fmt.Errorf("create: %w", err)
	}
	return c.ID, nil
}

func (r *Runtime) config(s sandbox.Spec) *container.Config {
	args := []string{"listen"}
	if !s.Expires.IsZero() {
		args = append(args, strconv.FormatInt(max(s.Expires.Unix(), 1), 10))
	}
	return &container.Config{
		Image: s.Image, Labels: r.labels(record{Labels: s.Labels, Expires: s.Expires}),
		Hostname: host, User: "0:0", WorkingDir: "/",
		Entrypoint:  []string{sandbox.Run + "/" + r.program},
		Cmd:         args,
		Healthcheck: &container.HealthConfig{Test: []string{"NONE"}}, // the image's would run beside the guest
		StopSignal:  "SIGKILL",                                       // the guest heeds no other, and a daemon that ends would wait for it
	}
}

// capabilities are what tar, install, su and a package's scripts need as root.
func capabilities() []string {
	return strings.Fields("CHOWN DAC_OVERRIDE FOWNER FSETID SETUID SETGID KILL NET_BIND_SERVICE")
}

// hostConfig is the container's confinement. Its own file system is read-only
// and seen by the guest only: see root.go for that of the box.
func (r *Runtime) hostConfig(s sandbox.Spec) *container.HostConfig {
	pids, no := s.Limits.Pids, false
	return &container.HostConfig{
		Runtime:        r.cfg.Runtime,
		NetworkMode:    "none",
		IpcMode:        container.IPCModePrivate,
		CgroupnsMode:   container.CgroupnsModePrivate,
		CapDrop:        []string{"ALL"},
		CapAdd:         capabilities(),
		SecurityOpt:    []string{"no-new-privileges", "seccomp=" + r.profile},
		ReadonlyRootfs: true,
		Init:           &no,
		ShmSize:        shmBytes,
		LogConfig:      container.LogConfig{Type: "none"},
		Mounts: []mount.Mount{{
			Type: mount.TypeBind, Source: filepath.Join(r.cfg.StateDir, "guest"), Target: sandbox.Run, ReadOnly: true,
			BindOptions: &mount.BindOptions{Propagation: mount.PropagationRPrivate},
		}},
		Resources: container.Resources{
			Memory: s.Limits.Memory, MemorySwap: s.Limits.Memory, NanoCPUs: s.Limits.MilliCPU * 1e6, PidsLimit: &pids,
			Ulimits: []*container.Ulimit{{Name: "core"}},
		},
	}
}
