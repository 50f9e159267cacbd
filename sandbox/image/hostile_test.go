package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	"github.com/mayfly-ci/mayfly/test/imagetest"
)

func device(name string, kind byte) imagetest.Entry {
	return imagetest.Entry{Header: tar.Header{Name: name, Typeflag: kind, Mode: 0o666, Devmajor: 1, Devminor: 3}}
}

// TestHostileLayers: a layer that reaches for what is outside of it is refused
// with the reason, and nothing outside has changed. The same layer without the
// one entry is taken.
func TestHostileLayers(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		what, reason string
		entries      []imagetest.Entry
	}{
		{"a name that climbs", "outside of the layer", []imagetest.Entry{imagetest.File("../../../../outside/victim", "evil")}},
		{"a name that climbs from below", "outside of the layer", []imagetest.Entry{imagetest.File("a/../../../../../outside/victim", "evil")}},
		{"an absolute name", "outside of the layer", []imagetest.Entry{imagetest.File("OUTSIDE/victim", "evil")}},
		{"a directory that climbs", "outside of the layer", []imagetest.Entry{imagetest.Dir("../../new")}},
		{"a whiteout that climbs", "outside of the layer", []imagetest.Entry{imagetest.File("../../../../outside/.wh.victim", "")}},
		{"a whiteout of the directory above", "", []imagetest.Entry{imagetest.File(".wh...", "")}},
		{"a whiteout of the directory itself", "", []imagetest.Entry{imagetest.File("d/.wh..", "")}},
		{"a file behind an absolute link", "behind the link", []imagetest.Entry{imagetest.Link("out", "OUTSIDE"), imagetest.File("out/victim", "evil")}},
		{"a file behind a link that climbs", "behind the link", []imagetest.Entry{imagetest.Link("d/out", "../../../../../outside"), imagetest.File("d/out/victim", "evil")}},
		{"a whiteout behind a link", "behind the link", []imagetest.Entry{imagetest.Link("out", "OUTSIDE"), imagetest.File("out/.wh.victim", "")}},
		{"an opaque directory behind a link", "behind the link", []imagetest.Entry{imagetest.Link("out", "OUTSIDE"), imagetest.File("out/.wh..wh..opq", "")}},
		{"a hard link to an absolute name", "hard link", []imagetest.Entry{imagetest.Hard("hard", "OUTSIDE/victim")}},
		{"a hard link that climbs", "hard link", []imagetest.Entry{imagetest.Hard("hard", "../../../../outside/victim")}},
		{"a device", "is a device", []imagetest.Entry{device("null", tar.TypeChar)}},
		{"a disk", "is a device", []imagetest.Entry{device("d/sda", tar.TypeBlock)}},
		{"a link at /dev", "a box has a directory there", []imagetest.Entry{imagetest.Link("dev", "OUTSIDE")}},
		{"a link at /proc", "a box has a directory there", []imagetest.Entry{imagetest.Link("proc", "OUTSIDE")}},
		{"a link at /etc", "a box has a directory there", []imagetest.Entry{imagetest.Link("./etc", "OUTSIDE")}},
		{"a type that nobody knows", "unknown type", []imagetest.Entry{{Header: tar.Header{Name: "x", Typeflag: 'Z'}}}},
	} {
		outside := filepath.Join(t.TempDir(), "outside")
		victim := filepath.Join(outside, "victim")
		if err := os.Mkdir(outside, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(victim, []byte("good"), 0o600); err != nil {
			t.Fatal(err)
		}
		before := tree(t, filepath.Dir(outside))
		good := []imagetest.Entry{imagetest.Dir("d"), imagetest.File("d/f", "x"), imagetest.Link("d/in", "../d/f"), imagetest.Link("abs", "/d")}
		for i := range c.entries {
			h := &c.entries[i].Header
			h.Name, h.Linkname = strings.ReplaceAll(h.Name, "OUTSIDE", outside), strings.ReplaceAll(h.Linkname, "OUTSIDE", outside)
		}
		s := open(t, func(cfg *Config) {
			cfg.Sources = map[string]string{
				"good": imagetest.Layout(t, imagetest.Of(t, imagetest.Layer(t, good...))),
				"bad":  imagetest.Layout(t, imagetest.Of(t, imagetest.Layer(t, append(good, c.entries...)...))),
			}
		})
		_, err := s.get(t, "bad")
		refused(t, c.what, err, c.reason)
		s.cleanOfImages(t, c.what)
		if after := tree(t, filepath.Dir(outside)); !slices.Equal(before, after) {
			t.Errorf("%s: outside was %q and is %q", c.what, before, after)
		}
		if _, err := s.get(t, "good"); err != nil {
			t.Errorf("%s: the layer without it: got %v, want it taken", c.what, err)
		}
	}
}

