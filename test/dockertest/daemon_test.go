package dockertest_test

import (
	"testing"

	"github.com/docker/docker/api/types/container"

	"github.com/mayfly-ci/mayfly/test/dockertest"
)

// TestDaemon: a daemon has its images, is killed and comes back, and shows what
// a container leaves.
func TestDaemon(t *testing.T) {
	for _, e := range dockertest.Engines() {
		t.Run(e.Name, func(t *testing.T) { testDaemon(t, e.Start(t)) })
	}
}

func testDaemon(t *testing.T, d *dockertest.Daemon) {
	ctx := t.Context()
	for _, image := range []string{dockertest.Debian, dockertest.Busybox} {
		if _, err := d.Engine().ImageInspect(ctx, image); err != nil {
			t.Errorf("image: %v", err)
		}
	}
	if left, err := d.Left(ctx); err != nil || len(left) > 0 {
		t.Errorf("of no container is left: got %q, %v, want nothing", left, err)
	}
	c, err := d.Engine().ContainerCreate(ctx, &container.Config{Image: dockertest.Busybox, Cmd: []string{"sleep", "1000"}},
		&container.HostConfig{NetworkMode: "none"}, nil, nil, "sleeper")
	if err == nil {
		err = d.Engine().ContainerStart(ctx, c.ID, container.StartOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
	// A container, its control groups, its mounts, its layer and its parent.
	if left, err := d.Left(ctx); err != nil || len(left) < 5 {
		t.Errorf("of a container that runs is left: got %q, %v, want at least five things", left, err)
	}
	if err := d.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Engine().Ping(ctx); err == nil {
		t.Error("a killed daemon answers")
	}
	if err := d.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	if err := d.Engine().ContainerRemove(ctx, c.ID, container.RemoveOptions{Force: true}); err != nil {
		t.Error(err)
	}
	if left, err := d.Left(ctx); err != nil || len(left) > 0 {
		t.Errorf("of a removed container is left: got %q, %v, want nothing", left, err)
	}
}
