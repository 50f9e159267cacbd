package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/containerd"
	"github.com/mayfly-ci/mayfly/sandbox/docker"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/gvisor"
	"github.com/mayfly-ci/mayfly/sandbox/image"
	"github.com/mayfly-ci/mayfly/sandbox/native"
	"github.com/mayfly-ci/mayfly/test/containerdtest"
	"github.com/mayfly-ci/mayfly/test/dockertest"
	"github.com/mayfly-ci/mayfly/test/imagetest"
	"github.com/mayfly-ci/mayfly/test/servertest"
)

// runtimes measures every way to make a box, each beside what starts a program
// that way without us, with daemons of its own and an image that none pulls.
func runtimes(ctx context.Context, w *world, t *table) (err error) {
	s := &stand{world: w}
	defer func() { err = errors.Join(err, s.close()) }()
	if err := s.open(ctx); err != nil {
		return err
	}
	for _, measure := range []func(context.Context, *table) error{s.cold, s.ready, s.throughput, s.adoption} {
		if err := measure(ctx, t); err != nil {
			return err
		}
	}
	return nil
}

// A stand has all that boxes are made with.
type stand struct {
	world      *world
	docker     *dockertest.Daemon
	containerd *containerdtest.Daemon
	runsc      string
	archive    string // of the image, for the native runtime
	gateway    *gateway.Gateway
	kinds      []*kind
	closers    []func() error
}

// A kind is a way to make a box. Its file is the workflow whose jobs have one.
type kind struct {
	name, file string
	rule       string // what its rule says
	runtime    sandbox.Runtime
	spec       sandbox.Spec
	groups     func(ctx context.Context, boxes []string) ([]string, error)
	starts     []start
	engine     bool // processes of an engine belong to its boxes
}

// The workflows of the kinds.
const (
	nativeFile     = "native.yml"
	imageFile      = "image.yml"
	gvisorFile     = "gvisor.yml"
	dockerFile     = "docker.yml"
	containerdFile = "containerd.yml"
)

func (s *stand) open(ctx context.Context) (err error) {
	dir := s.world.path("runtimes")
	if err := os.Mkdir(dir, 0o711); err != nil {
		return err
	}
	s.archive = filepath.Join(dir, "image.tar")
	if err := imagetest.BusyboxArchive(s.archive); err != nil {
		return err
	}
	if s.runsc, err = servertest.Runsc(ctx); err != nil {
		return err
	}
	if s.docker, err = dockertest.New(ctx, filepath.Join(dir, "docker")); err != nil {
		return err
	}
	s.closers = append(s.closers, s.docker.Close)
	if s.containerd, err = containerdtest.New(ctx, filepath.Join(dir, "containerd"), containerdtest.Packaged); err != nil {
		return err
	}
	s.closers = append(s.closers, s.containerd.Close)
	if s.gateway, err = gateway.New(gateway.Config{}); err != nil {
		return err
	}
	return s.boxes(ctx, dir)
}

// boxes makes the runtimes.
func (s *stand) boxes(ctx context.Context, dir string) error {
	program, err := guest.Binary()
	if err != nil {
		return err
	}
	own, err := native.New(native.Config{
		StateDir: filepath.Join(dir, "native-boxes"), Owner: "bench", Guest: program, GVisor: gvisor.Config{Runsc: s.runsc},
		Images: image.Config{Sources: map[string]string{dockertest.Busybox: s.archive}},
	})
	if err != nil {
		return err
	}
	s.closers = append(s.closers, own.Close)
	img, err := own.Pull(ctx, sandbox.Pull{Image: dockertest.Busybox})
	if err != nil {
		return err
	}
	engine, err := docker.New(docker.Config{
		StateDir: filepath.Join(dir, "docker-boxes"), Owner: "bench", Guest: program, Host: s.docker.Host(), Image: dockertest.Busybox,
	})
	if err != nil {
		return err
	}
	s.closers = append(s.closers, engine.Close)
	plain, err := containerd.New(containerd.Config{
		StateDir: filepath.Join(dir, "containerd-boxes"), Owner: "bench", Guest: program, Address: s.containerd.Address(), Image: dockertest.Busybox,
	})
	if err != nil {
		return err
	}
	s.closers = append(s.closers, plain.Close)
	s.kinds = []*kind{
		{name: "native", file: nativeFile, runtime: own, groups: groupsOf},
		{name: "native with an image", file: imageFile, rule: "image: " + dockertest.Busybox, runtime: own, spec: sandbox.Spec{Image: img.Ref}, groups: groupsOf},
		{name: "native with gVisor", file: gvisorFile, rule: "isolation: gvisor", runtime: own, spec: sandbox.Spec{Isolation: sandbox.GVisor}, groups: groupsOf},
		{name: "docker", file: dockerFile, rule: "runtime: docker", runtime: engine, groups: s.dockerGroups, engine: true},
		{name: "containerd", file: containerdFile, rule: "runtime: containerd", runtime: plain, groups: s.containerdGroups, engine: true},
	}
	return nil
}

