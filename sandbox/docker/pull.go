package docker

import (
	"bufio"
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/api/types/registry"
	"github.com/docker/docker/client"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine"
)

const (
	// pullTries is how often a pull is begun, if the daemon goes away meanwhile.
	// It keeps the layers that it has.
	pullTries = 3
	// maxProgress bounds a line of what the daemon says about a pull, and maxLayers
	// of how many layers: the engines refuse images with more than 128.
	maxProgress = 1 << 20
	maxLayers   = 1024
	// maxSaid bounds what an error repeats of the daemon's and the registry's words.
	maxSaid = 1000
)

// errCut reports that the daemon went away in the middle of a pull.
var errCut = errors.New("the daemon went away during the pull")

// Pull implements sandbox.Puller; the image "" is that of the configuration. The
// daemon pulls, and checks that each byte is what its digest says; what it then
// has must be what was asked for. User and password go to it in one header of
// one request, and it uses them at the registry of the image's name, or where
// that sends it for a token.
func (r *Runtime) Pull(ctx context.Context, p sandbox.Pull) (sandbox.Image, error) {
	p.Image = cmp.Or(p.Image, r.cfg.Image)
	got, err := r.pull(ctx, p, r.cfg.Images.Pull)
	if err != nil {
		return sandbox.Image{}, fmt.Errorf("docker: image %.300s: %w", p.Image, err)
	}
	return got, nil
}

func (r *Runtime) pull(ctx context.Context, p sandbox.Pull, when engine.When) (sandbox.Image, error) {
	if err := r.cfg.Images.Allow(p.Image); err != nil {
		return sandbox.Image{}, err
	}
	n, err := engine.ParseName(p.Image)
	if err != nil {
		return sandbox.Image{}, err
	}
	may := r.cfg.Images.Pulls(n)
	if when != engine.Always || n.Digest != "" || !may {
		found, err := r.inspect(ctx, n)
		if err == nil {
			return describe(found, n)
		}
		if !errdefs.IsNotFound(err) {
			return sandbox.Image{}, err
		}
	}
	if !may {
		return sandbox.Image{}, fmt.Errorf("%w: it is not on this machine, and may not be pulled: pull or load it with docker, or allow it with images.from and images.pull", sandbox.ErrImage)
	}
	came, err := r.fetch(ctx, n, p)
	if err != nil {
		return sandbox.Image{}, err
	}
	// The tag may mean something else by now.
	n.Digest, n.Full = came.digest, n.Repository+"@"+came.digest
	found, err := r.inspect(ctx, n)
	if err != nil {
		return sandbox.Image{}, fmt.Errorf("pulled as %s, and then: %w", came.digest, err)
	}
	got, err := describe(found, n)
	got.Size = came.size()
	if err == nil && came.silent {
		got.Size = max(got.Size, r.content(ctx, got.Ref))
	}
	return got, err
}

func (r *Runtime) inspect(ctx context.Context, n engine.Name) (found image.InspectResponse, err error) {
	err = r.patiently(ctx, func() (err error) {
		found, err = r.engine.ImageInspect(ctx, n.Full)
		return err
	})
	return found, err
}

// fetch has the daemon pull an image.
func (r *Runtime) fetch(ctx context.Context, n engine.Name, p sandbox.Pull) (got *progress, err error) {
	auth, hide, err := authorization(n, p)
	if err != nil {
		return nil, err
	}
	for range pullTries {
		if err = r.reach(ctx); err != nil {
			return nil, err
		}
		got, err = r.fetchOnce(ctx, n, auth)
		if !errors.Is(err, errCut) && !client.IsErrConnectionFailed(err) || ctx.Err() != nil {
			break
		}
	}
	switch {
	case err == nil && n.Digest != "" && got.digest != n.Digest:
		return nil, fmt.Errorf("%w: the daemon pulled %s instead", sandbox.ErrImage, got.digest)
	case err == nil:
		return got, nil
	case ctx.Err() != nil:
		return nil, fmt.Errorf("pull: %w", context.Cause(ctx))
	}
	said := strings.ToValidUTF8(hide.Replace(err.Error()), "?")
	if len(said) > maxSaid {
		said = said[:maxSaid] + "…"
	}
	if refusal(err) {
		return nil, fmt.Errorf("%w: the daemon cannot pull it: %s", sandbox.ErrImage, said)
	}
	return nil, fmt.Errorf("the daemon cannot pull it: %s", said)
}

