package containerdtest

import (
	"context"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
)

// Leaks make one thing each that Left must tell of, and return what removes it
// again.
func (d *Daemon) Leaks() []func(context.Context) (undo func() error, err error) {
	const name = "mayfly-leak"
	return []func(context.Context) (func() error, error){
		func(ctx context.Context) (func() error, error) {
			l, err := d.client.LeasesService().Create(ctx, leases.WithRandomID())
			return func() error { return d.client.LeasesService().Delete(ctx, l) }, err
		},
		func(ctx context.Context) (func() error, error) {
			s := d.client.SnapshotService("overlayfs")
			// The label keeps it from the garbage collection.
			_, err := s.Prepare(ctx, name, "", snapshots.WithLabels(map[string]string{"containerd.io/gc.root": name}))
			return func() error { return s.Remove(ctx, name) }, err
		},
	}
}
