package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

const (
	// maxMembers bounds the files of an archive: three for each of MaxLayers, of
	// many images, are far fewer.
	maxMembers = 100_000
	// nameKey is where an index says what an image is called (image-spec,
	// annotations); the other is containerd's.
	nameKey = "org.opencontainers.image.ref.name"
	fullKey = "io.containerd.image.name"
)

// files are those of a layout directory or of an archive.
type files interface {
	// open returns a file, and how long it is. An absent one is fs.ErrNotExist.
	open(name string) (io.ReadCloser, int64, error)
	close() error
}

// local opens a layout directory, an archive of one, or one of "docker save".
func local(file string) (files, error) {
	st, err := os.Stat(file)
	if err != nil {
		return nil, refuse("%w", err)
	}
	if st.IsDir() {
		root, err := os.OpenRoot(file)
		if err != nil {
			return nil, refuse("%w", err)
		}
		return directory{root}, nil
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, refuse("%w", err)
	}
	a, err := index(f)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", file, err), f.Close())
	}
	return a, nil
}

type directory struct{ *os.Root }

func (d directory) open(name string) (io.ReadCloser, int64, error) {
	f, err := d.Open(name)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is no regular file", name)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, st.Size(), nil
}

func (d directory) close() error { return d.Close() }

// An archive knows where in a tar file each member is.
type archive struct {
	file    *os.File
	members map[string]member
}

type member struct {
	at, size int64
	link     string // another member
}

func index(f *os.File) (*archive, error) {
	a := &archive{file: f, members: map[string]member{}}
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return a, nil
		}
		if err != nil {
			return nil, refuse("not an archive: a tar file that is not compressed, or a directory, is wanted: %w", err)
		}
		if len(a.members) >= maxMembers {
			return nil, refuse("more than %d files in the archive", maxMembers)
		}
		// The reader takes whole blocks from the file and nothing ahead, so this
		// is where the member begins.
		at, err := f.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, err
		}
		name := path.Clean(h.Name)
		if _, again := a.members[name]; again {
			return nil, refuse("two files %.200q in the archive", name)
		}
		switch h.Typeflag {
		case tar.TypeReg:
			a.members[name] = member{at: at, size: h.Size}
		case tar.TypeSymlink, tar.TypeLink:
			to := h.Linkname // "docker save" links a layer that two images share
			if h.Typeflag == tar.TypeSymlink {
				to = path.Join(path.Dir(name), to)
			}
			a.members[name] = member{link: path.Clean(to)}
		}
	}
}

func (a *archive) open(name string) (io.ReadCloser, int64, error) {
	m, ok := a.members[path.Clean(name)]
	if ok && m.link != "" {
		m, ok = a.members[m.link]
	}
	if !ok || m.link != "" {
		return nil, 0, fmt.Errorf("%.200s: %w", name, fs.ErrNotExist)
	}
	return io.NopCloser(io.NewSectionReader(a.file, m.at, m.size)), m.size, nil
}

func (a *archive) close() error { return a.file.Close() }

// read reads a small file.
func read(f files, name string) ([]byte, error) {
	r, size, err := f.open(name)
	if err != nil {
		return nil, err
	}
	if size > maxManifest {
		return nil, errors.Join(refuse("%.200s has %d bytes, at most %d", name, size, maxManifest), r.Close())
	}
	b, err := io.ReadAll(io.LimitReader(r, maxManifest))
	return b, errors.Join(err, r.Close())
}

// A layout is an image of a layout directory or of an archive of one.
type layout struct {
	files files
	want  Name // "" is the only one
}

// resolveLocal finds an image in files. called is what the files call it.
func resolveLocal(ctx context.Context, f files, want Name) (r *resolved, called string, err error) {
	_, _, err = f.open("index.json")
	if err == nil {
		l := &layout{f, want}
		if r, err = resolve(ctx, l); err != nil {
			return nil, "", err
		}
		d, err := l.root(ctx)
		return r, calledBy(d), err
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, "", refuse("%w", err)
	}
	return resolveSaved(f, want)
}

func calledBy(d v1.Descriptor) string {
	if full := d.Annotations[fullKey]; full != "" {
		return full
	}
	return d.Annotations[nameKey]
}

