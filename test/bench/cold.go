package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/docker/docker/api/types/container"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/test/containerdtest"
	"github.com/mayfly-ci/mayfly/test/dockertest"
)

// A start is a box, or what others have in its place, in ms.
type start struct{ create, attach, first, destroy float64 }

// started is when a job's first process has run.
func (s start) started() float64 { return s.create + s.attach + s.first }

func (s start) whole() float64 { return s.started() + s.destroy }

// column is one figure of every start.
func column(starts []start, of func(start) float64) []float64 {
	out := make([]float64, len(starts))
	for i, s := range starts {
		out[i] = of(s)
	}
	return out
}

// ratios are those of samples that were taken in the same round.
func ratios(of, to []float64) []float64 {
	out := make([]float64, len(of))
	for i := range of {
		out[i] = of[i] / to[i]
	}
	return out
}

func timed(do func() error) (float64, error) {
	began := time.Now()
	err := do()
	return ms(time.Since(began)), err
}

// A contest is what is compared, done in any order.
type contest struct {
	times int // in a round: what takes little is done more often
	each  []func(ctx context.Context, name string) error
}

// cold makes, uses and destroys a box of each kind and, in turn with it, what is
// no work of ours. What is compared is done together, in an order of chance,
// because an engine still tidies up when it has answered.
func (s *stand) cold(ctx context.Context, t *table) error {
	f, err := newFloors(s.world, "runtimes/floors")
	if err != nil {
		return err
	}
	f.runsc = s.runsc
	s.closers = append(s.closers, f.close)
	var engine, plain []start
	all := s.contests(f, &engine, &plain)
	n := 0
	for i := range coldRounds + 1 {
		rand.Shuffle(len(all), func(a, b int) { all[a], all[b] = all[b], all[a] })
		for _, c := range all {
			for range c.times {
				rand.Shuffle(len(c.each), func(a, b int) { c.each[a], c.each[b] = c.each[b], c.each[a] })
				for _, do := range c.each {
					n++
					if err := do(ctx, fmt.Sprintf("bench-%d-cold-%d", os.Getpid(), n)); err != nil {
						return err
					}
				}
			}
		}
		if i > 0 {
			continue
		}
		f.forget() // it made what later ones find
		engine, plain = nil, nil
		for _, k := range s.kinds {
			k.starts = nil
		}
	}
	s.coldRows(t, f, engine, plain)
	return nil
}

func (s *stand) contests(f *floors, engine, plain *[]start) []contest {
	ours := map[string]func(context.Context, string) error{}
	for _, k := range s.kinds {
		ours[k.file] = func(ctx context.Context, name string) error { return s.once(ctx, k, name) }
	}
	floor := func(what string) func(context.Context, string) error {
		return func(ctx context.Context, _ string) error { return f.one(ctx, what) }
	}
	others := func(into *[]start, by func(context.Context, string) (start, error)) func(context.Context, string) error {
		return func(ctx context.Context, name string) error {
			took, err := by(ctx, name)
			*into = append(*into, took)
			return err
		}
	}
	type list = []func(context.Context, string) error
	return []contest{
		{4, list{ours[nativeFile], ours[imageFile], floor(floorBox), floor(floorFork), floor(floorRunc)}},
		{1, list{ours[gvisorFile], floor(floorRunsc)}},
		{1, list{ours[dockerFile], others(engine, s.byDocker)}},
		{1, list{ours[containerdFile], others(plain, s.byContainerd)}},
	}
}

func (s *stand) coldRows(t *table, f *floors, engine, plain []start) {
	for _, k := range s.kinds {
		started, whole := column(k.starts, start.started), column(k.starts, start.whole)
		t.info(k.name+": cold start: created, attached, first process has run", "ms", started...)
		t.info("  create", "ms", column(k.starts, func(s start) float64 { return s.create })...)
		t.info("  attach, gateway included", "ms", column(k.starts, func(s start) float64 { return s.attach })...)
		t.info("  first process", "ms", column(k.starts, func(s start) float64 { return s.first })...)
		t.info("  destroy", "ms", column(k.starts, func(s start) float64 { return s.destroy })...)
		made := column(k.starts, func(s start) float64 { return s.create + s.destroy })
		var of, to []float64
		switch k.file {
		case nativeFile:
			of, to = started, f.taken[floorBox]
			t.most(2, k.name+": cold start, times the floor of a box", "×", ratios(of, to)...)
		case dockerFile:
			of, to = made, column(engine, start.whole)
			t.most(1.1, k.name+": create and destroy, times the engine's create, start and remove", "×", ratios(of, to)...)
		case containerdFile:
			of, to = made, column(plain, start.whole)
			t.info(k.name+": create and destroy, times containerd's own", "×", ratios(of, to)...)
		case gvisorFile:
			of, to = whole, f.taken[floorRunsc]
			t.info(k.name+": cold start and destroy, times runsc run", "×", ratios(of, to)...)
		default:
			continue
		}
		t.info("  the least of one by the least of the other", "×", slices.Min(of)/slices.Min(to))
	}
	t.info("floor: docker, create and start without network, and remove", "ms", column(engine, start.whole)...)
	t.info("floor: containerd, snapshot, container and task, and remove", "ms", column(plain, start.whole)...)
	f.rows(t)
}

