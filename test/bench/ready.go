package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/docker/docker/api/types/container"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/test/containerdtest"
)

const (
	// betweenAdoptions is room for the pool to make the next box, which it does
	// when no job has begun or ended for a while.
	betweenAdoptions = 500 * time.Millisecond
	// betweenReady lets the machine's memory settle after some boxes were made.
	betweenReady = time.Second
)

// A readyBox waits for a job.
type readyBox struct {
	name string
	box  sandbox.Sandbox
}

// ready makes boxes of each kind that wait for jobs, says what they take, and
// then uses each of them once.
func (s *stand) ready(ctx context.Context, t *table) error {
	for _, k := range s.kinds {
		if err := s.readyOf(ctx, k, t); err != nil {
			return fmt.Errorf("%s: %w", k.name, err)
		}
	}
	return nil
}

func (s *stand) readyOf(ctx context.Context, k *kind, t *table) (err error) {
	var boxes []readyBox
	defer func() {
		for _, b := range boxes {
			err = errors.Join(err, k.runtime.Destroy(ctx, b.name))
		}
	}()
	idle, err := s.engines()
	if err != nil {
		return err
	}
	var left []float64 // a box, by what the machine has left
	for range readyGroups {
		if err := pause(ctx, betweenReady); err != nil {
			return err
		}
		before, err := available()
		if err != nil {
			return err
		}
		for range readyBoxes / readyGroups {
			b := readyBox{name: fmt.Sprintf("bench-%d-ready-%d", os.Getpid(), len(boxes))}
			boxes = append(boxes, b)
			if boxes[len(boxes)-1].box, err = k.runtime.Create(ctx, b.name, k.spec); err != nil {
				return err
			}
		}
		if err := pause(ctx, betweenReady); err != nil {
			return err
		}
		after, err := available()
		if err != nil {
			return err
		}
		left = append(left, (before-after)*readyGroups/readyBoxes)
	}
	used, err := k.used(ctx, boxes)
	if err != nil {
		return err
	}
	busy, err := s.engines()
	if err != nil {
		return err
	}
	k.densityRows(t, used, left, (busy-idle)/readyBoxes)
	return s.adopt(ctx, k, boxes, t)
}

// used is what the control group of each box is charged for, in MiB.
func (k *kind) used(ctx context.Context, boxes []readyBox) ([]float64, error) {
	var names []string
	for _, b := range boxes {
		names = append(names, b.name)
	}
	groups, err := k.groups(ctx, names)
	if err == nil && len(groups) != len(boxes) {
		err = fmt.Errorf("%d control groups of %d boxes", len(groups), len(boxes))
	}
	if err != nil {
		return nil, err
	}
	var used []float64
	for _, g := range groups {
		u, err := usage(g)
		if err != nil {
			return nil, err
		}
		used = append(used, u)
	}
	return used, nil
}

// densityRows say how many boxes would be in 8 GiB, which nobody has tried: by
// what their control groups are charged for, and what the engines' own processes
// have grown by. What others do on the machine meanwhile shows in what it has
// left, so that on a busy one that figure means nothing.
func (k *kind) densityRows(t *table, used, left []float64, engine float64) {
	t.info(fmt.Sprintf("%s: memory of an idle box, of %d, by its control group", k.name, readyBoxes), "MiB", used...)
	each := median(used)
	if k.engine {
		t.info("  of the engine's own processes, a box", "MiB", engine)
		each += engine
	}
	t.info("  idle boxes in 8 GiB, extrapolated from these", "boxes", 8*1024/each)
	t.info("  by what the machine has left, to compare", "MiB", left...)
}

// engines is the memory of the daemons and of the parents of their containers,
// which all have their directory in their arguments, in MiB. What they share with
// others is counted in parts.
func (s *stand) engines() (float64, error) {
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, err
	}
	sum := 0.0
	for _, dir := range all {
		args, _ := os.ReadFile(dir + "/cmdline") // it may have ended
		if !strings.Contains(string(args), s.world.path("runtimes")+"/") {
			continue
		}
		if pss, err := field(dir+"/smaps_rollup", "Pss:"); err == nil {
			sum += pss
		}
	}
	return sum, nil
}

// adopt gives each box its first job.
func (s *stand) adopt(ctx context.Context, k *kind, boxes []readyBox, t *table) error {
	var starts []start
	for _, b := range boxes {
		var took start
		if err := s.use(ctx, b.box, b.name, &took); err != nil {
			return err
		}
		starts = append(starts, took)
	}
	t.most(5, k.name+": a box that is ready: attached, gateway included", "ms", column(starts, func(s start) float64 { return s.attach })...)
	t.most(5, k.name+": a box that is ready: first process has run, too", "ms", column(starts, start.started)...)
	return nil
}

// groupsOf finds the control groups of native boxes.
func groupsOf(_ context.Context, boxes []string) ([]string, error) {
	var groups []string
	for _, name := range boxes {
		for _, parent := range []string{"/sys/fs/cgroup/memory", "/sys/fs/cgroup"} {
			found, err := filepath.Glob(parent + "/mayfly/*/" + name)
			if err != nil {
				return nil, err
			}
			if len(found) > 0 {
				groups = append(groups, found[0])
				break
			}
		}
	}
	return groups, nil
}

// dockerGroups are those of all containers: the daemon is the benchmark's own.
func (s *stand) dockerGroups(ctx context.Context, _ []string) ([]string, error) {
	all, err := s.docker.Engine().ContainerList(ctx, container.ListOptions{})
	if err != nil {
		return nil, err
	}
	var groups []string
	for _, c := range all {
		info, err := s.docker.Engine().ContainerInspect(ctx, c.ID)
		if err != nil {
			return nil, err
		}
		group, err := groupOf(info.State.Pid)
		if err != nil {
			return nil, err
		}
		groups = append(groups, group)
	}
	return groups, nil
}

func (s *stand) containerdGroups(ctx context.Context, _ []string) ([]string, error) {
	ctx = namespaces.WithNamespace(ctx, containerdtest.Namespace)
	all, err := s.containerd.Client().Containers(ctx)
	if err != nil {
		return nil, err
	}
	var groups []string
	for _, c := range all {
		task, err := c.Task(ctx, nil)
		if err != nil {
			return nil, err
		}
		group, err := groupOf(int(task.Pid()))
		if err != nil {
			return nil, err
		}
		groups = append(groups, group)
	}
	return groups, nil
}

// groupOf is the control group that a process's memory is charged to
// (cgroups(7)).
func groupOf(pid int) (string, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return "", err
	}
	unified := ""
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch {
		case len(f) < 3:
		case f[1] == "memory":
			return "/sys/fs/cgroup/memory" + f[2], nil
		case f[1] == "":
			unified = "/sys/fs/cgroup" + f[2]
		}
	}
	return unified, nil
}