// close ends the daemons last.
func (s *stand) close() error {
	var errs []error
	for _, c := range slices.Backward(s.closers) {
		errs = append(errs, c())
	}
	return errors.Join(errs...)
}

const standConfig = `version: 1
state: %[1]s
slots: %[2]d
policy: %[1]s.policy.yaml
providers: {local: {dir: %[1]s/spool}}
sandbox:
  native: {gvisor: {runsc: %[3]q}, images: {sources: {%[4]q: %[5]q}}}
  docker: {image: %[4]q, host: %[6]q}
  containerd: {image: %[4]q, address: %[7]q}
log: {level: warn}
`

// agent starts an agent that has every kind; more are further lines of its
// configuration.
func (s *stand) agent(name, more string) (*agent, error) {
	state := s.world.path(name)
	var rules strings.Builder
	rules.WriteString("version: 1\nrules:\n")
	for _, k := range s.kinds {
		fmt.Fprintf(&rules, "  - name: %s\n    match: {workflow: %s, trust: [local]}\n    timeout: 5m\n", strings.TrimSuffix(k.file, ".yml"), k.file)
		if k.rule != "" {
			fmt.Fprintf(&rules, "    %s\n", k.rule)
		}
	}
	config := fmt.Sprintf(standConfig, state, capacity, s.runsc, dockertest.Busybox, s.archive, s.docker.Host(), s.containerd.Address()) + more
	if err := errors.Join(
		os.Mkdir(state, 0o700),
		os.WriteFile(state+".policy.yaml", []byte(rules.String()), 0o600),
		os.WriteFile(state+".yaml", []byte(config), 0o600),
	); err != nil {
		return nil, err
	}
	return s.world.launch(state, state+".yaml")
}

// throughput runs jobs of each kind through an agent, four at once.
func (s *stand) throughput(ctx context.Context, t *table) error {
	a, err := s.agent("kinds", "")
	if err != nil {
		return err
	}
	for _, k := range s.kinds {
		rate, err := a.batch(ctx, k.file, jobsOfAKind)
		if err != nil {
			return fmt.Errorf("%s: %w", k.name, err)
		}
		t.info(fmt.Sprintf("%s: jobs a minute, capacity %d, %d jobs", k.name, capacity, jobsOfAKind), "1/min", rate)
	}
	return a.stop()
}

// adoption runs jobs one at a time on an agent that has a box of each kind
// ready. A job that comes while the next is still being made has its own, and
// is none of the samples.
func (s *stand) adoption(ctx context.Context, t *table) error {
	a, err := s.agent("warm-kinds", "warm: {boxes: 1}\n")
	if err != nil {
		return err
	}
	a.warm = len(s.kinds)
	names := map[string][]string{}
	for range adoptions {
		for _, k := range s.kinds {
			if err := errors.Join(a.ready(ctx), pause(ctx, betweenAdoptions)); err != nil {
				return err
			}
			r, err := a.run(ctx, k.file)
			if err != nil {
				return fmt.Errorf("%s: %w", k.name, err)
			}
			names[k.name] = append(names[k.name], r.Name)
		}
	}
	if err := a.stop(); err != nil {
		return err
	}
	found, err := a.stages()
	if err != nil {
		return err
	}
	for _, k := range s.kinds {
		var took []float64
		for _, job := range names[k.name] {
			if found.took(job, "adopt") > 0 {
				took = append(took, ms(found.took(job, "take")+found.took(job, "adopt")+found.took(job, "attach")))
			}
		}
		if len(took) == 0 {
			return fmt.Errorf("%s: no job adopted a box", k.name)
		}
		t.most(5, k.name+": adoption by an agent: asked, taken, attached", "ms", took...)
	}
	return nil
}