func (l *layout) root(context.Context) (v1.Descriptor, error) {
	raw, err := read(l.files, "index.json")
	if err != nil {
		return v1.Descriptor{}, refuse("index.json: %w", err)
	}
	index, err := v1.ParseIndexManifest(bytes.NewReader(raw))
	if err != nil {
		return v1.Descriptor{}, refuse("index.json: %w", err)
	}
	var have []string
	var found []v1.Descriptor
	for _, d := range index.Manifests {
		called := calledBy(d)
		if l.want.Digest == d.Digest.String() || l.want.Digest == "" && l.want.Tag != "" && l.want.isCalled(called) {
			return d, nil
		}
		found, have = append(found, d), append(have, called+"@"+d.Digest.String())
	}
	if len(found) == 1 && l.want.Digest == "" {
		return found[0], nil // that is what the operator means
	}
	return v1.Descriptor{}, refuse("index.json has %d images and not this one: %.1000q", len(have), have)
}

// isCalled says whether a name of an archive, which may be a tag alone, means n.
func (n Name) isCalled(name string) bool {
	if name == n.Tag {
		return true
	}
	other, err := ParseName(name)
	return err == nil && other == n
}

func (l *layout) manifest(ctx context.Context, d v1.Descriptor) ([]byte, error) {
	return readAll(l.blob(ctx, d))
}

func readAll(r io.ReadCloser, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(r, maxManifest+1))
	return b, errors.Join(err, r.Close())
}

func (l *layout) blob(_ context.Context, d v1.Descriptor) (io.ReadCloser, error) {
	if d.Digest.Algorithm != "sha256" || !isHex(d.Digest.Hex) {
		return nil, refuse("digest %.100q is malformed", d.Digest)
	}
	r, _, err := l.files.open("blobs/sha256/" + d.Digest.Hex)
	if err != nil {
		return nil, refuse("blob: %w", err)
	}
	return r, nil
}

// A saved image is one line of manifest.json, as "docker save" wrote it before
// version 25 (moby, image/tarexport).
type saved struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// resolveSaved reads such an archive. It has no manifest, so the digest of the
// image is that of its configuration, which is Docker's id of it.
func resolveSaved(f files, want Name) (*resolved, string, error) {
	raw, err := read(f, "manifest.json")
	if err != nil {
		return nil, "", refuse("neither an OCI layout (index.json) nor a saved image (manifest.json): %w", err)
	}
	var list []saved
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, "", refuse("manifest.json: %w", err)
	}
	var have []string
	for _, one := range list {
		raw, err := read(f, one.Config)
		if err != nil {
			return nil, "", refuse("configuration: %w", err)
		}
		digest, _, err := v1.SHA256(bytes.NewReader(raw))
		if err != nil {
			return nil, "", err
		}
		if one.is(digest.String(), want, len(list)) {
			r, err := one.resolve(f, raw, digest)
			called := ""
			if len(one.RepoTags) > 0 {
				called = one.RepoTags[0]
			}
			return r, called, err
		}
		have = append(have, strings.Join(one.RepoTags, " ")+"@"+digest.String())
	}
	return nil, "", refuse("manifest.json has %d images and not this one: %.1000q", len(have), have)
}

// is says whether an image of an archive with so many is the wanted one.
func (s saved) is(digest string, want Name, of int) bool {
	if want.Digest != "" {
		return want.Digest == digest
	}
	for _, tag := range s.RepoTags {
		if want.isCalled(tag) {
			return true
		}
	}
	return of == 1
}

func (s saved) resolve(f files, raw []byte, digest v1.Hash) (*resolved, error) {
	if hex := strings.TrimSuffix(path.Base(s.Config), ".json"); isHex(hex) && hex != digest.Hex {
		return nil, refuse("configuration %.200s: its digest is %s", s.Config, digest)
	}
	config, err := parseConfig(raw)
	if err != nil {
		return nil, err
	}
	ids := config.RootFS.DiffIDs
	if len(ids) != len(s.Layers) || len(ids) == 0 || len(ids) > MaxLayers {
		return nil, refuse("%d layers and %d diff ids, want as many of both, 1 to %d", len(s.Layers), len(ids), MaxLayers)
	}
	r := &resolved{digest: digest.String(), config: *config}
	for i, name := range s.Layers {
		open := func(context.Context) (io.ReadCloser, error) {
			body, _, err := f.open(name)
			if err != nil {
				return nil, refuse("layer %d: %w", i, err)
			}
			return struct {
				io.Reader
				io.Closer
			}{bufio.NewReader(body), body}, nil
		}
		r.layers = append(r.layers, layer{ids[i].Hex, v1.Descriptor{MediaType: types.DockerUncompressedLayer}, open})
	}
	return r, nil
}
