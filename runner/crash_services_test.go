//go:build failpoint

package runner_test

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/mayfly-ci/mayfly/runner/internal/failpoint"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/sandboxtest"
)

// TestCrashServices is the crash test of a job with two services, over files.
func TestCrashServices(t *testing.T) { crash(t, "services") }

const crashServices = `    services:
      db: {image: postgres, options: --health-cmd 'print healthy'}
      cache: {image: redis, ports: [5432]}
`

// overImages is the fake with images.
func (s *scene) overImages() sandbox.Runtime {
	return fakeImages{&sandboxtest.Fake{Dir: filepath.Join(s.Dir, "boxes"), Trace: failpoint.Here}}
}

type fakeImages struct{ *sandboxtest.Fake }

func (fakeImages) Pull(_ context.Context, p sandbox.Pull) (sandbox.Image, error) {
	failpoint.Here("fake.image.pulled")
	return sandbox.Image{Ref: p.Image, Digest: "sha256:0", Entrypoint: []string{"/bin/sh", "-c", "block"}}, nil
}
