package docker

import (
	"context"
	"strconv"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine/enginetest"
	"github.com/mayfly-ci/mayfly/sandbox/sandboxtest"
	"github.com/mayfly-ci/mayfly/test/dockertest"
)

// TestSuite: the runtime keeps the contract of all runtimes, isolation claims
// included. What it makes is gone when the suite ends.
func TestSuite(t *testing.T) {
	each(t, func(t *testing.T, e dockertest.Engine) {
		d := e.Start(t)
		cfg := config(t, d)
		t.Cleanup(func() { nothingLeft(t, d, cfg.StateDir) })
		conform(t, d, cfg, "user id range", "gvisor")
	})
}

// TestSuiteRemapped: and with a daemon that has user namespaces, all of it.
func TestSuiteRemapped(t *testing.T) { each(t, remapped) }

func remapped(t *testing.T, e dockertest.Engine) {
	d := withUsers(t, e)
	cfg := config(t, d)
	t.Cleanup(func() { nothingLeft(t, d, cfg.StateDir) })
	t.Run("root is nobody outside", func(t *testing.T) {
		b := enginetest.Create(t, newRuntime(t, cfg), "box", sandbox.Spec{})
		if out, exit := enginetest.Script(t, b, "touch /usr/bin/new /workspace/new /run/mayfly/new /etc/hosts && apt-config dump | head -1 && stat -c %u /usr/bin/new /etc/hosts /workspace && cat /proc/self/uid_map"); exit.Code != 0 || !strings.Contains(out, "\n0\n0\n0\n") || !strings.Contains(out, strconv.Itoa(dockertest.RemappedID)) {
			t.Errorf("got %q %+v, want root of a user namespace who may write", out, exit)
		}
	})
	conform(t, d, cfg)
}

// withUsers is a daemon that has user namespaces, and the image.
func withUsers(t *testing.T, e dockertest.Engine) *dockertest.Daemon {
	t.Helper()
	plain, d := dockertest.Start(t), e.StartRemapped(t)
	if err := d.CopyImage(enginetest.Bounded(t), plain, dockertest.Debian); err != nil {
		t.Fatal(err)
	}
	return d
}

// each runs a test on all engines at once.
func each(t *testing.T, test func(*testing.T, dockertest.Engine)) {
	for _, e := range dockertest.Engines() {
		t.Run(e.Name, func(t *testing.T) {
			t.Parallel()
			test(t, e)
		})
	}
}

// conform runs the suite over a configuration, of which those claims do not
// hold.
func conform(t *testing.T, d *dockertest.Daemon, cfg Config, unenforced ...string) {
	t.Helper()
	h := harness(t, d, cfg, unenforced...)
	sandboxtest.Run(t, func(*testing.T) sandboxtest.Harness { return h })
}

func harness(t *testing.T, d *dockertest.Daemon, cfg Config, unenforced ...string) sandboxtest.Harness {
	t.Helper()
	program, err := sandboxtest.BuildProbe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return sandboxtest.Harness{
		Runtime: newRuntime(t, cfg), Owner: cfg.Owner, Probe: program, Unenforced: unenforced,
		Again: func() (sandbox.Runtime, error) { return New(cfg) },
		Orphan: func(ctx context.Context, name string, s sandbox.Spec) error {
			return enginetest.Orphan(ctx, enginetest.Order{State: cfg.StateDir, Address: d.Host(), Image: cfg.Image, Name: name, Point: enginetest.PointMade, Spec: s})
		},
	}
}
