package docker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/mount"
	"github.com/docker/docker/api/types/versions"
	"github.com/docker/docker/client"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

// minVersion of the engine API is the first with private control group
// namespaces (Docker 20.10).
const minVersion = "1.41"

// patiently calls do again while the daemon does not answer. It is for calls
// that may be repeated.
func (r *Runtime) patiently(ctx context.Context, do func() error) error {
	return engine.Patiently(ctx, r.cfg.Host, away, do)
}

// away reports that the daemon did not answer and may be on its way back.
func away(err error) bool {
	return client.IsErrConnectionFailed(err) && !errors.Is(err, os.ErrPermission)
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

func (r *Runtime) create(ctx context.Context, name string, s sandbox.Spec) (*engine.Box, error) {
	release, err := r.state.Names.Hold(ctx, name)
	if err != nil {
		return nil, err
	}
	defer release()
	if s, err = engine.Complete(ctx, s, engine.Standard{Limits: r.cfg.Limits, Image: r.cfg.Image, Runsc: r.runsc}); err != nil {
		return nil, err
	}
	template, err := r.state.Template(ctx, s.Limits)
	if err != nil {
		return nil, err
	}
	if err := r.reach(ctx); err != nil {
		return nil, err
	}
	if err := r.remapped(ctx, s.Isolation); err != nil {
		return nil, err
	}
	if err := r.state.Record(name, engine.Record{Labels: s.Labels, Expires: s.Expires, Image: s.Image}, func() { r.cfg.Trace("docker.named") }); err != nil {
		return nil, err
	}
	r.cfg.Trace("docker.recorded")
	b := r.state.NewBox(name)
	if err := r.build(ctx, b, s, template); err != nil {
		return nil, b.Fail(err)
	}
	return b, nil
}

// remapped refuses to make a container that may make namespaces and mounts, as one
// whose box has a kernel of its own, without a user namespace that this is all about.
func (r *Runtime) remapped(ctx context.Context, wall sandbox.Isolation) error {
	if wall != sandbox.GVisor {
		return nil
	}
	info, err := r.engine.Info(ctx)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(info.SecurityOptions, func(o string) bool { return strings.HasPrefix(o, "name=userns") }) {
		return fmt.Errorf("isolation %q: the daemon gives containers no user namespace, without which runsc would be root of the machine: start it with userns-remap: %w", wall, sandbox.ErrUnsupported)
	}
	return nil
}

// build makes what the record names. What it acquires is in b or found by name.
func (r *Runtime) build(ctx context.Context, b *engine.Box, s sandbox.Spec, template string) error {
	var err error
	if b.Kernel, err = engine.OpenKernel(ctx, r.runsc, s); err != nil {
		return err
	}
	disk := kernel.StartDisk(template, r.state.Dir(b.Name))
	id, err := r.container(ctx, b.Name, s)
	var derr error
	b.Disk, derr = disk()
	defer b.Disk.Detach() // the box has it, or nobody
	if err := errors.Join(err, derr); err != nil {
		return err
	}
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
	if err := b.Enter(ctx, c.State.Pid, id, s); err != nil {
		return err
	}
	r.cfg.Trace("docker.entered")
	err = b.Begin(ctx)
	r.cfg.Trace("docker.ready")
	return err
}

// container asks the engine for a container and notes that it has answered.
func (r *Runtime) container(ctx context.Context, name string, s sandbox.Spec) (string, error) {
	c, err := r.engine.ContainerCreate(ctx, r.config(s), r.hostConfig(s), nil, nil, name)
	r.cfg.Trace("docker.created")
	if err == nil || !client.IsErrConnectionFailed(err) && ctx.Err() == nil {
		if err := os.WriteFile(filepath.Join(r.state.Dir(name), answered), nil, 0o600); err != nil {
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
	args := r.state.GuestArgs(s)
	return &container.Config{
		Image: s.Image, Labels: r.state.Labels(engine.Record{Labels: s.Labels, Expires: s.Expires}),
		Hostname: engine.Host, User: "0:0", WorkingDir: "/",
		Entrypoint:  args[:1],
		Cmd:         args[1:],
		Healthcheck: &container.HealthConfig{Test: []string{"NONE"}}, // the image's would run beside the guest
		StopSignal:  "SIGKILL",                                       // the guest heeds no other, and a daemon that ends would wait for it
	}
}

// hostConfig is the container's confinement. Its own file system is read-only
// and seen by the guest only: see root.go for that of the box.
func (r *Runtime) hostConfig(s sandbox.Spec) *container.HostConfig {
	pids, no := s.Limits.Pids, false
	security := []string{"no-new-privileges", "seccomp=" + r.profile}
	if s.Isolation == sandbox.GVisor { // it brings its own filter; and the profile of containers lets nobody mount
		security = []string{"no-new-privileges", "seccomp=unconfined", "apparmor=unconfined"}
	}
	return &container.HostConfig{
		Runtime:        r.cfg.Runtime,
		NetworkMode:    "none",
		IpcMode:        container.IPCModePrivate,
		CgroupnsMode:   container.CgroupnsModePrivate,
		CapDrop:        []string{"ALL"},
		CapAdd:         engine.Capabilities(s.Isolation),
		SecurityOpt:    security,
		ReadonlyRootfs: true,
		Init:           &no,
		ShmSize:        engine.ShmBytes,
		LogConfig:      container.LogConfig{Type: "none"},
		Mounts: []mount.Mount{{
			Type: mount.TypeBind, Source: r.state.GuestDir(), Target: sandbox.Run, ReadOnly: true,
			BindOptions: &mount.BindOptions{Propagation: mount.PropagationRPrivate},
		}},
		Resources: container.Resources{
			Memory: s.Limits.Memory, MemorySwap: s.Limits.Memory, NanoCPUs: s.Limits.MilliCPU * 1e6, PidsLimit: &pids,
			Ulimits: []*container.Ulimit{{Name: "core"}},
		},
	}
}
