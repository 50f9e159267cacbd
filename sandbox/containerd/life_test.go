package containerd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine"
	"github.com/mayfly-ci/mayfly/sandbox/engine/enginetest"
	"github.com/mayfly-ci/mayfly/test/containerdtest"
)

// TestLife: the tests that share a daemon, since one takes a while to start.
func TestLife(t *testing.T) {
	for _, v := range containerdtest.Versions() {
		t.Run(string(v), func(t *testing.T) {
			t.Parallel()
			d := containerdtest.Start(t, v)
			for name, test := range map[string]func(*testing.T, *containerdtest.Daemon){
				"box": testBox, "images": testImages, "taken": testTaken, "killed agent": testKilledAgent,
				"in flight": testInFlight, "half deleted": testHalfDeleted, "forgotten shim": testForgottenShim, "collected": testCollected, "check": testCheck, "odd names": testNames,
				"honest builds": testHonestBuilds, "list without state": testLostState, "limited ids": testNoIDs,
			} {
				t.Run(name, func(t *testing.T) { test(t, d) })
			}
			nothingLeft(t, d, "/nonexistent")
		})
	}
}

func testBox(t *testing.T, d *containerdtest.Daemon) {
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
	// A container, a task, a lease, a snapshot, a mount, a bundle, control groups,
	// a parent, a loop device, ids and a directory: what leftovers must see.
	if seen := leftovers(t, d, cfg.StateDir); len(seen) < 11 {
		t.Errorf("a living box has %q on the host, want at least eleven things", seen)
	}
	// What a job writes is on the disk of the box.
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
	// The guest takes no second stream, also not from root of the box.
	if out, _ := enginetest.Script(t, b, `python3 -c 'import socket; socket.socket(socket.AF_UNIX).connect("\0mayfly-guest")' 2>&1 | tail -1`); !strings.Contains(out, "refused") {
		t.Errorf("a step connects to the guest: got %q, want refused", out)
	}
	// Two boxes have no id in common.
	other := enginetest.Create(t, r, "other", sandbox.Spec{})
	mine, _ := enginetest.Script(t, b, "cat /proc/self/uid_map /proc/self/gid_map")
	if theirs, _ := enginetest.Script(t, other, "cat /proc/self/uid_map /proc/self/gid_map"); mine == theirs || strings.Count(mine, "65536") != 2 {
		t.Errorf("ids of two boxes: got %q and %q, want different ones", mine, theirs)
	}
}

func testImages(t *testing.T, d *containerdtest.Daemon) {
	r := newRuntime(t, config(t, d))
	b := enginetest.Create(t, r, "busybox", sandbox.Spec{Image: containerdtest.Busybox})
	if out, exit := enginetest.Script(t, b, "test ! -e /bin/bash && cat /etc/hosts && touch /workspace/f && ls -ld /tmp"); exit.Code != 0 || !strings.Contains(out, "mayfly") || !strings.HasPrefix(out[strings.LastIndex(out, "drwx"):], "drwxrwxrwt") {
		t.Errorf("in busybox: got %q %+v", out, exit)
	}
	const absent = "mayfly-test/absent:1"
	enginetest.DestroyAfter(t, r, "absent")
	if _, err := r.Create(enginetest.Bounded(t), "absent", sandbox.Spec{Image: absent}); !errors.Is(err, sandbox.ErrUnsupported) || !strings.Contains(err.Error(), absent) {
		t.Errorf("an image that is not there: got %v, want ErrUnsupported and its name", err)
	}
	if _, err := r.Create(enginetest.Bounded(t), "more", sandbox.Spec{Isolation: "kata"}); !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("another isolation: got %v, want ErrUnsupported", err)
	}
}

// testTaken: what has our name and is not made by this state directory is in the
// way of Create.
func testTaken(t *testing.T, d *containerdtest.Daemon) {
	r := newRuntime(t, config(t, d))
	spec, err := typeurl.MarshalAny(&specs.Spec{})
	if err != nil {
		t.Fatal(err)
	}
	service := d.Client().ContainerService()
	_, err = service.Create(t.Context(), containers.Container{ID: r.id("taken"), Spec: spec, Runtime: containers.RuntimeInfo{Name: DefaultRuntime}})
	if err != nil {
		t.Fatal(err)
	}
	enginetest.DestroyAfter(t, r, "taken")
	if _, err := r.Create(enginetest.Bounded(t), "taken", sandbox.Spec{}); !errors.Is(err, sandbox.ErrExists) {
		t.Errorf("Create: got %v, want ErrExists", err)
	}
	// Of another's names nothing is touched.
	if _, err := service.Create(t.Context(), containers.Container{ID: "mf-stranger", Spec: spec, Runtime: containers.RuntimeInfo{Name: DefaultRuntime}}); err != nil {
		t.Fatal(err)
	}
	if err := r.Destroy(enginetest.Bounded(t), "mf-stranger"); err != nil {
		t.Errorf("Destroy: %v", err)
	}
	if err := service.Delete(t.Context(), "mf-stranger"); err != nil {
		t.Errorf("the stranger's container: %v", err)
	}
}

