package docker

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/mount"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine"
	"github.com/mayfly-ci/mayfly/sandbox/engine/enginetest"
	"github.com/mayfly-ci/mayfly/test/dockertest"
)

// TestLife: the tests that share a daemon, since one takes seconds to start.
func TestLife(t *testing.T) { each(t, life) }

func life(t *testing.T, e dockertest.Engine) {
	d := e.Start(t)
	for name, test := range map[string]func(*testing.T, *dockertest.Daemon){
		"box": testBox, "images": testImages, "stranger": testStranger, "killed agent": testKilledAgent,
		"in flight": testInFlight, "check": testCheck, "honest builds": testHonestBuilds, "list without state": testLostState,
	} {
		t.Run(name, func(t *testing.T) { test(t, d) })
	}
	nothingLeft(t, d, "/nonexistent")
}

func testBox(t *testing.T, d *dockertest.Daemon) {
	cfg := config(t, d)
	r := newRuntime(t, cfg)
	b := enginetest.Create(t, r, "box", sandbox.Spec{})
	s, err := b.Attach(t.Context())
	if err != nil || s.TCP == nil || s.DNS == nil || s.Log == nil {
		t.Fatalf("Attach: got %+v, %v, want three sockets", s, err)
	}
	if err := errors.Join(s.TCP.Close(), s.DNS.Close(), s.Log.Close()); err != nil {
		t.Error(err)
	}
	if _, err := b.Attach(t.Context()); err == nil {
		t.Error("second Attach: got nil, want an error")
	}
	// A container, its mounts, control groups, parent and layer, a loop device
	// and a directory: what leftovers must be able to see.
	if seen := leftovers(t, d, cfg.StateDir); len(seen) < 7 {
		t.Errorf("a living box has %q on the host, want at least seven things", seen)
	}
	// What a job writes is on the disk of the box, and none of it in the layer
	// of the container, in a volume, or in a file that the engine lends.
	out, exit := enginetest.Script(t, b, `for d in / /usr/bin /etc /var/lib /tmp /opt; do echo mayfly-mark > $d/mark; done; echo more >> /etc/hosts && df --output=size / /etc/hosts /workspace | sort -u | wc -l`)
	if exit.Code != 0 || out != "2\n" {
		t.Errorf("writing everywhere: got %q %+v, want one file system", out, exit)
	}
	err = filepath.WalkDir(d.Dir(), func(path string, _ os.DirEntry, err error) error {
		if strings.HasSuffix(path, "/mark") {
			t.Errorf("%s: written by the job", path)
		}
		return nil // what vanishes meanwhile is none
	})
	if err != nil {
		t.Error(err)
	}
	testToldNothing(t, d, b, "box")
	// The guest takes no second stream, also not from root of the box.
	if out, _ := enginetest.Script(t, b, `python3 -c 'import socket; socket.socket(socket.AF_UNIX).connect("\0mayfly-guest")' 2>&1 | tail -1`); !strings.Contains(out, "refused") {
		t.Errorf("a step connects to the guest: got %q, want refused", out)
	}
}

// testToldNothing: while a process of the box has a secret in its environment,
// neither the engine's answer about the container nor what it keeps
// of it on disk has it.
func testToldNothing(t *testing.T, d *dockertest.Daemon, b sandbox.Sandbox, name string) {
	const secret = "mayfly-canary-correct-horse"
	looked := false
	look := func(time.Time, []byte) error {
		looked = true
		c, raw, err := d.Engine().ContainerInspectWithRaw(enginetest.Bounded(t), name, true)
		if err != nil || !strings.Contains(string(raw), c.ID) || strings.Contains(string(raw), secret) {
			t.Errorf("inspect: %v, %s", err, raw)
		}
		kept, err := filepath.Glob(filepath.Join(d.Dir(), "*", "containers", c.ID, "*"))
		if more, gerr := filepath.Glob(filepath.Join(d.Dir(), "*", "*", "containers", c.ID, "*")); err != nil || gerr != nil || len(kept)+len(more) == 0 {
			t.Errorf("what the engine keeps: %v, %v, %d files", err, gerr, len(kept)+len(more))
		} else {
			kept = append(kept, more...)
		}
		for _, path := range kept {
			if text, err := os.ReadFile(path); err == nil && strings.Contains(string(text), secret) {
				t.Errorf("%s has it", path)
			}
		}
		return nil
	}
	exit, err := b.Run(enginetest.Bounded(t), sandbox.Process{
		Args: []string{"/bin/sh", "-c", `test -n "$SECRET" && echo ready`}, Env: []string{"PATH=/usr/bin:/bin", "SECRET=" + secret}, Stdout: look,
	})
	if err != nil || exit.Code != 0 || !looked {
		t.Errorf("a process with a secret: %+v, %v, looked: %v", exit, err, looked)
	}
}

