package serve

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

const (
	parentMode  = 0o755 // of directories that the archive does not name
	privateMode = 0o600 // of a file until it is complete
	ownerAccess = 0o700 // without it we may not be able to write into a directory

	scratchSize = 32 << 10 // to copy a file with; io.Copy would make as much for each
)

// put unpacks what comes in below dir.
func (g *guest) put(x *transfer, dir string) {
	in := &incoming{guest: g, transfer: x}
	root, err := openDirectory(g.files.root, dir)
	if err == nil {
		if g.scratch == nil {
			g.scratch = make([]byte, scratchSize)
		}
		err = unpack(&unpacker{root: root, scratch: g.scratch, direct: g.files.direct}, in)
		err = errors.Join(err, root.Close())
	}
	g.finish(nil, err)
}

// incoming is the data of a Put, or the input of a step. It grants as much again
// as is read.
type incoming struct {
	guest    *guest
	transfer *transfer
	step     *step  // that the input is of; nil for a Put
	batch    []byte // frames taken from the inbox
	rest     []byte // of batch, frames not read yet
	data     []byte // of the frame being read
	unpaid   int
}

func (in *incoming) Read(b []byte) (int, error) {
	x := in.transfer
	for len(in.data) == 0 {
		var ok bool
		if _, in.data, in.rest, ok = wire.Cut(in.rest); ok {
			in.pay(wire.HeaderSize + len(in.data))
			continue
		}
		var end error
		select {
		case <-x.stopped: // looked at before the inbox, so that all of it is read
			end = x.err
		default:
		}
		in.batch = x.inbox.Take(in.batch)
		in.rest = in.batch
		switch {
		case end != nil && (end != io.EOF || len(in.rest) == 0): // ours, never wrapped
			return 0, end
		case len(in.rest) == 0:
			select {
			case <-x.inbox.Wake():
			case <-x.stopped:
			}
		}
	}
	n := copy(b, in.data)
	in.data = in.data[n:]
	return n, nil
}

func (in *incoming) pay(n int) {
	if in.unpaid += n; in.unpaid < wire.GrantAt {
		return
	}
	unpaid := uint32(in.unpaid) // at most a window
	in.unpaid = 0
	if in.step != nil {
		in.guest.tell(in.step, wire.AppendUint32(nil, wire.InputGrant, unpaid))
	} else {
		in.guest.say(wire.AppendUint32(nil, wire.Grant, unpaid))
	}
}

// openDirectory opens dir below base, making what is missing. No part of it may
// be a link: what the agent puts into /run must not end up in the workspace.
func openDirectory(base, dir string) (*os.Root, error) {
	root, err := os.OpenRoot(base)
	if err != nil {
		return nil, err
	}
	for part := range strings.SplitSeq(strings.Trim(filepath.Clean(dir), "/"), "/") {
		if part == "" {
			continue
		}
		next, err := enter(root, part)
		if err = errors.Join(err, root.Close()); err != nil {
			return nil, err
		}
		root = next
	}
	return root, nil
}

func enter(root *os.Root, part string) (*os.Root, error) {
	info, err := root.Lstat(part)
	if errors.Is(err, fs.ErrNotExist) {
		if err := root.Mkdir(part, parentMode); err != nil {
			return nil, err
		}
		return root.OpenRoot(part)
	}
	switch {
	case err != nil:
		return nil, err
	case !info.IsDir():
		return nil, refusal(part + " is not a directory")
	}
	return root.OpenRoot(part)
}

// An unpacker makes files below root. That nothing leaves root is the work of
// os.Root, which resolves every name below it; what is checked here besides
// is that no link is made that points out.
type unpacker struct {
	root    *os.Root
	scratch []byte
	closed  []directory // made without ownerAccess: they get their mode at the end
	direct  bool        // Options.Direct
}

type directory struct {
	name string
	mode fs.FileMode
}

// unpack reads a tar stream to its end, padding included.
func unpack(u *unpacker, in io.Reader) error {
	archive := tar.NewReader(in)
	for {
		header, err := archive.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("tar: %w", err)
		}
		if err := u.entry(header, archive); err != nil {
			return fmt.Errorf("entry %q: %w", header.Name, err)
		}
	}
	if _, err := io.Copy(io.Discard, in); err != nil {
		return err
	}
	for i := len(u.closed) - 1; i >= 0; i-- {
		if err := u.chmod(u.closed[i].name, u.closed[i].mode); err != nil {
			return err
		}
	}
	return nil
}

