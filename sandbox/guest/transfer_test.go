package guest_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/guest"
)

func TestPutMakesFilesAsTheArchiveSays(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	dir := filepath.Join(t.TempDir(), "made", "on", "the", "way")
	then := time.Unix(1_500_000_000, 0)
	archive := tarOf(t,
		tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o750},
		tar.Header{Name: "closed/", Typeflag: tar.TypeDir, Mode: 0o500},
		file("closed/inside", "in a directory without w"),
		tar.Header{Name: "sticky", Typeflag: tar.TypeDir, Mode: 0o1777},
		tar.Header{Name: "secret", Linkname: "s", Mode: 0o600, ModTime: then},
		tar.Header{Name: "program", Linkname: "#!/bin/sh\n", Mode: 0o4755},
		file("no/parents/named", "x"),
		tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "no/parents"},
		tar.Header{Name: "no/up", Typeflag: tar.TypeSymlink, Linkname: "../secret"},
		tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "secret"},
		tar.Header{Typeflag: tar.TypeXGlobalHeader, PAXRecords: map[string]string{"comment": "git archive"}},
		file("secret", "replaced"),
		file("link/through", "a link that stays inside is followed"),
	)
	if err := b.Put(t.Context(), dir, archive); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"closed/inside": "in a directory without w", "secret": "replaced", "hard": "s",
		"no/parents/named": "x", "no/parents/through": "a link that stays inside is followed", "no/up": "replaced",
	} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s: got %q and %v, want %q", name, got, err, want)
		}
	}
	for name, want := range map[string]fs.FileMode{
		".": 0o750 | fs.ModeDir, "closed": 0o500 | fs.ModeDir, "sticky": 0o777 | fs.ModeDir | fs.ModeSticky,
		"hard": 0o600, "program": 0o755, "secret": 0o644, "no": 0o755 | fs.ModeDir, "link": 0o777 | fs.ModeSymlink,
	} {
		if info, err := os.Lstat(filepath.Join(dir, name)); err != nil || info.Mode() != want {
			t.Errorf("%s: got mode %v and %v, want %v", name, info.Mode(), err, want)
		}
	}
	info, _ := os.Lstat(filepath.Join(dir, "hard"))
	if !info.ModTime().Equal(then) {
		t.Errorf("time: got %v, want %v", info.ModTime(), then)
	}
	if info, _ = os.Lstat(filepath.Join(dir, "secret")); time.Since(info.ModTime()) > time.Hour {
		t.Errorf("time of an entry without one: got %v, want now", info.ModTime())
	}
}

// escapes are archives that try to write to or link to outside/canary, seen from
// the directory inside. Each has to be refused.
var escapes = map[string][]tar.Header{
	"up":                  {file("../outside/canary", "x")},
	"up from below":       {file("a/../../outside/canary", "x")},
	"up, directory":       {{Name: "../outside/dir", Typeflag: tar.TypeDir}},
	"up, link":            {{Name: "../outside/link", Typeflag: tar.TypeSymlink, Linkname: "a"}},
	"absolute":            {file("OUTSIDE/canary", "x")},
	"absolute link":       {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "OUTSIDE"}, file("l/canary", "x")},
	"link up":             {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "../outside"}, file("l/canary", "x")},
	"link up from below":  {{Name: "a", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "a/l", Typeflag: tar.TypeSymlink, Linkname: "../../outside"}, file("a/l/canary", "x")},
	"link behind a link":  {{Name: "a/b", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "a/b/top", Typeflag: tar.TypeSymlink, Linkname: "../.."}, {Name: "a/b/top/l", Typeflag: tar.TypeSymlink, Linkname: "../outside"}, file("l/canary", "x")},
	"link through a link": {{Name: "a/b", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "a/b/top", Typeflag: tar.TypeSymlink, Linkname: "../.."}, {Name: "l", Typeflag: tar.TypeSymlink, Linkname: "a/b/top/../outside"}, file("l/canary", "x")},
	"hard link up":        {{Name: "h", Typeflag: tar.TypeLink, Linkname: "../outside/canary"}, file("h", "x")},
	"hard link absolute":  {{Name: "h", Typeflag: tar.TypeLink, Linkname: "OUTSIDE/canary"}},
	"device":              {{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}},
	"fifo":                {{Name: "fifo", Typeflag: tar.TypeFifo}},
	"empty name":          {file("", "x")},
	"not a directory":     {file(".", "x")},
}

