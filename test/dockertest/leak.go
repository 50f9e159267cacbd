package dockertest

import (
	"context"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/network"
	"github.com/docker/docker/api/types/volume"
)

// Leaks make one thing each that Left must tell of, and return what removes it
// again.
func (d *Daemon) Leaks() []func(context.Context) (undo func() error, err error) {
	const name = "mayfly-leak"
	return []func(context.Context) (func() error, error){
		func(ctx context.Context) (func() error, error) {
			c, err := d.engine.ContainerCreate(ctx, &container.Config{Image: Debian, Cmd: []string{"true"}}, nil, nil, nil, name)
			return func() error { return d.engine.ContainerRemove(ctx, c.ID, container.RemoveOptions{}) }, err
		},
		func(ctx context.Context) (func() error, error) {
			v, err := d.engine.VolumeCreate(ctx, volume.CreateOptions{Name: name})
			return func() error { return d.engine.VolumeRemove(ctx, v.Name, false) }, err
		},
		func(ctx context.Context) (func() error, error) {
			n, err := d.engine.NetworkCreate(ctx, name, network.CreateOptions{Driver: "bridge"})
			return func() error { return d.engine.NetworkRemove(ctx, n.ID) }, err
		},
	}
}