// cleanOfImages is empty, for a store that goes on.
func (s *Store) cleanOfImages(t *testing.T, what string) {
	t.Helper()
	for _, dir := range []string{"layers", "images", "names", "work"} {
		entries, err := os.ReadDir(s.path(dir))
		if err != nil || len(entries) > 0 {
			t.Errorf("%s: left in %s: %v, %v", what, dir, entries, err)
		}
	}
}

// TestKeptOut: what is dropped and what stays of a layer that is taken.
func TestKeptOut(t *testing.T) {
	t.Parallel()
	f := imagetest.File("f", "x")
	f.Mode, f.Uid, f.Gid, f.Format = 0o4755, 0, 70000, tar.FormatPAX
	f.PAXRecords = map[string]string{
		"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\xff\xff\xff\xff" + strings.Repeat("\x00", 12), "SCHILY.xattr.trusted.overlay.opaque": "y",
		"SCHILY.xattr.user.overlay.redirect": "/etc", "SCHILY.xattr.user.kept": "v",
	}
	img := imagetest.Of(t, imagetest.Layer(t, f, device("dev/null", tar.TypeChar), imagetest.File("tmp/x", ""), imagetest.File("var/tmp/x", ""),
		imagetest.File(".wh..wh.plnk", ""), imagetest.File("d/.wh.gone", "")))
	s := open(t, func(c *Config) { c.Sources = map[string]string{"app": imagetest.Layout(t, img)} })
	dir := s.dirs(t, must(s.get(t, "app"))(t).Ref)[0]
	if got, want := attributes(t, filepath.Join(dir, "f")), "user.kept"; got != want {
		t.Errorf("attributes: got %q, want %q", got, want)
	}
	want := []string{
		". drwxr-xr-x", "d drwxr-xr-x", "d/gone Dc---------", "f urwxr-xr-x x",
		"tmp dtrwxrwxrwx", "tmp/x -rw-r--r-- ", "var drwxr-xr-x", "var/tmp dtrwxrwxrwx", "var/tmp/x -rw-r--r-- ",
	}
	if got := tree(t, dir); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if uid, gid := owner(t, filepath.Join(dir, "f")); uid != 0 || gid != nobody {
		t.Errorf("owner %d:%d, want root and nobody", uid, gid)
	}
}

// TestTooMuch: what is larger than the limits is refused while it is read, and
// not after it has filled the disk.
func TestTooMuch(t *testing.T) {
	t.Parallel()
	big := imagetest.Entry{Header: tar.Header{Name: "big", Typeflag: tar.TypeReg, Mode: 0o644, Size: 10 << 30}}
	for _, c := range []struct {
		what, reason string
		layer        func(w io.Writer) error // of the unpacked archive
		pack         func(w io.Writer) (io.WriteCloser, error)
		limits       size // 0 is the default
	}{
		{"a file of 10 GiB of zeros", "images.max_bytes", func(w io.Writer) error { return writeHeader(w, big.Header) }, gz, size{}},
		{"a sparse file of 10 GiB", "images.max_bytes", sparse, gz, size{}},
		{"a million files", "images.max_files", func(w io.Writer) error { return many(w, 1_000_000) }, asIs, size{Files: 2000}},
		{"zeros that are no archive", "", func(w io.Writer) error { return zeros(w, 48<<20) }, zs, size{32 << 20, 1000}},
		{"zeros behind the end", "more than", func(w io.Writer) error { return endless(w) }, zs, size{32 << 20, 1000}},
	} {
		var b bytes.Buffer
		z := must(c.pack(&b))(t)
		if err := c.layer(z); err != nil {
			t.Fatal(err)
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		s := open(t, func(cfg *Config) {
			cfg.Sources = map[string]string{"bad": imagetest.Layout(t, claimed(t, b.Bytes()))}
			cfg.MaxBytes, cfg.MaxFiles = c.limits.Bytes, c.limits.Files
		})
		_, err := s.get(t, "bad")
		refused(t, c.what, err, c.reason)
		s.cleanOfImages(t, c.what)
	}
}

// claimed is an image whose layer is already packed, and whose diff id nobody
// has checked.
func claimed(t *testing.T, layer []byte) v1.Image {
	t.Helper()
	img := imagetest.Of(t, imagetest.Layer(t, imagetest.File("x", "")))
	return must(imagetest.Replace(img, layer, types.OCILayer))(t)
}

func gz(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriterLevel(w, gzip.BestSpeed) }
func zs(w io.Writer) (io.WriteCloser, error) {
	return zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest))
}

