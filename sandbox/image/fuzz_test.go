package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/test/imagetest"
)

// FuzzName: what is a name is one in full too, and the same; the rest is
// refused.
func FuzzName(f *testing.F) {
	for _, s := range []string{"debian", "debian:12", "registry.example:5000/a/b@sha256:" + string(make([]byte, 64)), "localhost/a", "a:b@sha256:0123", "[::1]:5000/x", "../a", "docker.io/library/x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseName(s)
		if err != nil {
			if !errors.Is(err, sandbox.ErrImage) {
				t.Fatalf("%q: got %v, want ErrImage", s, err)
			}
			return
		}
		again, err := ParseName(n.String())
		if err != nil || again != n {
			t.Fatalf("%q: got %+v, and of its full name %+v, %v", s, n, again, err)
		}
		if n.Digest != "" && !isDigest(n.Digest) {
			t.Fatalf("%q: got the digest %q", s, n.Digest)
		}
	})
}

// FuzzManifest: a text is an index, an image within the limits, or refused.
func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"digest":"sha256:00","size":1}]}`), "")
	f.Add([]byte(`{"config":{},"layers":[{"digest":"sha256:00"}]}`), string(types.OCIManifestSchema1))
	f.Add([]byte(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":["sha256:00"]}}`), "")
	f.Fuzz(func(t *testing.T, raw []byte, kind string) {
		index, manifest, err := parseManifest(raw, types.MediaType(kind))
		if (err == nil) != (index != nil || manifest != nil) || index != nil && manifest != nil {
			t.Fatalf("got %v, %v, %v, want one of the three", index, manifest, err)
		}
		if manifest != nil && (len(manifest.Layers) == 0 || len(manifest.Layers) > MaxLayers) {
			t.Fatalf("got %d layers", len(manifest.Layers))
		}
		if index != nil {
			_, _ = choose(index.Manifests)
		}
		config, err := parseConfig(raw)
		if err == nil {
			for _, d := range config.RootFS.DiffIDs {
				if !isHex(d.Hex) {
					t.Fatalf("got the diff id %q, which becomes the name of a directory", d)
				}
			}
		}
	})
}

// FuzzLayer: whatever a layer is, nothing outside of it changes, and it has no
// device but those that stand for what it deletes.
func FuzzLayer(f *testing.F) {
	add := func(entries ...imagetest.Entry) { f.Add(imagetest.Layer(f, entries...)) }
	add(imagetest.Dir("d"), imagetest.File("d/f", "x"), imagetest.Link("l", "d"), imagetest.File("l/g", "y"), imagetest.Hard("h", "d/f"))
	add(imagetest.File("../x", ""), imagetest.File("d/.wh.f", ""), imagetest.File("d/.wh..wh..opq", ""))
	add(imagetest.Link("out", "/tmp"), imagetest.File("out/x", ""), device("dev/null", '3'))
	f.Fuzz(func(t *testing.T, packed []byte) {
		outside := t.TempDir()
		dir := filepath.Join(outside, "a", "b", "work")
		if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(outside, "victim"), []byte("good"), 0o600)); err != nil {
			t.Fatal(err)
		}
		before := tree(t, outside)
		s := &Store{}
		b := &budget{left: size{1 << 20, 100}, all: size{1 << 20, 100}}
		l := layer{blob: v1.Descriptor{Size: int64(len(packed))}, open: func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(packed)), nil
		}}
		_, _ = s.unpack(bounded(t), l, dir, b) // refused or not
		devices(t, filepath.Join(dir, "layer"))
		if err := os.RemoveAll(filepath.Join(dir, "layer")); err != nil {
			t.Fatal(err)
		}
		if after := tree(t, outside); !slices.Equal(before, after) {
			t.Fatalf("outside was %q and is %q", before, after)
		}
	})
}

// devices fails the test for a device that is no whiteout.
func devices(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil || e.Type()&fs.ModeDevice == 0 {
			return err
		}
		st, err := e.Info()
		if err == nil && (st.Mode()&fs.ModeCharDevice == 0 || st.Sys().(*syscall.Stat_t).Rdev != 0) {
			err = fmt.Errorf("%q is a device", p)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
