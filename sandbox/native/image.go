package native

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/image"
	"github.com/mayfly-ci/mayfly/sandbox/native/boxinit"
)

// errNoImages is why an unprivileged runtime has none: it maps one id, and the
// files of an image have many.
var errNoImages = fmt.Errorf("an image needs root, whose boxes have ids of their own: run the agent as root: %w", sandbox.ErrUnsupported)

// openImages opens the store, which removes what a dead agent left half done.
func (r *Runtime) openImages() error {
	cfg := r.cfg.Images
	cfg.Dir, cfg.InUse, cfg.Trace = filepath.Join(r.cfg.StateDir, "images"), r.imagesInUse, r.cfg.Trace
	var err error
	if r.images, err = image.Open(cfg); err != nil {
		return fmt.Errorf("native: %w", err)
	}
	return nil
}

// Images is the store of the runtime, for the operator's commands; nil if the
// runtime is unprivileged.
func (r *Runtime) Images() *image.Store { return r.images }

// Pull implements sandbox.Puller.
func (r *Runtime) Pull(ctx context.Context, p sandbox.Pull) (sandbox.Image, error) {
	if p.Image == "" {
		return sandbox.Image{}, nil // the host's base is no image
	}
	if r.images == nil {
		return sandbox.Image{}, fmt.Errorf("native: image %s: %w", p.Image, errNoImages)
	}
	img, err := r.images.Pull(ctx, p)
	if err != nil {
		return sandbox.Image{}, fmt.Errorf("native: %w", err)
	}
	return img, nil
}

// imagesInUse are the images that boxes are made of, by the records. A box whose
// record is not whole has nothing mounted yet.
func (r *Runtime) imagesInUse() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(r.cfg.StateDir, "boxes"))
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(r.dir(e.Name()), "box.json"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		var rec record
		if json.Unmarshal(b, &rec) == nil && rec.Image != "" {
			out = append(out, rec.Image)
		}
	}
	return out, nil
}

// planImage is the Setup of a box made of an image: nothing of the host's base.
func (r *Runtime) planImage(s sandbox.Spec) *boxinit.Setup {
	own := identity()
	return &boxinit.Setup{
		Layers: mountsOf(s), RunBytes: runBytes, ShmBytes: shmBytes, Files: maxFiles, Expires: expires(s), Filter: r.filter,
		Etc: []boxinit.File{{Name: "hosts", Content: own.hosts}, {Name: "hostname", Content: own.hostname}, {Name: "resolv.conf", Content: own.resolv}},
	}
}
