package image

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	ociarchive "github.com/containerd/containerd/v2/pkg/archive"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
	nobody   = 65534
	xattr    = "SCHILY.xattr."
	// headers bounds what a file takes of an archive beside its content.
	headers = 4 << 10
	// window bounds what zstd may remember; "zstd --ultra -22" asks for as much.
	window = 128 << 20
)

// A size is what a layer holds.
type size struct {
	Bytes int64 `json:"bytes"`
	Files int64 `json:"files"`
}

// A budget is what may still be unpacked of one image.
type budget struct {
	mu   sync.Mutex
	left size
	all  size
}

func (b *budget) take(s size) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.left.Bytes -= s.Bytes
	b.left.Files -= s.Files
	if b.left.Bytes < 0 {
		return refuse("image is larger than %d bytes unpacked (images.max_bytes)", b.all.Bytes)
	}
	if b.left.Files < 0 {
		return refuse("image has more than %d files (images.max_files)", b.all.Files)
	}
	return nil
}

// ready unpacks a layer if it is not there, and returns how many bytes of it
// were transferred.
func (s *Store) ready(ctx context.Context, l layer, b *budget) (int64, error) {
	release, err := s.busy.hold(ctx, "layer "+l.diff)
	if err != nil {
		return 0, err
	}
	defer release()
	if had, err := s.sizeOf(l.diff); err == nil {
		now := time.Now()
		return 0, errors.Join(os.Chtimes(s.path("layers", l.diff), now, now), b.take(had)) // Prune sees it wanted
	} else if !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	dir, done, err := s.work(ctx)
	if err != nil {
		return 0, err
	}
	s.cfg.Trace("image.layer.work")
	n, err := s.unpack(ctx, l, dir, b)
	if err == nil {
		s.cfg.Trace("image.layer.unpacked")
		err = os.Rename(filepath.Join(dir, "layer"), s.path("layers", l.diff))
		if errors.Is(err, fs.ErrExist) || errors.Is(err, unix.ENOTEMPTY) {
			err = nil // another process did the same
		}
		s.cfg.Trace("image.layer.renamed")
	}
	return n, errors.Join(err, done())
}

// sizeOf is what a layer that is here holds.
func (s *Store) sizeOf(diff string) (size, error) {
	var had size
	b, err := os.ReadFile(s.path("layers", diff, "size.json"))
	if err == nil {
		err = json.Unmarshal(b, &had)
	}
	return had, err
}

// unpack makes dir/layer from what a source gives, and returns how much that was.
func (s *Store) unpack(ctx context.Context, l layer, dir string, b *budget) (n int64, err error) {
	root := filepath.Join(dir, "layer", "fs")
	if err := errors.Join(os.MkdirAll(root, 0o755), os.Chmod(root, 0o755)); err != nil {
		return 0, fmt.Errorf("layer: %w", err)
	}
	body, err := l.open(ctx)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, body.Close()) }()
	packed := &counted{r: body, sum: sha256.New(), most: l.blob.Size}
	if l.blob.Size == 0 { // an archive of "docker save" does not say
		packed.most = b.stream()
	}
	plain, stop, err := decompress(packed)
	if err != nil {
		return packed.n, err
	}
	defer stop()
	sv := &sieve{budget: b, out: map[string]bool{}, seen: map[string]bool{}}
	unpacked := &counted{r: plain, sum: sha256.New(), most: b.stream()}
	_, err = ociarchive.Apply(ctx, root, unpacked, ociarchive.WithFilter(sv.admit), ociarchive.WithConvertWhiteout(convert))
	if err == nil {
		// What follows the end of an archive is in its digest.
		_, err = io.Copy(io.Discard, unpacked)
	}
	if err == nil {
		_, err = io.Copy(io.Discard, packed)
	}
	if packed.broken != nil {
		return packed.n, fmt.Errorf("layer: %w", packed.broken)
	}
	if err != nil {
		return packed.n, asRefusal(ctx, err)
	}
	if want := l.blob.Digest.Hex; want != "" && packed.digest() != want {
		return packed.n, refuse("layer sha256:%s: its digest is sha256:%s", want, packed.digest())
	}
	if l.blob.Size > 0 && packed.n != l.blob.Size {
		return packed.n, refuse("layer sha256:%s has %d bytes and not %d", l.blob.Digest.Hex, packed.n, l.blob.Size)
	}
	if got := unpacked.digest(); got != l.diff {
		return packed.n, refuse("layer holds sha256:%s and not what the image says, sha256:%s", got, l.diff)
	}
	return packed.n, sv.finish(root, filepath.Join(dir, "layer", "size.json"))
}

// stream bounds an archive of what may still be unpacked.
func (b *budget) stream() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.left.Bytes + (b.left.Files+1)*headers
}

// asRefusal tells what the content is to blame for from what this machine is.
func asRefusal(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EIO) || errors.Is(err, unix.EROFS) {
		return fmt.Errorf("layer: %w", err)
	}
	return refuse("layer: %w", err)
}

// A counted reader counts and sums what passes, and ends with an error where
// there is more than there may be.
type counted struct {
	r       io.Reader
	sum     hash.Hash
	n, most int64
	broken  error // of r
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		c.broken = err
	}
	c.n += int64(n)
	if c.n > c.most {
		return 0, refuse("layer has more than %d bytes", c.most)
	}
	_, _ = c.sum.Write(p[:n]) // of a hash, never fails
	return n, err
}

