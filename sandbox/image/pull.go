package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// together is how many layers of an image are read at once: enough to hide the
// time that a registry takes to answer, few enough for a small machine.
const together = 3

// Pull makes an image ready, as the configuration allows, and says what it is.
// Several calls for one image do the work once. Errors wrap sandbox.ErrImage
// unless the registry or this machine is to blame.
func (s *Store) Pull(ctx context.Context, p sandbox.Pull) (sandbox.Image, error) {
	n, err := ParseName(p.Image)
	if err != nil {
		return sandbox.Image{}, err
	}
	release, err := s.busy.hold(ctx, "image "+n.String())
	if err != nil {
		return sandbox.Image{}, err
	}
	defer release()
	img, err := s.pull(ctx, n, p)
	if err != nil {
		return sandbox.Image{}, fmt.Errorf("image %s: %w", n, err)
	}
	return img, nil
}

func (s *Store) pull(ctx context.Context, n Name, p sandbox.Pull) (sandbox.Image, error) {
	if s.cfg.DigestOnly && n.Digest == "" {
		return sandbox.Image{}, refuse("named by tag, and images.digest_only wants @sha256:…")
	}
	path, local := s.sourceOf(n)
	have, err := s.known(n)
	if err != nil {
		return sandbox.Image{}, err
	}
	if !local && have.origin != fromImport && !n.matches(s.cfg.From) {
		return sandbox.Image{}, refuse("no line of images.from or images.sources of this runtime allows it, and nobody imported it")
	}
	current := n.Digest != "" || have.origin == fromImport || !local && s.cfg.Pull != Always
	if have.record != nil && current {
		return have.record.answer(0), nil
	}
	if local {
		return s.fromFiles(ctx, path, n, fromSource)
	}
	if s.cfg.Pull == Never {
		return sandbox.Image{}, refuse("it is not here, and images.pull is never: import it, or name its archive in images.sources")
	}
	r, err := s.registry(n, p)
	if err != nil {
		return sandbox.Image{}, err
	}
	defer r.close()
	found, err := resolve(ctx, r)
	if err != nil {
		return sandbox.Image{}, explain(n, err)
	}
	s.cfg.Trace("image.resolved")
	img, err := s.keep(ctx, found, n.String(), fromRegistry)
	return img, explain(n, err)
}

// sourceOf is the archive or directory that a name comes from. What is named by
// digest may come from that of any tag.
func (s *Store) sourceOf(n Name) (path string, ok bool) {
	if path, ok = s.sources[n.String()]; ok || n.Digest == "" {
		return path, ok
	}
	for name, path := range s.sources {
		if other, err := ParseName(name); err == nil && other.repository() == n.repository() {
			return path, true
		}
	}
	return "", false
}

// A holding is what is here of a name.
type holding struct {
	record *record
	origin origin
}

// known looks a name up in what is here. Whoever names a digest gets what has
// it, and the origin says who vouches for the repository that it is named in.
func (s *Store) known(n Name) (holding, error) {
	b, err := load[binding](s.bindingPath(n.String()))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return holding{}, fmt.Errorf("images: %s: %w", n, err)
	}
	h := holding{origin: b.Origin}
	digest := b.Digest
	if n.Digest != "" {
		if digest == "" {
			digest = n.Digest
		}
		if h.origin, err = s.vouched(n, digest); err != nil {
			return holding{}, err
		}
	}
	if digest == "" {
		return h, nil
	}
	r, err := s.use(digest)
	if errors.Is(err, fs.ErrNotExist) {
		return holding{}, nil
	}
	if err != nil {
		return holding{}, err
	}
	h.record = &r
	return h, nil
}

// vouched says whether an operator imported that digest under a name of the
// repository.
func (s *Store) vouched(n Name, digest string) (origin, error) {
	names, err := all[binding](s.path("names"))
	if err != nil {
		return "", err
	}
	for _, b := range names {
		other, err := ParseName(b.Name)
		if err == nil && b.Origin == fromImport && b.Digest == digest && other.repository() == n.repository() {
			return fromImport, nil
		}
	}
	return "", nil
}

// Import takes an image from an archive or a layout directory, and binds a name
// to it; "" is the one that the archive has. It is for operators: neither From
// nor Sources is asked.
func (s *Store) Import(ctx context.Context, path, name string) (sandbox.Image, error) {
	var n Name
	var err error
	if name != "" {
		if n, err = ParseName(name); err != nil {
			return sandbox.Image{}, err
		}
	}
	img, err := s.fromFiles(ctx, path, n, fromImport)
	if err != nil {
		return sandbox.Image{}, fmt.Errorf("image of %s: %w", path, err)
	}
	return img, nil
}

// fromFiles reads an image from an archive or a layout directory.
func (s *Store) fromFiles(ctx context.Context, path string, n Name, from origin) (img sandbox.Image, err error) {
	f, err := local(path)
	if err != nil {
		return img, err
	}
	defer func() { err = errors.Join(err, f.close()) }()
	found, called, err := resolveLocal(ctx, f, n)
	if err != nil {
		return img, err
	}
	if n == (Name{}) {
		if n, err = ParseName(called); err != nil || called == "" {
			return img, refuse("the archive does not say what the image is called: give it a name with --name")
		}
	}
	return s.keep(ctx, found, n.String(), from)
}

// keep unpacks what is not here of an image, and writes down that it is.
func (s *Store) keep(ctx context.Context, found *resolved, name string, from origin) (sandbox.Image, error) {
	b := &budget{left: size{s.cfg.MaxBytes, s.cfg.MaxFiles}}
	b.all = b.left
	transferred, err := s.layers(ctx, found.layers, b)
	if err != nil {
		return sandbox.Image{}, err
	}
	c := found.config.Config
	r := record{
		Digest: found.digest, Bytes: b.all.Bytes - b.left.Bytes,
		Env: c.Env, Entrypoint: c.Entrypoint, Cmd: c.Cmd, User: c.User, WorkingDir: c.WorkingDir,
	}
	for _, l := range found.layers {
		r.Layers = append(r.Layers, l.diff)
	}
	if err := s.save(ctx, s.recordPath(r.Digest), r); err != nil {
		return sandbox.Image{}, err
	}
	s.cfg.Trace("image.recorded")
	if err := s.save(ctx, s.bindingPath(name), binding{name, r.Digest, from, time.Now()}); err != nil {
		return sandbox.Image{}, err
	}
	s.cfg.Trace("image.named")
	for _, l := range r.Layers {
		if _, err := os.Stat(s.path("layers", l)); err != nil {
			return sandbox.Image{}, fmt.Errorf("layer was removed meanwhile: %w", err)
		}
	}
	if transferred > 0 {
		if _, err := s.Prune(ctx); err != nil {
			return sandbox.Image{}, err
		}
	}
	return r.answer(transferred), nil
}

// layers unpacks layers, some at once, and returns how much was transferred.
func (s *Store) layers(ctx context.Context, ls []layer, b *budget) (int64, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var sum atomic.Int64
	var wg sync.WaitGroup
	slots := make(chan struct{}, together)
	var once []string
	for _, l := range ls {
		if slices.Contains(once, l.diff) {
			continue // an empty layer comes several times
		}
		once = append(once, l.diff)
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			if ctx.Err() != nil {
				return
			}
			n, err := s.ready(ctx, l, b)
			sum.Add(n)
			if err != nil {
				cancel(err)
			}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return sum.Load(), context.Cause(ctx)
	}
	return sum.Load(), nil
}