func testImages(t *testing.T, d *dockertest.Daemon) {
	cfg := config(t, d)
	r := newRuntime(t, cfg)
	b := enginetest.Create(t, r, "busybox", sandbox.Spec{Image: dockertest.Busybox})
	if out, exit := enginetest.Script(t, b, "test ! -e /bin/bash && cat /etc/hosts && touch /workspace/f && ls -ld /tmp"); exit.Code != 0 || !strings.Contains(out, "mayfly") || !strings.HasPrefix(out[strings.LastIndex(out, "drwx"):], "drwxrwxrwt") {
		t.Errorf("in busybox: got %q %+v", out, exit)
	}
	inspect, err := d.Engine().ImageInspect(t.Context(), dockertest.Busybox)
	if err != nil {
		t.Fatal(err)
	}
	byID := enginetest.Create(t, r, "by-id", sandbox.Spec{Image: inspect.ID})
	if out, exit := enginetest.Script(t, byID, "echo here"); exit.Code != 0 || out != "here\n" {
		t.Errorf("by id: got %q %+v", out, exit)
	}
	const absent = "mayfly-test/absent:1"
	enginetest.DestroyAfter(t, r, "absent")
	if _, err := r.Create(enginetest.Bounded(t), "absent", sandbox.Spec{Image: absent}); !errors.Is(err, sandbox.ErrUnsupported) || !strings.Contains(err.Error(), absent) {
		t.Errorf("an image that is not there: got %v, want ErrUnsupported and its name", err)
	}
	// An image may ask for volumes, a user, a health check and an entry point.
	c, err := d.Engine().ContainerCreate(t.Context(), &container.Config{Image: dockertest.Busybox, Cmd: []string{"true"}}, nil, nil, nil, "nosy")
	if err != nil {
		t.Fatal(err)
	}
	const nosy = "mayfly-test/nosy:1"
	_, err = d.Engine().ContainerCommit(t.Context(), c.ID, container.CommitOptions{Reference: nosy, Changes: []string{
		`VOLUME ["/workspace", "/root"]`, "USER nobody", "WORKDIR /nowhere", `ENTRYPOINT ["/bin/false"]`, "HEALTHCHECK --interval=1s CMD touch /workspace/health", "ENV SECRET=x",
	}})
	if err := errors.Join(err, d.Engine().ContainerRemove(t.Context(), c.ID, container.RemoveOptions{})); err != nil {
		t.Fatal(err)
	}
	b = enginetest.Create(t, r, "nosy", sandbox.Spec{Image: nosy})
	if c, err := d.Engine().ContainerInspect(t.Context(), "nosy"); err != nil || c.State.Health != nil && c.State.Health.Status != container.NoHealthcheck {
		t.Errorf("health check of an image: got %+v, %v, want none", c.State, err)
	}
	if out, exit := enginetest.Script(t, b, "id -u; pwd; ls -A; echo x > /root/f; grep -c -e /root -e /workspace /proc/mounts; env"); exit.Code != 0 || out != "0\n/workspace\n0\nHOME=/root\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\nPWD=/workspace\n" && !strings.HasPrefix(out, "0\n/workspace\n0\n") || strings.Contains(out, "SECRET") {
		t.Errorf("an image with wishes: got %q %+v, want root in an empty workspace without volumes", out, exit)
	}
}