// once is one box from nothing to nothing.
func (s *stand) once(ctx context.Context, k *kind, name string) error {
	var box sandbox.Sandbox
	var took start
	var err error
	took.create, err = timed(func() (err error) {
		box, err = k.runtime.Create(ctx, name, k.spec)
		return err
	})
	if err == nil {
		err = s.use(ctx, box, name, &took)
	}
	destroy, derr := timed(func() error { return k.runtime.Destroy(ctx, name) })
	took.destroy = destroy
	k.starts = append(k.starts, took)
	if err = errors.Join(err, derr); err != nil {
		return fmt.Errorf("%s: %w", k.name, err)
	}
	return nil
}

// use does what a job does first with a box: its network, with a gateway that
// allows nothing, and a process.
func (s *stand) use(ctx context.Context, box sandbox.Sandbox, name string, took *start) (err error) {
	took.attach, err = timed(func() error {
		if err := s.gateway.Open(ctx, name, egress.Opening{Ledger: func(egress.Line) error { return nil }}); err != nil {
			return err
		}
		sockets, err := box.Attach(ctx)
		if err != nil {
			return err
		}
		return s.gateway.Attach(ctx, name, egress.Sockets(sockets))
	})
	if err == nil {
		took.first, err = timed(func() error {
			exit, err := box.Run(ctx, sandbox.Process{Args: []string{"/bin/true"}})
			if err == nil && exit.Code != 0 {
				err = fmt.Errorf("/bin/true: exit status %d", exit.Code)
			}
			return err
		})
	}
	return errors.Join(err, s.gateway.Close(ctx, name))
}

// byDocker is what "docker run --network none" asks of the engine.
func (s *stand) byDocker(ctx context.Context, name string) (took start, err error) {
	engine := s.docker.Engine()
	took.create, err = timed(func() error {
		_, err := engine.ContainerCreate(ctx, &container.Config{Image: dockertest.Busybox, Cmd: []string{"sleep", "1000"}},
			&container.HostConfig{NetworkMode: "none"}, nil, nil, name)
		if err != nil {
			return err
		}
		return engine.ContainerStart(ctx, name, container.StartOptions{})
	})
	var rerr error
	took.destroy, rerr = timed(func() error {
		return engine.ContainerRemove(ctx, name, container.RemoveOptions{Force: true, RemoveVolumes: true})
	})
	return took, errors.Join(err, rerr)
}

// byContainerd is the same of containerd, whose client does more of it.
func (s *stand) byContainerd(ctx context.Context, name string) (took start, err error) {
	ctx = namespaces.WithNamespace(ctx, containerdtest.Namespace)
	var task client.Task
	var c client.Container
	took.create, err = timed(func() error {
		img, err := s.containerd.Client().GetImage(ctx, "docker.io/"+containerdtest.Busybox)
		if err != nil {
			return err
		}
		c, err = s.containerd.Client().NewContainer(ctx, name, client.WithNewSnapshot(name, img),
			client.WithNewSpec(oci.WithImageConfig(img), oci.WithProcessArgs("sleep", "1000")))
		if err != nil {
			return err
		}
		task, err = c.NewTask(ctx, cio.NullIO)
		if err != nil {
			return err
		}
		return task.Start(ctx)
	})
	if err != nil {
		return took, err
	}
	took.destroy, err = timed(func() error {
		_, err := task.Delete(ctx, client.WithProcessKill)
		return errors.Join(err, c.Delete(ctx, client.WithSnapshotCleanup))
	})
	return took, err
}
