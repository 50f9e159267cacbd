package containerd

import (
	"context"
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine/enginetest"
	"github.com/mayfly-ci/mayfly/sandbox/sandboxtest"
	"github.com/mayfly-ci/mayfly/test/containerdtest"
)

// TestSuite: the runtime keeps the contract of all runtimes, isolation claims
// included, and with every containerd. What it makes is gone when the suite ends.
func TestSuite(t *testing.T) {
	for _, v := range containerdtest.Versions() {
		t.Run(string(v), func(t *testing.T) {
			d := containerdtest.Start(t, v)
			cfg := config(t, d)
			t.Cleanup(func() { nothingLeft(t, d, cfg.StateDir) })
			t.Run("root is nobody outside", func(t *testing.T) {
				b := enginetest.Create(t, newRuntime(t, cfg), "box", sandbox.Spec{})
				out, exit := enginetest.Script(t, b, "touch /usr/bin/new /workspace/new /run/mayfly/new /etc/hosts && apt-config dump | head -1 && stat -c %u / /usr/bin/new /usr/bin/env /etc/hosts /workspace /dev/shm && cat /proc/self/uid_map")
				if exit.Code != 0 || !strings.Contains(out, strings.Repeat("\n0", 6)+"\n") || !strings.Contains(out, "1140850688") {
					t.Errorf("got %q %+v, want root of a user namespace who may write", out, exit)
				}
			})
			conform(t, d, cfg)
		})
	}
}

// conform runs the suite over a configuration.
func conform(t *testing.T, d *containerdtest.Daemon, cfg Config) {
	t.Helper()
	h := harness(t, d, cfg)
	sandboxtest.Run(t, func(*testing.T) sandboxtest.Harness { return h })
}

func harness(t *testing.T, d *containerdtest.Daemon, cfg Config) sandboxtest.Harness {
	t.Helper()
	program, err := sandboxtest.BuildProbe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return sandboxtest.Harness{
		Runtime: newRuntime(t, cfg), Owner: cfg.Owner, Probe: program,
		Again: func() (sandbox.Runtime, error) { return New(cfg) },
		Orphan: func(ctx context.Context, name string, s sandbox.Spec) error {
			return enginetest.Orphan(ctx, enginetest.Order{State: cfg.StateDir, Address: d.Address(), Image: cfg.Image, Name: name, Point: enginetest.PointMade, Spec: s})
		},
	}
}
