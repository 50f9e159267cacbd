package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/mayfly-ci/mayfly/sandbox"
)

const (
	// maxManifest bounds a manifest, an index and a configuration: registries
	// take 4 MiB (distribution-spec, "Pushing Manifests").
	maxManifest = 4 << 20
	// maxDepth bounds indexes in indexes. Real ones have one.
	maxDepth = 4
)

// A source is a place that images are read from. Nothing that it gives is
// believed: the caller checks it against the digest that it asked for.
type source interface {
	// root is the image, or an index of images. Its digest is the source's word
	// for a tag, and what was asked for otherwise.
	root(ctx context.Context) (v1.Descriptor, error)
	// manifest is an image's or an index, at most maxManifest and a byte.
	manifest(ctx context.Context, d v1.Descriptor) ([]byte, error)
	// blob is a configuration or a layer.
	blob(ctx context.Context, d v1.Descriptor) (io.ReadCloser, error)
}

// A resolved image is one whose manifest and configuration are what their
// digests say.
type resolved struct {
	digest string // of the manifest for this machine
	config v1.ConfigFile
	layers []layer // lowest first
}

// A layer is yet to be read.
type layer struct {
	diff string // digest of what was packed, hexadecimal
	blob v1.Descriptor
	open func(ctx context.Context) (io.ReadCloser, error)
}

// resolve finds the image for this machine.
func resolve(ctx context.Context, src source) (*resolved, error) {
	root, err := src.root(ctx)
	if err != nil {
		return nil, err
	}
	d, m, err := findManifest(ctx, src, root)
	if err != nil {
		return nil, err
	}
	raw, err := readBlob(ctx, src, m.Config)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	config, err := parseConfig(raw)
	if err != nil {
		return nil, err
	}
	if len(config.RootFS.DiffIDs) != len(m.Layers) {
		return nil, refuse("manifest has %d layers and its configuration %d", len(m.Layers), len(config.RootFS.DiffIDs))
	}
	r := &resolved{digest: d.Digest.String(), config: *config}
	for i, l := range m.Layers {
		switch l.MediaType {
		case types.DockerLayer, types.DockerUncompressedLayer, types.OCILayer, types.OCIUncompressedLayer, types.OCILayerZStd:
		default:
			return nil, refuse("layer %d is of type %.100q: an image of a machine has tar, tar+gzip or tar+zstd", i, l.MediaType)
		}
		if l.Digest.Algorithm != "sha256" || !isHex(l.Digest.Hex) || l.Size < 0 {
			return nil, refuse("layer %d: digest %.100q or size %d is malformed", i, l.Digest, l.Size)
		}
		open := func(ctx context.Context) (io.ReadCloser, error) { return src.blob(ctx, l) }
		r.layers = append(r.layers, layer{config.RootFS.DiffIDs[i].Hex, l, open})
	}
	return r, nil
}

// findManifest goes from an index to the manifest for this machine.
func findManifest(ctx context.Context, src source, d v1.Descriptor) (v1.Descriptor, *v1.Manifest, error) {
	for range maxDepth {
		raw, err := src.manifest(ctx, d)
		if err == nil {
			err = check(raw, d)
		}
		if err != nil {
			return d, nil, fmt.Errorf("manifest: %w", err)
		}
		index, manifest, err := parseManifest(raw, d.MediaType)
		if err != nil {
			return d, nil, err
		}
		if manifest != nil {
			return d, manifest, nil
		}
		if d, err = choose(index.Manifests); err != nil {
			return d, nil, err
		}
	}
	return d, nil, refuse("index in index, more than %d deep", maxDepth)
}

// check says whether b is what d names.
func check(b []byte, d v1.Descriptor) error {
	sum := sha256.Sum256(b)
	if got := "sha256:" + hex.EncodeToString(sum[:]); got != d.Digest.String() {
		return refuse("its digest is %s and not %.100s", got, d.Digest)
	}
	if d.Size > 0 && int64(len(b)) != d.Size {
		return refuse("it has %d bytes and not %d", len(b), d.Size)
	}
	return nil
}

