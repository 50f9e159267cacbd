package containerdtest_test

import (
	"testing"

	"github.com/mayfly-ci/mayfly/test/containerdtest"
)

// TestDaemon: a daemon has its images, unpacked, is killed and comes back.
func TestDaemon(t *testing.T) {
	for _, v := range containerdtest.Versions() {
		t.Run(string(v), func(t *testing.T) {
			d := containerdtest.Start(t, v)
			ctx := t.Context()
			for _, name := range []string{containerdtest.Debian, containerdtest.Busybox} {
				img, err := d.Client().GetImage(ctx, "docker.io/"+name)
				if err != nil {
					t.Fatal(err)
				}
				if ok, err := img.IsUnpacked(ctx, "overlayfs"); err != nil || !ok {
					t.Errorf("%s: unpacked %v, %v", name, ok, err)
				}
			}
			if left, err := d.Left(ctx, "none"); err != nil || len(left) > 0 {
				t.Errorf("of no container is left: got %q, %v, want nothing", left, err)
			}
			if err := d.Kill(ctx); err != nil {
				t.Fatal(err)
			}
			if _, err := d.Client().Version(ctx); err == nil {
				t.Error("a killed daemon answers")
			}
			if err := d.Restart(ctx); err != nil {
				t.Fatal(err)
			}
		})
	}
}
