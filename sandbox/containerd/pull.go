package containerd

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine"
)

// labelPulled marks the name of an image that Pull made, by its digest.
const labelPulled = "ci.mayfly.pulled"

// pulledAge is how long such a name keeps the content of an image, that no tag
// keeps, after it was last pulled. Boxes keep theirs by themselves.
const pulledAge = 7 * 24 * time.Hour

// Pull implements sandbox.Puller; the image "" is that of the configuration. The
// image is fetched by this process, which so keeps the password to itself, and is
// stored and unpacked by containerd, which checks each digest. User and password
// go to the registry of the image's name, or where that sends it for a token.
func (r *Runtime) Pull(ctx context.Context, p sandbox.Pull) (sandbox.Image, error) {
	p.Image = cmp.Or(p.Image, r.cfg.Image)
	got, err := r.pull(r.within(ctx), p, r.cfg.Images.Pull)
	if err != nil {
		return sandbox.Image{}, fmt.Errorf("containerd: image %.300s: %w", p.Image, refused(err))
	}
	return got, nil
}

// refused adds sandbox.ErrImage to what a registry, or the content of an image,
// says for good.
func refused(err error) error {
	for _, is := range []func(error) bool{errdefs.IsNotFound, errdefs.IsFailedPrecondition, errdefs.IsInvalidArgument, errdefs.IsNotImplemented} {
		if is(err) {
			return fmt.Errorf("%w: %w", err, sandbox.ErrImage)
		}
	}
	var answer remoteerrors.ErrUnexpectedStatus
	if errors.Is(err, docker.ErrInvalidAuthorization) || errors.As(err, &answer) && (answer.StatusCode == http.StatusUnauthorized || answer.StatusCode == http.StatusForbidden) {
		return fmt.Errorf("%w: %w", err, sandbox.ErrImage)
	}
	return err
}

func (r *Runtime) pull(ctx context.Context, p sandbox.Pull, when engine.When) (out sandbox.Image, err error) {
	if err := r.cfg.Images.Allow(p.Image); err != nil {
		return out, err
	}
	name, err := engine.ParseName(p.Image)
	if err != nil {
		return out, err
	}
	if name.Repository == "" {
		return out, fmt.Errorf("it is a digest without the name of a repository: %w", sandbox.ErrImage)
	}
	if _, err := r.reach(ctx); err != nil {
		return out, err
	}
	may := r.cfg.Images.Pulls(name)
	img, err := r.here(ctx, name)
	if err != nil && !errdefs.IsNotFound(err) {
		return out, err
	}
	switch found := err == nil; {
	case may && (!found || when == engine.Always && name.Digest == ""):
		if img, out.Size, err = r.fetch(ctx, name, p); err != nil {
			return out, err
		}
	case !found:
		return out, fmt.Errorf("%w: it is not in the namespace %s of containerd, and may not be pulled: import it with ctr -n %[2]s images import, or allow it with images.from and images.pull", sandbox.ErrImage, r.cfg.Namespace)
	}
	if err := r.unpack(ctx, img); err != nil {
		return out, err
	}
	manifest, err := r.manifest(ctx, img)
	if err != nil {
		return out, err
	}
	out.Digest = manifest.Digest.String()
	if out.Ref, err = r.pin(ctx, name, manifest); err != nil {
		return out, err
	}
	return out, errors.Join(describe(ctx, img, &out), r.prune(ctx, pulledAge))
}

// here is an image of which all is on this machine.
func (r *Runtime) here(ctx context.Context, name engine.Name) (client.Image, error) {
	img, err := r.client.GetImage(ctx, name.Full)
	if err != nil {
		return nil, err
	}
	done, err := img.IsUnpacked(ctx, r.cfg.Snapshotter)
	if err == nil && !done {
		available, _, _, missing, checkErr := images.Check(ctx, img.ContentStore(), img.Target(), platforms.Only(platforms.DefaultSpec()))
		if err = checkErr; err == nil && (!available || len(missing) > 0) {
			err = fmt.Errorf("%d parts of it: %w", len(missing), errdefs.ErrNotFound)
		}
	}
	return img, err
}

// describe says what an image asks for.
func describe(ctx context.Context, img client.Image, out *sandbox.Image) error {
	spec, err := img.Spec(ctx)
	if err != nil {
		return err
	}
	c := spec.Config
	out.Env, out.Entrypoint, out.Cmd, out.User, out.Dir = c.Env, c.Entrypoint, c.Cmd, c.User, c.WorkingDir
	for _, word := range slices.Concat(c.Env, c.Entrypoint, c.Cmd, []string{c.User, c.WorkingDir}) {
		if strings.Contains(word, "\x00") {
			return fmt.Errorf("its configuration has a zero byte in %.100q: %w", word, sandbox.ErrImage)
		}
	}
	return nil
}