// testStranger: a container of that name which is not ours is in the way and
// stays.
func testStranger(t *testing.T, d *dockertest.Daemon) {
	r := newRuntime(t, config(t, d))
	c, err := d.Engine().ContainerCreate(t.Context(), &container.Config{Image: dockertest.Busybox, Cmd: []string{"true"}}, nil, nil, nil, "taken")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Create(enginetest.Bounded(t), "taken", sandbox.Spec{}); !errors.Is(err, sandbox.ErrExists) {
		t.Errorf("Create: got %v, want ErrExists", err)
	}
	if err := r.Destroy(enginetest.Bounded(t), "taken"); err != nil {
		t.Errorf("Destroy: %v", err)
	}
	if err := d.Engine().ContainerRemove(t.Context(), c.ID, container.RemoveOptions{}); err != nil {
		t.Errorf("the stranger's container: %v", err)
	}
}

// points are where an agent may die, in order.
func points() []string {
	return []string{
		"docker.named", "docker.recorded", "docker.created", "docker.answered", "docker.disk", "docker.started",
		"docker.entered", "docker.ready", enginetest.PointRunning, "docker.ended", "docker.removed",
	}
}

// An agent is killed at every point between two effects. What runs ends by
// itself, and Destroy in another process removes the rest.
func testKilledAgent(t *testing.T, d *dockertest.Daemon) {
	killedAgents(t, d, sandbox.Spec{Image: dockertest.Busybox}, points())
}

func killedAgents(t *testing.T, d *dockertest.Daemon, spec sandbox.Spec, points []string) {
	spec.Labels = sandbox.Labels{Owner: "test", Job: "j", Generation: 1}
	for _, point := range points {
		t.Run(point, func(t *testing.T) {
			cfg := config(t, d)
			name := "killed-" + strings.ReplaceAll(point, ".", "-")
			if err := enginetest.Orphan(enginetest.Bounded(t), enginetest.Order{State: cfg.StateDir, Address: d.Host(), Image: cfg.Image, Name: name, Point: point, Spec: spec}); err != nil {
				t.Fatal(err)
			}
			r := newRuntime(t, cfg)
			infos, err := r.List(enginetest.Bounded(t))
			if err != nil || len(infos) != 1 || infos[0].Name != name || infos[0].Labels.Owner != "test" {
				t.Errorf("List: got %+v, %v, want the partial box", infos, err)
			}
			if point == "docker.entered" || point == "docker.ready" || point == enginetest.PointRunning { // the guest has a stream
				enginetest.Eventually(t, "processes end without help", func() bool {
					c, err := d.Engine().ContainerInspect(enginetest.Bounded(t), name)
					return err == nil && !c.State.Running
				})
			}
			if err := r.Destroy(enginetest.Bounded(t), name); err != nil {
				t.Fatal(err)
			}
			nothingLeft(t, d, cfg.StateDir)
		})
	}
}

// testInFlight: the agent died while it asked for a container, and the engine
// makes it all the same. Destroy waits for it. A daemon so busy that it reads the
// request after Destroy is through leaves a container that has never run, which
// List shows; that may happen to some of the tries.
func testInFlight(t *testing.T, d *dockertest.Daemon) {
	cfg := config(t, d)
	r := newRuntime(t, cfg)
	const tries = 5
	late := 0
	for i := range tries {
		name := fmt.Sprintf("late-%d", i)
		if err := r.state.Record(name, engine.Record{Image: dockertest.Busybox}, func() {}); err != nil {
			t.Fatal(err)
		}
		made := make(chan error, 1)
		sent := make(chan struct{})
		go func() {
			close(sent)
			spec := sandbox.Spec{Image: dockertest.Busybox, Limits: cfg.Limits}
			_, err := r.engine.ContainerCreate(enginetest.Bounded(t), r.config(spec), r.hostConfig(spec), nil, nil, name)
			made <- err
		}()
		<-sent
		// As long as a new agent takes at least to begin.
		select {
		case err := <-made:
			made <- err
		case <-time.After(5 * time.Millisecond):
		}
		if err := r.Destroy(enginetest.Bounded(t), name); err != nil {
			t.Error(err)
		}
		// The request may have come too late for its name, or in time.
		if err := <-made; err != nil {
			t.Logf("the late request: %v", err)
		}
		infos, err := r.List(enginetest.Bounded(t))
		if err != nil {
			t.Fatal(err)
		}
		late += len(infos)
		for _, info := range infos {
			if err := r.Destroy(enginetest.Bounded(t), info.Name); err != nil {
				t.Error(err)
			}
		}
		nothingLeft(t, d, cfg.StateDir)
	}
	if late == tries {
		t.Errorf("%d of %d times a container was made after Destroy", late, tries)
	}
}

