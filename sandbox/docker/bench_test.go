package docker

import (
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/test/dockertest"
)

// BenchmarkBox makes and destroys a box and, in turn with it, a container of the
// same image as anybody would, without network; and runs a step, beside what an
// engine needs to run one in a container. It reports medians in microseconds.
func BenchmarkBox(b *testing.B) {
	d := dockertest.Start(b)
	cfg := config(b, d)
	r := newRuntime(b, cfg)
	if _, err := r.Check(b.Context()); err != nil {
		b.Fatal(err)
	}
	took := map[string][]time.Duration{}
	measure := func(what string, do func() error) {
		began := time.Now()
		if err := do(); err != nil {
			b.Fatalf("%s: %v", what, err)
		}
		took[what] = append(took[what], time.Since(began))
	}
	ctx := b.Context()
	for i := 0; b.Loop(); i++ {
		name := fmt.Sprintf("bench-%d", i)
		var box sandbox.Sandbox
		measure("box-create", func() (err error) {
			box, err = r.Create(ctx, name, sandbox.Spec{})
			return err
		})
		measure("box-step", func() error {
			_, err := box.Run(ctx, sandbox.Process{Args: []string{"/bin/true"}})
			return err
		})
		measure("box-destroy", func() error { return r.Destroy(ctx, name) })
		measure("engine-create", func() error {
			_, err := d.Engine().ContainerCreate(ctx, &container.Config{Image: cfg.Image, Cmd: []string{"sleep", "1000"}},
				&container.HostConfig{NetworkMode: "none"}, nil, nil, name)
			if err != nil {
				return err
			}
			return d.Engine().ContainerStart(ctx, name, container.StartOptions{})
		})
		measure("engine-step", func() error {
			e, err := d.Engine().ContainerExecCreate(ctx, name, container.ExecOptions{Cmd: []string{"/bin/true"}, AttachStdout: true})
			if err != nil {
				return err
			}
			out, err := d.Engine().ContainerExecAttach(ctx, e.ID, container.ExecAttachOptions{})
			if err != nil {
				return err
			}
			defer out.Close()
			_, err = io.Copy(io.Discard, out.Reader)
			return err
		})
		measure("engine-remove", func() error {
			return d.Engine().ContainerRemove(ctx, name, container.RemoveOptions{Force: true, RemoveVolumes: true})
		})
	}
	for what, all := range took {
		slices.Sort(all)
		b.ReportMetric(float64(all[len(all)/2].Microseconds()), what+"-µs")
	}
}
