//go:build failpoint

package runner_test

import (
	"context"
	"errors"
	"hash/crc32"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/internal/failpoint"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/docker"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
	"github.com/mayfly-ci/mayfly/test/dockertest"
)

// TestCrashDocker is the crash test over boxes of Docker and the real gateway,
// with leases that are files. The agent is killed once at every point of a job,
// and a second time at every point of the recovery if the first was in this
// runtime; else at the recovery's points in this runtime and at the release of
// the box. The rest is the frame's, and TestCrashFake and TestCrashReal kill
// there: a box of Docker takes ten times as long as one of theirs.
func TestCrashDocker(t *testing.T) { crash(t, "docker") }

// startEngine gives the lane a daemon of its own.
func (s *scene) startEngine(t *testing.T) {
	s.daemon = dockertest.Start(t)
	s.Engine = s.daemon.Host()
}

// dockerRuntime is the runtime of a lane that has a daemon.
func (s *scene) dockerRuntime(owner string) (sandbox.Runtime, error) {
	program, err := guest.Binary()
	if err != nil {
		return nil, err
	}
	return docker.New(docker.Config{
		StateDir: filepath.Join(s.Dir, "docker"), Owner: owner, Guest: program, Trace: failpoint.Here,
		Host: s.Engine, Image: dockertest.Debian,
	})
}

// overEngine is an agent over a runtime of an engine, and files.
func (s *scene) overEngine(cfg *runner.Config, runtime sandbox.Runtime, err error) error {
	if err != nil {
		return err
	}
	cfg.Runtimes = map[string]sandbox.Runtime{"native": runtime} // as the policy calls it
	cfg.Issuers = map[string]creds.Issuer{"pg": fileIssuer(filepath.Join(s.Dir, "leases"))}
	cfg.Gateway, err = gateway.New(gateway.Config{Trace: failpoint.Here})
	return err
}

// dockerLeft names boxes, and what the daemon and its containers have on the
// machine. The daemon lets go of a mount or a process behind its answer, so it
// gets a moment.
func (s *scene) dockerLeft() (left []string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	// The end of ctx is no error here: left says what is wrong.
	_ = kernel.Poll(ctx, "nothing is left", func() (bool, error) {
		left, err = s.daemon.Left(context.Background())
		boxes, globErr := filepath.Glob(filepath.Join(s.Dir, "docker", "boxes", "*"))
		left, err = append(left, boxes...), errors.Join(err, globErr)
		return len(left) == 0, nil
	})
	return left, err
}

// again says whether the agent that was killed at a point is killed a second
// time at one of the recovery. Over the world of files, where all pairs take
// minutes, it always is. Where an engine is, one of the two points is at that engine;
// over the native box and PostgreSQL it is every fourth pair that has a point of
// theirs, and elsewhere every fourth. Which ones is the same in each run. All pairs of
// all worlds take longer than everything else that CI does.
func (s *scene) again(first, second string) bool {
	of := func(things ...string) bool {
		return slices.ContainsFunc(things, func(thing string) bool { return strings.HasPrefix(first, thing) || strings.HasPrefix(second, thing) })
	}
	quarter := crc32.ChecksumIEEE([]byte(first+second))%4 == 0
	switch {
	case s.Kind == "fake" && !s.Warm:
		return true
	case s.Kind == "docker":
		return !s.Warm && of("docker.", "released.box")
	case s.Kind == "containerd":
		return !s.Warm && of("containerd.", "released.box")
	case s.Kind == "real":
		return !s.Warm && quarter && of("native.", "gateway.", "postgres.", "revoked")
	}
	return quarter
}