func writeHeader(w io.Writer, h tar.Header) error { return tar.NewWriter(w).WriteHeader(&h) }

// sparse is a file of the PAX format 1.0 with one hole (GNU tar, "Storing Sparse
// Files").
func sparse(w io.Writer) error {
	m := "1\n10737418239\n1\n"
	h := tar.Header{Name: "GNUSparseFile.0/big", Typeflag: tar.TypeReg, Mode: 0o644, Size: 513, Format: tar.FormatPAX}
	var b bytes.Buffer
	tw := tar.NewWriter(&b)
	if err := tw.WriteHeader(&h); err != nil {
		return err
	}
	record := func(k, v string) string {
		n := len(k) + len(v) + 3
		for n != len(fmt.Sprint(n))+len(k)+len(v)+3 {
			n = len(fmt.Sprint(n)) + len(k) + len(v) + 3
		}
		return fmt.Sprintf("%d %s=%s\n", n, k, v)
	}
	pax := record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0") + record("GNU.sparse.name", "big") + record("GNU.sparse.realsize", "10737418240")
	x := tar.NewWriter(w)
	if err := rawPAX(w, pax); err != nil {
		return err
	}
	if _, err := w.Write(b.Bytes()[:512]); err != nil {
		return err
	}
	if _, err := io.WriteString(w, m+strings.Repeat("\x00", 512-len(m))+"x"+strings.Repeat("\x00", 511)); err != nil {
		return err
	}
	return x.Close()
}

// rawPAX writes an extended header, which tar.Writer does not for these keys.
func rawPAX(w io.Writer, records string) error {
	var b bytes.Buffer
	if err := tar.NewWriter(&b).WriteHeader(&tar.Header{Name: "PaxHeaders.0/big", Typeflag: tar.TypeReg, Size: int64(len(records)), Mode: 0o644, Format: tar.FormatUSTAR}); err != nil {
		return err
	}
	h := b.Bytes()[:512]
	h[156] = tar.TypeXHeader
	copy(h[148:156], "        ")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
	_, err := w.Write(append(h, append([]byte(records), make([]byte, (512-len(records)%512)%512)...)...))
	return err
}

// many is n files, packed already: the same thousand over and over.
func many(w io.Writer, n int) error {
	var b bytes.Buffer
	z, err := gz(&b)
	if err != nil {
		return err
	}
	tw := tar.NewWriter(z)
	for i := range 1000 {
		err = errors.Join(err, tw.WriteHeader(&tar.Header{Name: fmt.Sprint("f", i), Typeflag: tar.TypeReg}))
	}
	err = errors.Join(err, tw.Flush(), z.Close())
	for range n / 1000 {
		_, e := w.Write(b.Bytes())
		err = errors.Join(err, e)
	}
	return err
}

// asIs packs nothing.
func asIs(w io.Writer) (io.WriteCloser, error) { return nopWriteCloser{w}, nil }

type nopWriteCloser struct{ io.Writer }

func (nopWriteCloser) Close() error { return nil }

func zeros(w io.Writer, n int64) error {
	b := make([]byte, 4<<20)
	for ; n > 0; n -= int64(len(b)) {
		if _, err := w.Write(b); err != nil {
			return err
		}
	}
	return nil
}

func endless(w io.Writer) error {
	tw := tar.NewWriter(w)
	if err := tw.Close(); err != nil {
		return err
	}
	return zeros(w, 48<<20)
}