// points are where an agent may die, in order.
func points() []string {
	return []string{
		"containerd.named", "containerd.recorded", "containerd.ids", "containerd.leased", "containerd.snapshot", "containerd.created",
		"containerd.disk", "containerd.asked", "containerd.asking", "containerd.answered", "containerd.started",
		"containerd.entered", "containerd.ready", enginetest.PointRunning,
		"containerd.ended", "containerd.deleted", "containerd.freed", "containerd.removed",
	}
}

// An agent is killed at every point between two effects. What runs ends by
// itself, and Destroy in another process removes the rest.
func testKilledAgent(t *testing.T, d *containerdtest.Daemon) {
	killedAgents(t, d, sandbox.Kernel, points())
}

func killedAgents(t *testing.T, d *containerdtest.Daemon, wall sandbox.Isolation, points []string) {
	for _, point := range points {
		t.Run(point, func(t *testing.T) {
			cfg := config(t, d)
			name := "killed-" + strings.ReplaceAll(point, ".", "-")
			spec := sandbox.Spec{Labels: sandbox.Labels{Owner: "test", Job: "j", Generation: 1}, Image: containerdtest.Busybox, Isolation: wall}
			if err := enginetest.Orphan(enginetest.Bounded(t), enginetest.Order{State: cfg.StateDir, Address: d.Address(), Image: cfg.Image, Name: name, Point: point, Spec: spec}); err != nil {
				t.Fatal(err)
			}
			r := newRuntime(t, cfg)
			infos, err := r.List(enginetest.Bounded(t))
			if err != nil || len(infos) != 1 || infos[0].Name != name || infos[0].Labels.Owner != "test" {
				t.Errorf("List: got %+v, %v, want the partial box", infos, err)
			}
			if point == "containerd.entered" || point == "containerd.ready" || point == enginetest.PointRunning { // the guest has a stream
				enginetest.Eventually(t, "processes end without help", func() bool {
					gone, err := r.endTask(r.within(enginetest.Bounded(t)), name, false)
					return gone && err == nil
				})
			}
			if err := r.Destroy(enginetest.Bounded(t), name); err != nil {
				t.Fatal(err)
			}
			nothingLeft(t, d, cfg.StateDir)
		})
	}
}

// testInFlight: the agent died while it asked for the task, and the daemon makes
// it all the same. Destroy waits for it.
func testInFlight(t *testing.T, d *containerdtest.Daemon) {
	cfg := config(t, d)
	r := newRuntime(t, cfg)
	for i, wait := range []bool{false, true, false, true} {
		name := fmt.Sprintf("late-%d", i)
		o := enginetest.Order{State: cfg.StateDir, Address: d.Address(), Image: containerdtest.Busybox, Name: name, Point: "containerd.asked"}
		if err := enginetest.Orphan(enginetest.Bounded(t), o); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(enginetest.Bounded(t))
		defer cancel()
		made, sent := make(chan error, 1), make(chan struct{})
		late := order{cfg.Address, r.cfg.Namespace, r.id(name), t.TempDir(), r.cfg.FirstID}
		go func() {
			close(sent)
			_, err := late.ask(ctx, r.client)
			made <- err
		}()
		<-sent
		if wait { // until the daemon is about it
			enginetest.Eventually(t, "a bundle", func() bool {
				found, _ := filepath.Glob(d.Dir() + "/state/io.containerd.runtime.v2.task/*/" + r.id(name))
				return len(found) > 0
			})
		}
		if i > 1 { // as when the connection of the dead ends
			cancel()
		}
		if err := r.Destroy(enginetest.Bounded(t), name); err != nil {
			t.Error(err)
		}
		t.Logf("the late request: %v", enginetest.Wait(t, "it ends", made))
		nothingLeft(t, d, cfg.StateDir)
	}
}

// testHalfDeleted: the agent died while the daemon removed the task. The daemon
// then says that there is none, and has its shim all the same.
func testHalfDeleted(t *testing.T, d *containerdtest.Daemon) {
	cfg := config(t, d)
	cfg.Image = containerdtest.Busybox
	r := newRuntime(t, cfg)
	for i := range 6 {
		name := fmt.Sprintf("half-%d", i)
		b := enginetest.Create(t, r, name, sandbox.Spec{})
		if err := b.(*engine.Box).End(enginetest.Bounded(t)); err != nil {
			t.Fatal(err)
		}
		// A removal takes the daemon some 50 ms.
		ctx, cancel := context.WithTimeout(enginetest.Bounded(t), time.Duration(i+1)*8*time.Millisecond)
		enginetest.Eventually(t, "the daemon sees the end, or is interrupted", func() bool {
			_, err := r.client.TaskService().Delete(r.within(ctx), &tasks.DeleteTaskRequest{ContainerID: r.id(name)})
			return err == nil || ctx.Err() != nil
		})
		cancel()
		if err := r.Destroy(enginetest.Bounded(t), name); err != nil {
			t.Error(err)
		}
		nothingLeft(t, d, cfg.StateDir)
	}
}

