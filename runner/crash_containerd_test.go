//go:build failpoint

package runner_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/runner/internal/failpoint"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/containerd"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
	"github.com/mayfly-ci/mayfly/test/containerdtest"
)

// TestCrashContainerd is TestCrashDocker over boxes of containerd.
func TestCrashContainerd(t *testing.T) { crash(t, "containerd") }

// startContainerd gives the lane a daemon of its own, of either version.
func (s *scene) startContainerd(t *testing.T) {
	versions := containerdtest.Versions()
	s.containerd = containerdtest.Start(t, versions[s.Lane%len(versions)])
	s.Engine = s.containerd.Address()
}

// containerdRuntime is the runtime of a lane that has such a daemon.
func (s *scene) containerdRuntime(owner string) (sandbox.Runtime, error) {
	program, err := guest.Binary()
	if err != nil {
		return nil, err
	}
	return containerd.New(containerd.Config{
		StateDir: filepath.Join(s.Dir, "containerd"), Owner: owner, Guest: program, Trace: failpoint.Here,
		Address: s.Engine, Image: containerdtest.Debian, FirstID: 1<<31 + uint32(s.Lane)<<20, Slots: 4,
	})
}

// containerdLeft names boxes, and what the daemon and its containers have on the
// machine. A parent of a container ends behind the daemon's answer, so it gets a
// moment.
func (s *scene) containerdLeft() (left []string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	state := filepath.Join(s.Dir, "containerd")
	sum := sha256.Sum256([]byte(state))
	// The end of ctx is no error here: left says what is wrong.
	_ = kernel.Poll(ctx, "nothing is left", func() (bool, error) {
		left, err = s.containerd.Left(context.Background(), hex.EncodeToString(sum[:6]))
		for _, pattern := range []string{"boxes", "ids"} {
			found, globErr := filepath.Glob(filepath.Join(state, pattern, "*"))
			left, err = append(left, found...), errors.Join(err, globErr)
		}
		return len(left) == 0, nil
	})
	return left, err
}
