// Package imagetest makes images for tests: small ones of a program that Debian
// packages, and hostile ones of any content.
package imagetest

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/partial"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/mayfly-ci/mayfly/test/dockertest"
)

// Busybox is an image of busybox.
func Busybox(t testing.TB) v1.Image {
	t.Helper()
	img, err := busybox()
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func busybox() (v1.Image, error) {
	r, err := dockertest.BusyboxRoot()
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	return of(b)
}

// BusyboxArchive writes that image into a file, as an archive of a layout.
func BusyboxArchive(file string) (err error) {
	img, err := busybox()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "mayfly-image-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	p, err := layout.Write(dir, empty.Index)
	if err == nil {
		err = p.AppendImage(img)
	}
	if err != nil {
		return err
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	w := tar.NewWriter(f)
	return errors.Join(w.AddFS(os.DirFS(dir)), w.Close(), f.Close())
}

// Of is an image of layers, each an archive, lowest first.
func Of(t testing.TB, layers ...[]byte) v1.Image {
	t.Helper()
	img, err := of(layers...)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func of(layers ...[]byte) (v1.Image, error) {
	img, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{
		OS: "linux", Architecture: runtime.GOARCH, RootFS: v1.RootFS{Type: "layers"},
		Config: v1.Config{
			Env: []string{"PATH=/opt/tool/bin:/bin:/usr/bin", "FROM_IMAGE=yes"}, Entrypoint: []string{"/bin/sh"},
			Cmd: []string{"-l"}, User: "nobody", WorkingDir: "/srv",
		},
	})
	for _, content := range layers {
		l, e := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil })
		if err = errors.Join(err, e); err == nil {
			img, err = mutate.AppendLayers(img, l)
		}
	}
	return img, err
}

// Digest is that of an image's manifest.
func Digest(t testing.TB, img v1.Image) string {
	t.Helper()
	d, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return d.String()
}

// Layout writes an image as a layout directory that has nothing else.
func Layout(t testing.TB, img v1.Image) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "layout")
	p, err := layout.Write(dir, empty.Index)
	if err == nil {
		err = p.AppendImage(img)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// An Entry is a file of a layer. Its size is that of the content, unless Size
// says otherwise: then as many zeros follow.
type Entry struct {
	tar.Header
	Content string
}

// File is a regular file.
func File(name, content string) Entry {
	return Entry{tar.Header{Name: name, Mode: 0o644, Typeflag: tar.TypeReg, Size: int64(len(content))}, content}
}

// Dir is a directory.
func Dir(name string) Entry {
	return Entry{Header: tar.Header{Name: name, Mode: 0o755, Typeflag: tar.TypeDir}}
}

// Link is a symbolic link.
func Link(name, to string) Entry {
	return Entry{Header: tar.Header{Name: name, Linkname: to, Mode: 0o777, Typeflag: tar.TypeSymlink}}
}

// Hard is a hard link.
func Hard(name, to string) Entry {
	return Entry{Header: tar.Header{Name: name, Linkname: to, Mode: 0o644, Typeflag: tar.TypeLink}}
}

// Layer packs files.
func Layer(t testing.TB, entries ...Entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(fmt.Errorf("%s: %w", h.Name, err))
		}
		if _, err := io.WriteString(w, e.Content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// Replace gives an image another lowest layer, as it lies in a registry, and
// leaves its configuration as it is: what that says of the layer is then wrong.
func Replace(img v1.Image, layer []byte, kind types.MediaType) (v1.Image, error) {
	return &replaced{Image: img, layer: static.NewLayer(layer, kind)}, nil
}

type replaced struct {
	v1.Image
	layer v1.Layer
}

func (r *replaced) Layers() ([]v1.Layer, error) { return []v1.Layer{r.layer}, nil }

func (r *replaced) Manifest() (*v1.Manifest, error) {
	m, err := r.Image.Manifest()
	if err != nil {
		return nil, err
	}
	m = m.DeepCopy()
	digest, err := r.layer.Digest()
	if err != nil {
		return nil, err
	}
	size, err := r.layer.Size()
	if err != nil {
		return nil, err
	}
	kind, err := r.layer.MediaType()
	m.Layers = []v1.Descriptor{{MediaType: kind, Size: size, Digest: digest}}
	return m, err
}

func (r *replaced) RawManifest() ([]byte, error) {
	m, err := r.Manifest()
	if err != nil {
		return nil, err
	}
	return json.Marshal(m)
}

func (r *replaced) Digest() (v1.Hash, error) { return partial.Digest(r) }
func (r *replaced) Size() (int64, error)     { return partial.Size(r) }