// testCollected: a garbage collection takes neither the layers of a box nor leaves
// those of an image that is gone, and what was made before a crash goes with its
// lease.
func testCollected(t *testing.T, d *containerdtest.Daemon) {
	cfg := config(t, d)
	r := newRuntime(t, cfg)
	ctx := r.within(enginetest.Bounded(t))
	const name = "example.test/collected:1"
	img, err := d.Client().ImageService().Get(ctx, "docker.io/"+containerdtest.Busybox)
	if err != nil {
		t.Fatal(err)
	}
	img.Name = name
	if _, err := d.Client().ImageService().Create(ctx, img); err != nil {
		t.Fatal(err)
	}
	b := enginetest.Create(t, r, "box", sandbox.Spec{Image: name})
	if err := d.Client().ImageService().Delete(ctx, name); err != nil {
		t.Fatal(err)
	}
	// The lease of a box may have expired: the container holds the snapshot.
	collect(t, d, r.id("box"))
	if _, err := d.Client().SnapshotService(DefaultSnapshotter).Stat(ctx, r.id("box")); err != nil {
		t.Errorf("the snapshot of a living box after a collection: %v", err)
	}
	if out, exit := enginetest.Script(t, b, "ls /bin/busybox"); exit.Code != 0 {
		t.Errorf("the box after a collection: got %q %+v", out, exit)
	}
	// Killed before the container was made, and its lease expires.
	if err := enginetest.Orphan(ctx, enginetest.Order{State: cfg.StateDir, Address: d.Address(), Image: cfg.Image, Name: "orphan", Point: "containerd.snapshot"}); err != nil {
		t.Fatal(err)
	}
	id := r.id("orphan")
	if s, err := d.Client().SnapshotService(DefaultSnapshotter).Stat(ctx, id); err != nil || s.Kind != snapshots.KindView {
		t.Errorf("the snapshot of an orphan: got %+v, %v", s, err)
	}
	collect(t, d, id)
	if _, err := d.Client().SnapshotService(DefaultSnapshotter).Stat(ctx, id); err == nil {
		t.Error("the snapshot of an orphan after its lease: it is there")
	}
	if err := r.Destroy(ctx, "orphan"); err != nil {
		t.Error(err)
	}
}

// collect lets the lease of that name go and waits for the garbage collection.
func collect(t *testing.T, d *containerdtest.Daemon, id string) {
	t.Helper()
	if err := d.DeleteLease(enginetest.Bounded(t), id); err != nil {
		t.Fatal(err)
	}
}

func testCheck(t *testing.T, d *containerdtest.Daemon) {
	cfg := config(t, d)
	claims, err := newRuntime(t, cfg).Check(enginetest.Bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range claims {
		if !c.Enforced {
			t.Errorf("claim %+v: want all enforced", c)
		}
	}
	nothingLeft(t, d, cfg.StateDir)
	for what, change := range map[string]func(*Config){
		"image": func(c *Config) { c.Image = "mayfly-test/absent:1" }, "runtime": func(c *Config) { c.Runtime = "io.containerd.absent.v1" },
		"snapshotter": func(c *Config) { c.Snapshotter = "absent" },
	} {
		other := cfg
		change(&other)
		if _, err := newRuntime(t, other).Check(enginetest.Bounded(t)); err == nil || !strings.Contains(err.Error(), "absent") {
			t.Errorf("without the %s: got %v, want an error that names it", what, err)
		}
	}
	nothingLeft(t, d, cfg.StateDir)
}

// testNames: the contract allows names that containerd does not.
func testNames(t *testing.T, d *containerdtest.Daemon) {
	cfg := config(t, d)
	r := newRuntime(t, cfg)
	for _, name := range []string{"-", "a--b", "a-", "0123456789012345678901234567890123456789"} {
		enginetest.Create(t, r, name, sandbox.Spec{Image: containerdtest.Busybox})
		infos, err := r.List(enginetest.Bounded(t))
		if err != nil || len(infos) != 1 || infos[0].Name != name {
			t.Errorf("List: got %+v, %v, want %q", infos, err, name)
		}
		if err := r.Destroy(enginetest.Bounded(t), name); err != nil {
			t.Error(err)
		}
	}
	nothingLeft(t, d, cfg.StateDir)
}

// testLostState: boxes are found by their labels alone.
func testLostState(t *testing.T, d *containerdtest.Daemon) {
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

// testNoIDs: when all ranges are in use there is no box, and not one with less.
func testNoIDs(t *testing.T, d *containerdtest.Daemon) {
	cfg := config(t, d)
	cfg.Slots = 1
	r := newRuntime(t, cfg)
	enginetest.Create(t, r, "first", sandbox.Spec{Image: containerdtest.Busybox})
	enginetest.DestroyAfter(t, r, "second")
	if _, err := r.Create(enginetest.Bounded(t), "second", sandbox.Spec{Image: containerdtest.Busybox}); err == nil || !strings.Contains(err.Error(), "ranges are in use") {
		t.Errorf("a box without ids: got %v, want refused", err)
	}
}

func testHonestBuilds(t *testing.T, d *containerdtest.Daemon) {
	enginetest.HonestBuilds(t, enginetest.Create(t, newRuntime(t, config(t, d)), "honest", enginetest.HonestSpec()))
}