// parseManifest reads either an index or a manifest. A text that is both would
// be one for us and the other for somebody else (CVE-2021-41190).
func parseManifest(raw []byte, said types.MediaType) (*v1.IndexManifest, *v1.Manifest, error) {
	var shape struct {
		MediaType types.MediaType `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
		Layers    json.RawMessage `json:"layers"`
		Config    json.RawMessage `json:"config"`
	}
	if err := json.Unmarshal(raw, &shape); err != nil {
		return nil, nil, refuse("manifest: %w", err)
	}
	kind := said
	if kind == "" {
		kind = shape.MediaType
	}
	if shape.MediaType != "" && shape.MediaType != kind {
		return nil, nil, refuse("manifest calls itself %.100q and was given as %.100q", shape.MediaType, said)
	}
	if kind == "" && shape.Manifests != nil {
		kind = types.OCIImageIndex
	} else if kind == "" {
		kind = types.OCIManifestSchema1
	}
	switch {
	case kind.IsIndex() && shape.Layers == nil && shape.Config == nil:
		index, err := v1.ParseIndexManifest(bytes.NewReader(raw))
		if err != nil {
			return nil, nil, refuse("index: %w", err)
		}
		return index, nil, nil
	case kind.IsImage() && shape.Manifests == nil:
		manifest, err := v1.ParseManifest(bytes.NewReader(raw))
		if err != nil {
			return nil, nil, refuse("manifest: %w", err)
		}
		if len(manifest.Layers) == 0 || len(manifest.Layers) > MaxLayers {
			return nil, nil, refuse("image has %d layers, want 1 to %d: squash it", len(manifest.Layers), MaxLayers)
		}
		return nil, manifest, nil
	}
	return nil, nil, refuse("type %.100q is neither an image nor an index of images", kind)
}

// choose is the entry of an index for this machine.
func choose(entries []v1.Descriptor) (v1.Descriptor, error) {
	var have []string
	for _, d := range entries {
		p := d.Platform
		if p == nil && len(entries) == 1 {
			return d, nil
		}
		if p == nil {
			continue
		}
		if p.OS == "linux" && p.Architecture == runtime.GOARCH && (p.Variant == "" || runtime.GOARCH == "arm64" && p.Variant == "v8") {
			return d, nil
		}
		if len(have) < 20 {
			have = append(have, p.String())
		}
	}
	return v1.Descriptor{}, refuse("there is none for linux/%s among %d: %.500q", runtime.GOARCH, len(entries), have)
}

// parseConfig reads a configuration.
func parseConfig(raw []byte) (*v1.ConfigFile, error) {
	config, err := v1.ParseConfigFile(bytes.NewReader(raw))
	if err != nil {
		return nil, refuse("configuration: %w", err)
	}
	if config.OS != "" && config.OS != "linux" || config.Architecture != "" && config.Architecture != runtime.GOARCH {
		return nil, refuse("it is for %.50s/%.50s and this machine is linux/%s", config.OS, config.Architecture, runtime.GOARCH)
	}
	for i, d := range config.RootFS.DiffIDs {
		if d.Algorithm != "sha256" || !isHex(d.Hex) {
			return nil, refuse("configuration: diff id %d, %.100q, is malformed", i, d)
		}
	}
	return config, nil
}

// readBlob reads a small blob, and checks it.
func readBlob(ctx context.Context, src source, d v1.Descriptor) ([]byte, error) {
	if d.Size > maxManifest {
		return nil, refuse("it has %d bytes, at most %d", d.Size, maxManifest)
	}
	body, err := src.blob(ctx, d)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(body, maxManifest+1))
	if err := errors.Join(err, body.Close()); err != nil {
		return nil, err
	}
	return b, check(b, d)
}

// answer is what a Pull says of the image.
func (r record) answer(size int64) sandbox.Image {
	return sandbox.Image{
		Ref: r.Digest, Digest: r.Digest, Size: size,
		Env: r.Env, Entrypoint: r.Entrypoint, Cmd: r.Cmd, User: r.User, Dir: r.WorkingDir,
	}
}