// authorization is the header that the daemon takes credentials from, and what
// hides them in its words, which may be those of a registry.
func authorization(n engine.Name, p sandbox.Pull) (header string, hide *strings.Replacer, err error) {
	if p.User == "" && p.Password.IsZero() {
		return "", strings.NewReplacer(), nil
	}
	password, server := p.Password.Reveal(), n.Registry
	if server == "docker.io" {
		server = "https://index.docker.io/v1/" // its name among credentials, since ever
	}
	header, err = registry.EncodeAuthConfig(registry.AuthConfig{Username: p.User, Password: password, ServerAddress: server})
	if err != nil {
		return "", nil, errors.New("the credentials cannot be encoded")
	}
	shown := []string{header, "***"}
	for _, s := range []string{base64.StdEncoding.EncodeToString([]byte(p.User + ":" + password)), password} {
		if s != "" {
			shown = append(shown, s, "***")
		}
	}
	return header, strings.NewReplacer(shown...), nil
}

// refusal reports whether the registry, or the daemon for it, says that there is
// no such image for us, or that it is not what its digest says.
func refusal(err error) bool {
	if errdefs.IsNotFound(err) || errdefs.IsUnauthorized(err) || errdefs.IsPermissionDenied(err) {
		return true
	}
	// The words of both kinds of engine, which say the rest with status 500 or
	// in the middle of a pull.
	said := strings.ToLower(err.Error())
	for _, words := range []string{
		"manifest unknown", "not found", "unauthorized", "denied", "no basic auth credentials",
		"verification failed", "does not match", "unexpected digest", "unexpected commit digest", "digest mismatch",
	} {
		if strings.Contains(said, words) {
			return true
		}
	}
	return false
}

func (r *Runtime) fetchOnce(ctx context.Context, n engine.Name, auth string) (*progress, error) {
	body, err := r.engine.ImagePull(ctx, n.Full, image.PullOptions{RegistryAuth: auth})
	if err != nil {
		return nil, err
	}
	got, err := follow(body)
	return got, errors.Join(err, body.Close())
}

// A report is a line of what the daemon says while it pulls.
type report struct {
	Status   string
	ID       string                         // of a layer, short
	Progress struct{ Current, Total int64 } `json:"progressDetail"`
	Failure  string                         `json:"error"`
	Detail   struct{ Message string }       `json:"errorDetail"`
}

// progress is what a daemon has said about a pull.
type progress struct {
	digest string
	layers map[string]int64 // bytes of those that came over
	silent bool             // of one the daemon did not say how many
}

func (p *progress) size() (n int64) {
	for _, l := range p.layers {
		n += l
	}
	return n
}

func (p *progress) take(line report) {
	if d, ok := strings.CutPrefix(line.Status, "Digest: "); ok {
		p.digest = d
	}
	has, known := p.layers[line.ID]
	switch line.Status {
	case "Downloading":
		// The last of these lines is often left out, so that what counts is the
		// size of the layer.
		if n := max(line.Progress.Current, line.Progress.Total); n > has && (known || len(p.layers) < maxLayers) {
			p.layers[line.ID] = n
		}
	case "Download complete":
		p.silent = p.silent || !known
	}
}

// follow reads what the daemon says about a pull, to its end.
func follow(body io.Reader) (*progress, error) {
	p := &progress{layers: map[string]int64{}}
	lines := bufio.NewScanner(body)
	lines.Buffer(nil, maxProgress)
	for lines.Scan() {
		if strings.TrimSpace(lines.Text()) == "" {
			continue
		}
		var line report
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			return p, fmt.Errorf("the daemon's answer: %w", err)
		}
		switch said := cmp.Or(line.Detail.Message, line.Failure); {
		case strings.Contains(said, "context canceled"): // not ours: it is ending
			return p, fmt.Errorf("%w: %s", errCut, said)
		case said != "":
			return p, errors.New(said)
		}
		p.take(line)
	}
	switch err := lines.Err(); {
	case errors.Is(err, bufio.ErrTooLong):
		return p, fmt.Errorf("the daemon's answer: a line of more than %d bytes", maxProgress)
	case err != nil:
		return p, fmt.Errorf("%w: %w", errCut, err)
	case !engine.IsDigest(p.digest):
		return p, fmt.Errorf("the daemon's answer: it ends without a digest, but with %.100q", p.digest)
	}
	return p, nil
}

// content is the size of what an engine with containerd has of an image, packed
// as it came over. Such a daemon does not say how large a layer is that comes
// quickly.
func (r *Runtime) content(ctx context.Context, id string) int64 {
	found, err := r.engine.ImageInspect(ctx, id, client.ImageInspectWithManifests(true))
	if err != nil {
		return 0 // an engine without; the image is good all the same
	}
	var n int64
	for _, m := range found.Manifests {
		if m.Available {
			n += m.Size.Content
		}
	}
	return n
}
