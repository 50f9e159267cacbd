package containerd

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"os"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine/enginetest"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/gvisor"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
	"github.com/mayfly-ci/mayfly/test/containerdtest"
	"github.com/mayfly-ci/mayfly/test/servertest"
)

func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == AskArg {
		if err := Ask(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	enginetest.Child(func(o enginetest.Order, trace func(string)) (sandbox.Runtime, error) {
		cfg, err := testConfig(o.State, o.Address)
		if err != nil {
			return nil, err
		}
		cfg.Image, cfg.Trace = o.Image, trace
		return New(cfg)
	})
	runsc, err := servertest.Runsc(context.Background())
	// They wait for the daemon most of the time, and not for a processor.
	if err := errors.Join(err, os.Setenv(runscEnv, runsc), flag.Set("test.parallel", "4")); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// runscEnv is where gVisor's runsc lies.
const runscEnv = "MAYFLY_CONTAINERD_RUNSC"

// config is that of a runtime with a state directory of its own.
func config(t testing.TB, d *containerdtest.Daemon) Config {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("these tests start a daemon and enter its containers: run them as root")
	}
	c, err := testConfig(t.TempDir(), d.Address())
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func testConfig(state, address string) (Config, error) {
	program, err := guest.Binary()
	return Config{
		StateDir: state, Owner: "test", Guest: program, Address: address, Image: containerdtest.Debian, GVisor: gvisor.Config{Runsc: os.Getenv(runscEnv)},
		Ask:    []string{"/proc/self/exe", AskArg},
		Limits: sandbox.Limits{Memory: 512 << 20, Pids: 512, MilliCPU: 2000, Disk: 1 << 30, Inodes: 50_000},
	}, err
}

func newRuntime(t testing.TB, cfg Config) *Runtime {
	t.Helper()
	r, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// leftovers lists what the boxes of a state directory, on a daemon of the test's
// own, have on the machine.
func leftovers(t testing.TB, d *containerdtest.Daemon, state string) []string {
	t.Helper()
	sum := sha256.Sum256([]byte(state))
	out, err := d.Left(enginetest.Bounded(t), hex.EncodeToString(sum[:6]))
	if err != nil {
		t.Fatal(err)
	}
	return append(out, enginetest.OfState(t, state)...)
}

// nothingLeft wants the machine as it was.
func nothingLeft(t testing.TB, d *containerdtest.Daemon, state string) {
	t.Helper()
	var left []string
	ctx, cancel := context.WithTimeout(enginetest.Bounded(t), time.Minute)
	defer cancel()
	// A parent of a container ends behind the daemon's answer.
	if err := kernel.Poll(ctx, "nothing is left", func() (bool, error) {
		left = leftovers(t, d, state)
		return len(left) == 0, nil
	}); err != nil {
		t.Errorf("after Destroy: %q is left", left)
	}
}
