package containerd

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/go-digest"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

const (
	// leaseLife is how long a lease of containerd lives if nobody deletes it. It
	// is needed until the container holds the snapshot.
	leaseLife = time.Hour

	// minMajor and minMinor are the first version that the tests have seen.
	minMajor, minMinor = 1, 6
)

// labelName is the name of the box on a container, whose id is made of it.
const labelName = "ci.mayfly.name"

// id is the name of all that a box has in containerd: of no other state
// directory's, and of one that containerd takes.
func (r *Runtime) id(name string) string {
	id := r.state.ID + "-" + name
	if identifiers.Validate(id) != nil { // two hyphens, or one at the end
		sum := sha256.Sum256([]byte(name))
		id = r.state.ID + "_" + hex.EncodeToString(sum[:16])
	}
	return id
}

// patiently calls do again while the daemon does not answer. It is for calls
// that may be repeated.
func (r *Runtime) patiently(ctx context.Context, do func() error) error {
	return engine.Patiently(ctx, r.cfg.Address, away, do)
}

// away reports that the daemon did not answer and may be on its way back.
func away(err error) bool { return is(err, errdefs.IsUnavailable) }

// is says it of an error of containerd's, and of the daemon's status that becomes
// one: to turn one twice forgets what it was.
func is(err error, what func(error) bool) bool {
	return err != nil && (what(err) || what(errgrpc.ToNative(err)))
}

// reach waits for the daemon and refuses one that is too old.
func (r *Runtime) reach(ctx context.Context) (version string, err error) {
	err = r.patiently(ctx, func() error {
		v, err := r.client.Version(ctx)
		version = v.Version
		return err
	})
	if err != nil {
		return "", err
	}
	return version, recent(version)
}

// recent refuses a version that is too old, and what is none.
func recent(version string) error {
	var major, minor int
	if n, _ := fmt.Sscanf(strings.TrimPrefix(version, "v"), "%d.%d", &major, &minor); n != 2 {
		return fmt.Errorf("containerd says that its version is %q, and %d.%d or newer is needed: %w", version, minMajor, minMinor, sandbox.ErrUnsupported)
	}
	if major < minMajor || major == minMajor && minor < minMinor {
		return fmt.Errorf("containerd is %s, and %d.%d or newer is needed: %w", version, minMajor, minMinor, sandbox.ErrUnsupported)
	}
	return nil
}

// Create implements sandbox.Runtime. Each outside effect comes after the record
// of the box and is named after it, so Destroy undoes a Create that ended
// anywhere.
func (r *Runtime) Create(ctx context.Context, name string, s sandbox.Spec) (sandbox.Sandbox, error) {
	b, err := r.create(r.within(ctx), name, s)
	if err != nil {
		return nil, fmt.Errorf("containerd: box %s: %w", name, err)
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
	if _, err := r.reach(ctx); err != nil {
		return nil, err
	}
	chain, err := r.unpacked(ctx, s.Image)
	if err != nil {
		return nil, err
	}
	if err := r.state.Record(name, engine.Record{Labels: s.Labels, Expires: s.Expires, Image: s.Image}, func() { r.cfg.Trace("containerd.named") }); err != nil {
		return nil, err
	}
	r.cfg.Trace("containerd.recorded")
	b := r.state.NewBox(name)
	if err := r.build(ctx, b, s, chain, template); err != nil {
		return nil, b.Fail(err)
	}
	return b, nil
}

// build makes what the record names. What it acquires is in b or found by name.
func (r *Runtime) build(ctx context.Context, b *engine.Box, s sandbox.Spec, chain digest.Digest, template string) error {
	first, err := r.ids.Take(b.Name)
	if err == nil {
		b.Kernel, err = engine.OpenKernel(ctx, r.runsc, s)
	}
	if err != nil {
		return err
	}
	r.cfg.Trace("containerd.ids")
	disk := kernel.StartDisk(template, r.state.Dir(b.Name))
	err = r.container(ctx, b, s, chain, first)
	var derr error
	b.Disk, derr = disk()
	defer b.Disk.Detach() // the box has it, or nobody
	if err := errors.Join(err, derr); err != nil {
		return err
	}
	r.cfg.Trace("containerd.disk")
	pid, err := r.ask(ctx, b.Name, first)
	r.cfg.Trace("containerd.answered")
	if err != nil {
		return fmt.Errorf("task: %w", err)
	}
	id := r.id(b.Name)
	if _, err := r.client.TaskService().Start(ctx, &tasks.StartRequest{ContainerID: id}); err != nil {
		return fmt.Errorf("start: %w", errgrpc.ToNative(err))
	}
	r.cfg.Trace("containerd.started")
	if err := b.Enter(ctx, pid, id, s); err != nil {
		return err
	}
	r.cfg.Trace("containerd.entered")
	err = b.Begin(ctx)
	r.cfg.Trace("containerd.ready")
	return err
}

// container makes the lease, the snapshot that holds the layers, and the record
// of the container, which holds the snapshot.
func (r *Runtime) container(ctx context.Context, b *engine.Box, s sandbox.Spec, chain digest.Digest, first uint32) error {
	id := r.id(b.Name)
	labels := r.state.Labels(engine.Record{Labels: s.Labels, Expires: s.Expires})
	labels[labelName] = b.Name
	exists := func(what string, err error) error {
		if errdefs.IsAlreadyExists(err) {
			return fmt.Errorf("%s: %w: %w", what, sandbox.ErrExists, err)
		}
		return fmt.Errorf("%s: %w", what, err)
	}
	if _, err := r.client.LeasesService().Create(ctx, leases.WithID(id), leases.WithLabels(labels), leases.WithExpiration(leaseLife)); err != nil {
		return exists("lease", err)
	}
	r.cfg.Trace("containerd.leased")
	ctx = leases.WithLease(ctx, id)
	mounts, err := r.client.SnapshotService(r.cfg.Snapshotter).View(ctx, id, chain.String())
	if err != nil {
		return exists("snapshot", err)
	}
	r.cfg.Trace("containerd.snapshot")
	if b.Layers, err = layers(mounts); err != nil {
		return fmt.Errorf("snapshotter %s: %w", r.cfg.Snapshotter, err)
	}
	spec, err := typeurl.MarshalAny(r.spec(id, s, first))
	if err != nil {
		return fmt.Errorf("specification: %w", err)
	}
	_, err = r.client.ContainerService().Create(ctx, containers.Container{
		ID: id, Labels: labels, Image: s.Image, Runtime: containers.RuntimeInfo{Name: r.cfg.Runtime}, Spec: spec,
		SnapshotKey: id, Snapshotter: r.cfg.Snapshotter,
	})
	if err != nil {
		return exists("container", err)
	}
	r.cfg.Trace("containerd.created")
	return nil
}

// layers are the directories behind the mounts of a snapshot, the topmost first.
func layers(mounts []mount.Mount) ([]string, error) {
	if len(mounts) == 1 {
		switch m := mounts[0]; m.Type {
		case "bind":
			return []string{m.Source}, nil
		case "overlay":
			for _, o := range m.Options {
				if dirs, ok := strings.CutPrefix(o, "lowerdir="); ok {
					return strings.Split(dirs, ":"), nil
				}
			}
		}
	}
	return nil, fmt.Errorf("it gives %+v, and boxes are made of directories: use overlayfs or native: %w", mounts, sandbox.ErrUnsupported)
}

// rootBytes is the size of the root that a container begins with. It holds
// directories that others are mounted on.
const rootBytes = 1 << 20