func testCheck(t *testing.T, d *dockertest.Daemon) {
	cfg := config(t, d)
	claims, err := newRuntime(t, cfg).Check(enginetest.Bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range claims {
		if c.Enforced != (c.Name != "user id range" && c.Name != "gvisor") {
			t.Errorf("claim %+v: want all but the id range and what needs one enforced", c)
		}
	}
	nothingLeft(t, d, cfg.StateDir)
	cfg.Image = "mayfly-test/absent:1"
	if _, err := newRuntime(t, cfg).Check(enginetest.Bounded(t)); !errors.Is(err, sandbox.ErrImage) || !strings.Contains(err.Error(), cfg.Image) {
		t.Errorf("without the image: got %v, want ErrImage and its name", err)
	}
	cfg.Image, cfg.Runtime = dockertest.Busybox, "absent"
	if _, err := newRuntime(t, cfg).Check(enginetest.Bounded(t)); err == nil {
		t.Error("without the OCI runtime: got nil, want an error")
	}
}

// testLostState: boxes are found by their labels alone.
func testLostState(t *testing.T, d *dockertest.Daemon) {
	cfg := config(t, d)
	r := newRuntime(t, cfg)
	enginetest.Create(t, r, "lost", sandbox.Spec{Labels: sandbox.Labels{Owner: "test", Job: "j", Generation: 3}})
	if err := os.RemoveAll(cfg.StateDir); err != nil {
		t.Fatal(err)
	}
	again := newRuntime(t, cfg)
	infos, err := again.List(enginetest.Bounded(t))
	if err != nil || len(infos) != 1 || infos[0].Name != "lost" || infos[0].Labels != (sandbox.Labels{Owner: "test", Job: "j", Generation: 3}) {
		t.Errorf("List: got %+v, %v, want the box by its labels", infos, err)
	}
	if err := again.Destroy(enginetest.Bounded(t), "lost"); err != nil {
		t.Error(err)
	}
}

// What an ordinary build does as root must work.
func testHonestBuilds(t *testing.T, d *dockertest.Daemon) {
	enginetest.HonestBuilds(t, enginetest.Create(t, newRuntime(t, config(t, d)), "honest", enginetest.HonestSpec()))
}

// TestNothingOfTheHost: no option mounts anything but the guest's directory.
func TestNothingOfTheHost(t *testing.T) {
	t.Parallel()
	cfg, err := testConfig(t.TempDir(), DefaultHost)
	if err != nil {
		t.Fatal(err)
	}
	h := newRuntime(t, cfg).hostConfig(sandbox.Spec{})
	if len(h.Mounts) != 1 || h.Mounts[0].Source != filepath.Join(cfg.StateDir, "guest") || !h.Mounts[0].ReadOnly || h.Mounts[0].BindOptions.Propagation != mount.PropagationRPrivate {
		t.Errorf("mounts: got %+v, want the guest's directory, read-only", h.Mounts)
	}
	if h.Privileged || len(h.Binds)+len(h.Devices)+len(h.VolumesFrom)+len(h.GroupAdd) > 0 || h.PidMode != "" || h.UsernsMode != "" || h.NetworkMode != "none" {
		t.Errorf("host configuration %+v: want nothing of the host", h)
	}
}