// fetch asks the registry of that name, and tells it, and nobody else, who asks.
// A registry on a loopback address may speak plain HTTP.
func (r *Runtime) fetch(ctx context.Context, name engine.Name, p sandbox.Pull) (client.Image, int64, error) {
	registry, err := docker.DefaultHost(name.Registry)
	if err != nil {
		return nil, 0, err
	}
	transport := docker.DefaultHTTPTransport(nil)
	transport.Proxy = nil // of the environment
	web := &http.Client{Transport: transport}
	if r.cfg.Images.Out != nil {
		web.Transport = r.cfg.Images.Out(transport)
	}
	defer transport.CloseIdleConnections()
	who := func(host string) (string, string, error) {
		if host != registry {
			return "", "", nil
		}
		return p.User, p.Password.Reveal(), nil
	}
	hosts := docker.ConfigureDefaultRegistries(docker.WithClient(web), docker.WithPlainHTTP(docker.MatchLocalhost),
		docker.WithAuthorizer(docker.NewDockerAuthorizer(docker.WithAuthClient(web), docker.WithAuthCreds(who))))
	var size atomic.Int64
	count := images.HandlerFunc(func(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		if _, err := r.client.ContentStore().Info(ctx, d.Digest); errdefs.IsNotFound(err) {
			size.Add(d.Size)
		}
		return nil, nil
	})
	var labels map[string]string
	if name.Digest != "" { // a tag stays until it moves on
		labels = map[string]string{labelPulled: r.state.ID}
	}
	img, err := r.client.Pull(ctx, name.Full, client.WithPullLabels(labels), client.WithResolver(docker.NewResolver(docker.ResolverOptions{Hosts: hosts})),
		client.WithPlatformMatcher(platforms.Only(platforms.DefaultSpec())), client.WithImageHandler(count),
		client.WithPullUnpack, client.WithPullSnapshotter(r.cfg.Snapshotter))
	return img, size.Load(), err
}

// manifest is that for this machine.
func (r *Runtime) manifest(ctx context.Context, img client.Image) (ocispec.Descriptor, error) {
	target, platform := img.Target(), platforms.Only(platforms.DefaultSpec())
	if !images.IsIndexType(target.MediaType) {
		return target, nil
	}
	b, err := content.ReadBlob(ctx, img.ContentStore(), target)
	if err != nil {
		return target, err
	}
	var index ocispec.Index
	if err := json.Unmarshal(b, &index); err != nil {
		return target, fmt.Errorf("index %s: %w: %w", target.Digest, err, sandbox.ErrImage)
	}
	// As containerd chooses: the best that matches, and of equals the first.
	best := -1
	for i, m := range index.Manifests {
		if images.IsManifestType(m.MediaType) && (m.Platform == nil || platform.Match(*m.Platform)) {
			if best < 0 || m.Platform != nil && index.Manifests[best].Platform != nil && platform.Less(*m.Platform, *index.Manifests[best].Platform) {
				best = i
			}
		}
	}
	if best < 0 {
		return target, fmt.Errorf("index %s has no manifest for %s: %w", target.Digest, platforms.DefaultString(), sandbox.ErrImage)
	}
	return index.Manifests[best], nil
}

// pin names the manifest by its digest, so that it stays when its tag moves on,
// and returns that name.
func (r *Runtime) pin(ctx context.Context, name engine.Name, manifest ocispec.Descriptor) (string, error) {
	img := images.Image{Name: name.Repository + "@" + manifest.Digest.String(), Target: manifest, Labels: map[string]string{labelPulled: r.state.ID}}
	service := r.client.ImageService()
	_, err := service.Create(ctx, img)
	if errdefs.IsAlreadyExists(err) { // it is used again
		_, err = service.Update(ctx, img, "labels."+labelPulled)
	}
	return img.Name, err
}

// prune lets go of what was last pulled that long ago, the base excepted.
func (r *Runtime) prune(ctx context.Context, age time.Duration) error {
	all, err := r.client.ImageService().List(ctx, fmt.Sprintf("labels.%q==%s", labelPulled, r.state.ID))
	base, _ := engine.ParseName(r.cfg.Image) // as somebody has tagged it, if it is none
	for _, img := range all {
		if img.Name != base.Full && time.Since(img.UpdatedAt) > age {
			err = errors.Join(err, ignore(r.client.ImageService().Delete(ctx, img.Name), errdefs.IsNotFound))
		}
	}
	return err
}

// unpack has the snapshotter unpack an image, if it has not.
func (r *Runtime) unpack(ctx context.Context, img client.Image) error {
	done, err := img.IsUnpacked(ctx, r.cfg.Snapshotter)
	if err == nil && !done {
		err = img.Unpack(ctx, r.cfg.Snapshotter)
	}
	if err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	return nil
}

// unpacked is the name of the snapshot of an image that is here.
func (r *Runtime) unpacked(ctx context.Context, image string) (digest.Digest, error) {
	name := image
	if n, err := engine.ParseName(image); err == nil {
		name = n.Full
	}
	img, err := r.client.GetImage(ctx, name)
	if errdefs.IsNotFound(err) && name != image {
		img, err = r.client.GetImage(ctx, image) // as somebody has tagged it
	}
	if errdefs.IsNotFound(err) {
		return "", fmt.Errorf("image %s is not in the namespace %s of containerd: ctr -n %[2]s images pull or import it first: %w: %w", image, r.cfg.Namespace, err, sandbox.ErrUnsupported)
	}
	if err != nil {
		return "", fmt.Errorf("image %s: %w", image, err)
	}
	if err := r.unpack(ctx, img); err != nil {
		return "", fmt.Errorf("image %s: %w", image, err)
	}
	layers, err := img.RootFS(ctx)
	if err != nil {
		return "", fmt.Errorf("image %s: %w", image, err)
	}
	return identity.ChainID(layers), nil
}
