package containerdtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/test/dockertest"
)

// templateVersion names what a template holds; raise it with the images.
const templateVersion = 1

// Prepare makes the images if they are not there, which takes minutes and the
// network, once. It is for TestMain of tests that run without either.
func Prepare() error {
	_, err := template(context.Background())
	return errors.Join(err, func() error { _, err := built(context.Background()); return err }())
}

// template is the data directory of a daemon that has the images. Whoever is
// first makes it, the others wait; renaming makes it appear whole.
func template(ctx context.Context) (_ string, err error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	parent := filepath.Join(cache, "mayfly", "containerd-images")
	if err := os.MkdirAll(parent, 0o711); err != nil {
		return "", err
	}
	lock, err := os.OpenFile(filepath.Join(parent, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", err
	}
	dir := filepath.Join(parent, fmt.Sprintf("data-%s-%d", runtime.GOARCH, templateVersion))
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return dir, err
	}
	work, err := os.MkdirTemp("", "mayfly-containerdtest-images-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	data, err := makeImages(ctx, work)
	if err != nil {
		return "", err
	}
	unfinished := dir + ".new"
	if err := os.RemoveAll(unfinished); err != nil {
		return "", err
	}
	if err := copyData(ctx, data, unfinished); err != nil {
		return "", err
	}
	return dir, os.Rename(unfinished, dir)
}

// makeImages takes them from a Docker daemon, below work, into the data of
// Debian's containerd, which every newer one reads. It returns that directory.
func makeImages(ctx context.Context, work string) (string, error) {
	engine, err := dockertest.New(ctx, filepath.Join(work, "docker"))
	if err != nil {
		return "", err
	}
	d, err := empty(ctx, filepath.Join(work, "containerd"), Packaged)
	if err == nil {
		err = d.start(ctx)
	}
	if err != nil {
		return "", errors.Join(err, engine.Close())
	}
	r, w := io.Pipe()
	go func() { _ = w.CloseWithError(engine.Save(ctx, w, Debian, Busybox)) }() // Import hears of it
	ctx = namespaces.WithNamespace(ctx, Namespace)
	images, err := d.client.Import(ctx, r)
	err = errors.Join(err, r.Close())
	for _, img := range images {
		if err == nil {
			err = client.NewImage(d.client, img).Unpack(ctx, "overlayfs")
		}
	}
	if err == nil {
		err = d.Stop(ctx)
	}
	data := filepath.Join(work, "data")
	if err == nil {
		err = os.Rename(d.data(), data)
	}
	return data, errors.Join(err, d.Close(), engine.Close())
}

// Import takes images from an archive, as "docker save" makes one.
func (d *Daemon) Import(ctx context.Context, archive io.Reader) error {
	if _, err := d.client.Import(namespaces.WithNamespace(ctx, Namespace), archive); err != nil {
		return fmt.Errorf("containerdtest: import: %w", err)
	}
	return nil
}

// copyData copies the data of a daemon that has stopped. Layers and blobs never
// change, so their files are links if the file system is the same; databases do.
func copyData(ctx context.Context, from, to string) error {
	const script = `cp -al "$1" "$2" 2>/dev/null || { rm -rf "$2"; cp -a "$1" "$2"; }
cd "$1"; find . -name "*.db" | while read -r f; do rm "$2/$f"; cp -a "$f" "$2/$f"; done`
	if out, err := exec.CommandContext(ctx, "/bin/sh", "-ec", script, "sh", from, to).CombinedOutput(); err != nil {
		return fmt.Errorf("copy images: %w: %s", err, out)
	}
	return nil
}