func (c *counted) digest() string { return hex.EncodeToString(c.sum.Sum(nil)) }

// decompress looks at what it gets, as the engines do: media types lie.
func decompress(r io.Reader) (plain io.Reader, stop func(), err error) {
	b := bufio.NewReaderSize(r, 64<<10)
	magic, err := b.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, nil, refuse("layer: %w", err)
		}
		return z, func() {}, nil
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(window), zstd.WithDecoderMaxMemory(window))
		if err != nil {
			return nil, nil, refuse("layer: %w", err)
		}
		return z, z.Close, nil
	}
	return b, func() {}, nil
}

// A sieve decides about each file of a layer before anything of it is written.
type sieve struct {
	budget *budget
	sum    size
	out    map[string]bool // symbolic links that lead out of the layer
	seen   map[string]bool // directories of unusual modes that the layer has
}

// unusual are the modes that directories of any system have, where a layer names
// them only in the paths of others.
func unusual() map[string]os.FileMode {
	return map[string]os.FileMode{"tmp": os.ModeSticky | 0o777, "var/tmp": os.ModeSticky | 0o777, "root": 0o700}
}

// mounted are where a box has mounts and files of its own.
func mounted() []string { return []string{"dev", "proc", "sys", "etc"} }

// admit implements archive.Filter. The name is clean.
func (s *sieve) admit(h *tar.Header) (bool, error) {
	name := h.Name
	if h.Typeflag == tar.TypeXGlobalHeader || name == "." {
		return false, nil
	}
	if !filepath.IsLocal(name) {
		return false, refuse("file %.200q is outside of the layer", name)
	}
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if s.out[dir] {
			return false, refuse("file %.200q is behind the link %.200q, which leads out of the layer", name, dir)
		}
	}
	if err := s.take(h); err != nil {
		return false, err
	}
	delete(s.out, name)
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeFifo:
	case tar.TypeDir:
		s.seen[name] = s.seen[name] || unusual()[name] != 0
	case tar.TypeSymlink:
		if slices.Contains(mounted(), name) {
			return false, refuse("/%s is a link to %.200q: a box has a directory there", name, h.Linkname)
		}
		if !filepath.IsLocal(path.Join(path.Dir(name), h.Linkname)) || path.IsAbs(h.Linkname) {
			s.out[name] = true
		}
	case tar.TypeLink:
		if !filepath.IsLocal(h.Linkname) {
			return false, refuse("file %.200q is a hard link to %.200q, outside of the layer", name, h.Linkname)
		}
	case tar.TypeChar, tar.TypeBlock:
		if strings.HasPrefix(name, "dev/") {
			return false, nil // a box has a /dev of its own over it
		}
		return false, refuse("file %.200q is a device", name)
	default:
		return false, refuse("file %.200q is of the unknown type %q", name, h.Typeflag)
	}
	base := path.Base(name)
	// What aufs kept for itself means nothing.
	return !strings.HasPrefix(base, whiteout+whiteout) || base == opaque, nil
}

// take counts a file, and takes off it what must not reach the disk.
func (s *sieve) take(h *tar.Header) error {
	one := size{Files: 1}
	if h.Typeflag == tar.TypeReg {
		one.Bytes = h.Size // of a sparse file too: its holes are written
	}
	s.sum.Bytes += one.Bytes
	s.sum.Files++
	if h.Uid < 0 || h.Uid > nobody {
		h.Uid = nobody
	}
	if h.Gid < 0 || h.Gid > nobody {
		h.Gid = nobody
	}
	for key := range h.PAXRecords {
		name, is := strings.CutPrefix(key, xattr)
		if is && (!strings.HasPrefix(name, "user.") || strings.HasPrefix(name, "user.overlay.") || h.Typeflag != tar.TypeReg) {
			delete(h.PAXRecords, key)
		}
	}
	return s.budget.take(one)
}

// convert implements archive.ConvertWhiteout for an overlay of a user namespace.
func convert(_ *tar.Header, file string) (write bool, err error) {
	dir, base := filepath.Split(file)
	if base == opaque {
		return false, unix.Lsetxattr(filepath.Clean(dir), "user.overlay.opaque", []byte("y"), 0)
	}
	name, is := strings.CutPrefix(base, whiteout)
	if !is {
		return true, nil
	}
	gone := filepath.Join(dir, name)
	st, err := os.Lstat(gone)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, unix.Mknod(gone, unix.S_IFCHR, 0)
	case err == nil && st.IsDir():
		// The layer has one of its own: what is below it is what goes.
		return false, unix.Lsetxattr(gone, "user.overlay.opaque", []byte("y"), 0)
	}
	return false, err // a file of its own hides the one below
}

// finish gives directories that were named only in paths their usual modes, and
// writes down what the layer holds.
func (s *sieve) finish(dir, file string) error {
	root, err := os.OpenRoot(dir) // links on the way may lead anywhere
	if err != nil {
		return fmt.Errorf("layer: %w", err)
	}
	for name, mode := range unusual() {
		if st, e := root.Lstat(name); s.seen[name] || e != nil || !st.IsDir() {
			continue
		}
		err = errors.Join(err, root.Chmod(name, mode))
	}
	if err := errors.Join(err, root.Close()); err != nil {
		return fmt.Errorf("layer: %w", err)
	}
	b, err := json.Marshal(s.sum)
	if err == nil {
		err = os.WriteFile(file, b, 0o600)
	}
	if err != nil {
		return fmt.Errorf("layer: %w", err)
	}
	return nil
}