// entry makes one file.
func (u *unpacker) entry(h *tar.Header, content io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil // git archive writes one
	}
	name := filepath.Clean(h.Name)
	if h.Name == "" || !filepath.IsLocal(name) {
		return refusal("leaves the directory")
	}
	if err := u.checkParents(name); err != nil {
		return err
	}
	mode := fs.FileMode(h.Mode) & fs.ModePerm
	if name == "." && h.Typeflag != tar.TypeDir {
		return refusal("is the directory itself")
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		return u.file(name, mode, h.ModTime, content)
	case tar.TypeDir:
		if h.Mode&0o1000 != 0 {
			mode |= fs.ModeSticky
		}
		return u.dir(name, mode)
	case tar.TypeSymlink:
		if err := u.checkLink(name, h.Linkname); err != nil {
			return err
		}
		return u.place(name, func() error { return u.root.Symlink(h.Linkname, name) })
	case tar.TypeLink:
		target := filepath.Clean(h.Linkname)
		if h.Linkname == "" || !filepath.IsLocal(target) {
			return refusal("links to a file outside of the directory")
		}
		return u.place(name, func() error { return u.root.Link(target, name) })
	}
	return refusal(fmt.Sprintf("type %q is not a file, directory or link", h.Typeflag))
}

// place calls make, which makes name and must fail if it exists. It makes the
// directory above if that is missing and removes what stands there if it is no
// directory, each once.
func (u *unpacker) place(name string, create func() error) error {
	err := create()
	if errors.Is(err, fs.ErrNotExist) {
		if err := u.root.MkdirAll(filepath.Dir(name), parentMode); err != nil {
			return err
		}
		err = create()
	}
	if errors.Is(err, fs.ErrExist) {
		info, err := u.root.Lstat(name)
		if err != nil {
			return err
		}
		if info.IsDir() {
			return refusal("a directory stands in its place")
		}
		if err := u.root.Remove(name); err != nil {
			return err
		}
		return create()
	}
	return err
}

func (u *unpacker) file(name string, mode fs.FileMode, modified time.Time, content io.Reader) error {
	var f *os.File
	err := u.place(name, func() (err error) {
		f, err = u.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, privateMode)
		return err
	})
	if err != nil {
		return err
	}
	_, err = io.CopyBuffer(writer{f}, content, u.scratch)
	err = errors.Join(err, f.Chmod(mode), f.Close())
	// An archive without times has 1970, which many tools refuse: then it is now.
	if err == nil && modified.Unix() > 0 {
		err = u.root.Chtimes(name, modified, modified)
	}
	return err
}

// A writer has no ReadFrom, for which io.CopyBuffer would leave its buffer.
type writer struct{ io.Writer }

func (u *unpacker) dir(name string, mode fs.FileMode) error {
	info, err := u.root.Lstat(name)
	if err != nil || !info.IsDir() {
		err := u.place(name, func() error { return u.root.Mkdir(name, mode.Perm()|ownerAccess) })
		if err != nil {
			return err
		}
	}
	if mode&ownerAccess != ownerAccess {
		u.closed = append(u.closed, directory{name, mode})
		return nil
	}
	return u.chmod(name, mode)
}

func (u *unpacker) chmod(name string, mode fs.FileMode) error {
	d, err := u.root.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Chmod(mode), d.Close())
}

// checkParents refuses a name behind a link, where os.Root may not be relied on.
// They are looked at from the top, so none of those looks goes through a link.
func (u *unpacker) checkParents(name string) error {
	if !u.direct {
		return nil
	}
	for i := range len(name) {
		if name[i] != '/' {
			continue
		}
		info, err := u.root.Lstat(name[:i])
		if errors.Is(err, fs.ErrNotExist) {
			return nil // and nothing is below it
		}
		if err != nil {
			return err
		}
		if !info.IsDir() {
			return refusal("stands behind what is no directory")
		}
	}
	return nil
}

// checkLink refuses a symbolic link that could lead out of the root. It must
// stand in real directories and go up only at its beginning: behind a name,
// which may be a link itself, ".." is not where it seems to be.
func (u *unpacker) checkLink(name, target string) error {
	if target == "" || filepath.IsAbs(target) || !filepath.IsLocal(filepath.Join(filepath.Dir(name), target)) {
		return refusal("link leaves the directory")
	}
	down := false
	for part := range strings.SplitSeq(target, "/") {
		if part == ".." && down {
			return refusal("link goes up behind a name")
		}
		down = down || (part != ".." && part != "." && part != "")
	}
	for dir := filepath.Dir(name); dir != "."; dir = filepath.Dir(dir) {
		info, err := u.root.Lstat(dir)
		if err == nil && !info.IsDir() {
			return refusal("link stands behind a link")
		}
	}
	return nil
}