// scene makes inside and outside, and fills in where outside is.
func scene(t *testing.T, headers []tar.Header) (inside, outside string, filled []tar.Header) {
	t.Helper()
	base := t.TempDir()
	inside, outside = filepath.Join(base, "inside"), filepath.Join(base, "outside")
	for _, dir := range []string{inside, outside} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(outside, "canary"), []byte("alive"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, h := range headers {
		h.Name = strings.Replace(h.Name, "OUTSIDE", outside, 1)
		h.Linkname = strings.Replace(h.Linkname, "OUTSIDE", outside, 1)
		filled = append(filled, h)
	}
	return inside, outside, filled
}

// harm describes what has happened to outside, or what points there.
func harm(t *testing.T, inside, outside string) string {
	t.Helper()
	if got, _ := os.ReadFile(filepath.Join(outside, "canary")); string(got) != "alive" {
		return "the canary was written to"
	}
	if entries, _ := os.ReadDir(outside); len(entries) != 1 {
		return "something was made outside"
	}
	found := ""
	canary, _ := os.Stat(filepath.Join(outside, "canary"))
	_ = filepath.WalkDir(inside, func(path string, _ fs.DirEntry, _ error) error {
		if target, err := filepath.EvalSymlinks(path); err == nil && strings.HasPrefix(target, outside) {
			found = path + " points outside"
		}
		if info, err := os.Stat(path); err == nil && os.SameFile(info, canary) {
			found = path + " is the canary"
		}
		return nil
	})
	return found
}

func TestPutDoesNotLeaveItsDirectory(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	for name, headers := range escapes {
		inside, outside, headers := scene(t, headers)
		err := b.Put(t.Context(), inside, tarOf(t, headers...))
		if !errors.Is(err, guest.ErrRefused) {
			t.Errorf("%s: got %v, want ErrRefused", name, err)
		}
		if found := harm(t, inside, outside); found != "" {
			t.Errorf("%s: %s", name, found)
		}
		if err := b.Put(t.Context(), inside, tarOf(t, file("next", "x"))); err != nil {
			t.Errorf("%s: the next put got %v, want nil", name, err)
		}
	}
}

// TestEscapesAreReal unpacks the same archives without the control and sees the
// harm, where the attack is on the canary at all.
func TestEscapesAreReal(t *testing.T) {
	t.Parallel()
	for name, headers := range escapes {
		switch name {
		case "device", "fifo", "empty name", "not a directory":
			continue // refused for what they are, not for where they lead
		}
		inside, outside, headers := scene(t, headers)
		r := tar.NewReader(tarOf(t, headers...))
		for h, err := r.Next(); err == nil; h, err = r.Next() {
			path := h.Name
			if !filepath.IsAbs(path) {
				path = filepath.Join(inside, path)
			}
			target := h.Linkname
			if h.Typeflag == tar.TypeLink && !filepath.IsAbs(target) {
				target = filepath.Join(inside, target)
			}
			content, _ := io.ReadAll(r)
			switch h.Typeflag {
			case tar.TypeReg:
				_ = os.MkdirAll(filepath.Dir(path), 0o755)
				_ = os.WriteFile(path, content, 0o644)
			case tar.TypeDir:
				_ = os.MkdirAll(path, 0o755)
			case tar.TypeSymlink:
				_ = os.Symlink(target, path)
			case tar.TypeLink:
				_ = os.Link(target, path)
			}
		}
		if harm(t, inside, outside) == "" {
			t.Errorf("%s: a naive unpacker does no harm with it: the attack proves nothing", name)
		}
	}
}

func TestPutWithLinksThatTheJobMade(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	inside, outside, _ := scene(t, nil)
	b.must(t, "cd "+inside+"; ln -s "+outside+" dir; ln -s "+outside+"/canary file; ln -s ../outside up; mkfifo fifo; mkdir full; ln -s full alias; ln "+outside+"/canary hard")
	for name, refused := range map[string]bool{"dir/canary": true, "up/canary": true, "full": true, "file": false, "fifo": false, "hard": false} {
		err := b.Put(t.Context(), inside, tarOf(t, file(name, "x")))
		if errors.Is(err, guest.ErrRefused) != refused || (err != nil) != refused {
			t.Errorf("%s: got %v, want refused: %v", name, err, refused)
		}
	}
	if got, _ := os.ReadFile(filepath.Join(outside, "canary")); string(got) != "alive" {
		t.Errorf("canary: got %q, want alive: a put wrote through a link", got)
	}
	for _, dir := range []string{"/dir/new", "/up/new", "/alias", "/alias/new"} {
		if err := b.Put(t.Context(), inside+dir, tarOf(t, file("a", "x"))); !errors.Is(err, guest.ErrRefused) {
			t.Errorf("directory %s behind a link: got %v, want ErrRefused", dir, err)
		}
	}
}

func TestPutReportsWhatIsWrong(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	dir := t.TempDir()
	whole := tarOf(t, file("a", strings.Repeat("x", 4000))).Bytes()
	broken := errors.New("disk gone")
	for name, c := range map[string]struct {
		dir  string
		in   io.Reader
		want error
	}{
		"not a tar":     {dir, strings.NewReader(strings.Repeat("no tar ", 1000)), guest.ErrRefused},
		"cut":           {dir, bytes.NewReader(whole[:2000]), guest.ErrRefused},
		"reader fails":  {dir, io.MultiReader(bytes.NewReader(whole[:2000]), failing{broken}), broken},
		"cut by source": {dir, io.MultiReader(bytes.NewReader(whole[:2000]), failing{io.ErrUnexpectedEOF}), io.ErrUnexpectedEOF},
		"reader stuck":  {dir, stuck{}, io.ErrNoProgress},
		"relative":      {"tmp", bytes.NewReader(whole), nil},
		"zero byte":     {"/tmp/\x00", bytes.NewReader(whole), nil},
		"below a file":  {"/etc/passwd/x", bytes.NewReader(whole), nil},
		"endless":       {dir, endless{}, guest.ErrRefused},
	} {
		err := b.Put(t.Context(), c.dir, c.in)
		if err == nil || (c.want != nil && !errors.Is(err, c.want)) {
			t.Errorf("%s: got %v, want %v", name, err, c.want)
		}
	}
	if err := b.Put(t.Context(), dir, strings.NewReader("")); err != nil {
		t.Errorf("nothing at all is an archive without entries: got %v", err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cause := errors.New("canceled")
	if err := b.Put(ctx, dir, io.MultiReader(bytes.NewReader(whole[:2000]), canceling{cancel, cause})); !errors.Is(err, cause) {
		t.Errorf("canceled: got %v, want the cause", err)
	}
	if err := b.Put(t.Context(), dir, bytes.NewReader(whole)); err != nil {
		t.Errorf("after all that: got %v, want nil", err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

type stuck struct{}

func (stuck) Read([]byte) (int, error) { return 0, nil }

type endless struct{}

func (endless) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = 'x'
	}
	return len(b), nil
}

type canceling struct {
	cancel context.CancelCauseFunc
	cause  error
}

func (c canceling) Read(b []byte) (int, error) {
	c.cancel(c.cause)
	return len(b), nil
}

func TestGet(t *testing.T) {
	t.Parallel()
	b := newBox(t, "")
	dir := t.TempDir()
	b.must(t, "cd "+dir+"; printf hello >a; : >empty; head -c 1000000 /dev/urandom >large; ln -s a link; ln -s . here; mkfifo fifo; mkdir d; python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\"sock\")' || mkfifo sock")
	large, err := os.ReadFile(filepath.Join(dir, "large"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path  string
		limit int64
		want  string
		err   error
	}{
		{dir + "/a", 5, "hello", nil},
		{dir + "/a", 1 << 40, "hello", nil},
		{dir + "/d/../a", 5, "hello", nil},
		{dir + "/empty", 0, "", nil},
		{dir + "/large", 1000000, string(large), nil},
		{dir + "/a", 4, "", guest.ErrRefused},
		{dir + "/large", 999999, "", guest.ErrRefused},
		{"/proc/version", 4, "", guest.ErrRefused}, // has no size before it is read
		{dir + "/link", 5, "", guest.ErrRefused},
		{dir + "/here/a", 5, "", guest.ErrRefused},
		{dir + "/fifo", 5, "", guest.ErrRefused},
		{dir + "/sock", 5, "", guest.ErrRefused},
		{dir + "/d", 5, "", guest.ErrRefused},
		{"/dev/zero", 5, "", guest.ErrRefused},
		{"/", 5, "", guest.ErrRefused},
		{dir + "/none", 5, "", fs.ErrNotExist},
		{dir + "/none/a", 5, "", fs.ErrNotExist},
	} {
		got, err := b.Get(t.Context(), c.path, c.limit)
		if string(got) != c.want || !errors.Is(err, c.err) || (c.err == nil && err != nil) {
			t.Errorf("get %s, at most %d: got %d bytes and %v, want %d and %v", c.path, c.limit, len(got), err, len(c.want), c.err)
		}
	}
	// A file of /proc has no size.
	if got, err := b.Get(t.Context(), "/proc/version", 1000); err != nil || len(got) == 0 {
		t.Errorf("/proc/version: got %q and %v, want content", got, err)
	}
	for _, path := range []string{"a", "", "/a\x00b", "/" + strings.Repeat("x", 5000)} {
		if _, err := b.Get(t.Context(), path, 5); err == nil {
			t.Errorf("get %.10q: got no error, want one", path)
		}
	}
	if _, err := b.Get(t.Context(), "/etc/passwd", -1); err == nil {
		t.Error("negative limit: got no error, want one")
	}
}
