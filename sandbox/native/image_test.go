package native

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	oci "github.com/google/go-containerregistry/pkg/v1"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/sandboxtest"
	"github.com/mayfly-ci/mayfly/test/imagetest"
)

// imported makes a runtime that has an image, and says what the image is.
func imported(t *testing.T, img oci.Image) (*Runtime, sandbox.Image) {
	t.Helper()
	cfg := config(t)
	cfg.Images.Sources = map[string]string{"test/image": imagetest.Layout(t, img)}
	r := newRuntime(t, cfg)
	got, err := r.Pull(bounded(t), sandbox.Pull{Image: "test/image"})
	if err != nil {
		t.Fatal(err)
	}
	return r, got
}

// TestImageIsRoot: a box of an image has that image, copy-on-write, and of the
// host nothing but what every box has.
func TestImageIsRoot(t *testing.T) {
	t.Parallel()
	r, img := imported(t, imagetest.Busybox(t))
	if want := "PATH=/opt/tool/bin:/bin:/usr/bin FROM_IMAGE=yes"; strings.Join(img.Env, " ") != want {
		t.Errorf("env: got %q, want %q", img.Env, want)
	}
	b := create(t, r, "box", sandbox.Spec{Image: img.Ref})
	for _, c := range []struct{ what, script, want string }{
		{"the base is the image's", "ls / && ls /usr/bin", "bin\ndev\netc\nproc\nroot\nrun\nsys\ntmp\nusr\nvar\nworkspace\nenv\n"},
		{"its own files", "cat /etc/hostname && tail -2 /etc/hosts && head -1 /etc/resolv.conf", "mayfly\n::1 localhost ip6-localhost ip6-loopback mayfly\n192.0.2.1 mayfly\nnameserver 192.0.2.2\n"},
		{"root may change all of it", "rm /bin/vi && echo x >>/etc/passwd && mkdir /new && stat -c %u /bin/busybox /new && touch /tmp/a /run/mayfly/b /workspace/c", "0\n0\n"},
		{"what every box has", "pwd; stat -c '%a %F' /tmp /dev/null /run/mayfly; head -c2 /dev/zero | wc -c; test -e /proc/self && echo proc", "/workspace\n1777 directory\n666 character special file\n755 directory\n2\nproc\n"},
	} {
		out, exit := script(t, b, strings.ReplaceAll(c.script, "PATH=", ""))
		if c.what == "its own files" {
			if exit.Code != 0 || !strings.HasPrefix(out, "mayfly\n") || !strings.Contains(out, "nameserver ") {
				t.Errorf("%s: got %q %+v", c.what, out, exit)
			}
			continue
		}
		if exit.Code != 0 || out != c.want {
			t.Errorf("%s: got %q %+v, want %q", c.what, out, exit, c.want)
		}
	}
	again := create(t, r, "other", sandbox.Spec{Image: img.Ref})
	if out, exit := script(t, again, "test -e /bin/vi && ! test -e /new && wc -l </etc/passwd"); exit.Code != 0 || out != "2\n" {
		t.Errorf("another box of the image: got %q %+v, want the image as it was", out, exit)
	}
}

// TestImageLayers: what a layer deletes and replaces is gone in the box, through
// as many layers as an image may have.
func TestImageLayers(t *testing.T) {
	t.Parallel()
	layers := [][]byte{
		busyboxLayer(t),
		imagetest.Layer(t, imagetest.Dir("a"), imagetest.File("a/gone", "1"), imagetest.File("a/kept", "1"),
			imagetest.Dir("b"), imagetest.File("b/hidden", "1"), imagetest.File("c", "1"), imagetest.Dir("d"), imagetest.File("d/x", "1")),
		imagetest.Layer(t, imagetest.File("a/.wh.gone", ""), imagetest.File("b/.wh..wh..opq", ""), imagetest.File("b/new", "2"),
			imagetest.File(".wh.c", ""), imagetest.File(".wh.d", ""), imagetest.Hard("a/hard", "b/new"), imagetest.Link("a/link", "../b/new")),
	}
	for len(layers) < 128 {
		layers = append(layers, imagetest.Layer(t, imagetest.File("count", strings.Repeat("x", len(layers)+1))))
	}
	r, img := imported(t, imagetest.Of(t, layers...))
	b := create(t, r, "box", sandbox.Spec{Image: img.Ref})
	out, exit := script(t, b, "cd /; ls a b; ls c d 2>/dev/null; wc -c <count; cat a/link a/hard")
	if out != "a:\nhard\nkept\nlink\n\nb:\nnew\n128\n22" {
		t.Errorf("got %q %+v, want what the layers leave", out, exit)
	}
	if _, exit := script(t, b, "rm -r /a /b && mkdir /b && ! test -e /b/new && ! test -e /b/hidden"); exit.Code != 0 {
		t.Errorf("replacing a directory of the image: got %+v", exit)
	}
}

// TestImageWithoutAnything: an image that has nothing but a file makes a box that
// has all that every box has.
func TestImageWithoutAnything(t *testing.T) {
	t.Parallel()
	r, img := imported(t, imagetest.Of(t, imagetest.Layer(t, imagetest.File("only", "x"), imagetest.Link("run", "/usr/elsewhere"), imagetest.Link("tmp", "/only"))))
	b := create(t, r, "box", sandbox.Spec{Image: img.Ref})
	exit, err := b.Run(bounded(t), sandbox.Process{Args: []string{"/bin/sh"}})
	if err != nil || exit.Code != 127 {
		t.Errorf("a program that is not there: got %+v %v, want 127", exit, err)
	}
	hosts, err := b.Get(bounded(t), "/etc/hosts", 1<<10)
	if err != nil || !strings.Contains(string(hosts), "mayfly") {
		t.Errorf("/etc/hosts: got %q, %v", hosts, err)
	}
	for _, dir := range []string{sandbox.Workspace, sandbox.Run, "/tmp", "/var/tmp"} {
		var name string
		name, content := "probe", imagetest.Layer(t, imagetest.File("probe", "here"))
		if err := b.Put(bounded(t), dir, strings.NewReader(string(content))); err != nil {
			t.Errorf("%s: %v", dir, err)
			continue
		}
		if got, err := b.Get(bounded(t), dir+"/"+name, 10); err != nil || string(got) != "here" {
			t.Errorf("%s: got %q, %v", dir, got, err)
		}
	}
}

// TestImageSetuid: a set-user-ID program of an image gives nobody its owner's
// rights.
func TestImageSetuid(t *testing.T) {
	t.Parallel()
	probe, err := sandboxtest.BuildProbe(bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	suid, secret := imagetest.File("bin/probe", string(probe)), imagetest.File("secret", "x")
	suid.Mode, suid.Format = 0o4755, tar.FormatPAX
	suid.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\xff\xff\xff\xff" + strings.Repeat("\x00", 12)}
	secret.Mode = 0o600
	r, img := imported(t, imagetest.Of(t, busyboxLayer(t), imagetest.Layer(t, suid, secret)))
	b := create(t, r, "box", sandbox.Spec{Image: img.Ref})
	out, exit := script(t, b, "stat -c %a /bin/probe && probe open /secret && su -s /bin/sh nobody -c 'id -u; /bin/probe open /secret'")
	if exit.Code != 1 || !strings.HasPrefix(out, "4755\n65534\nrefused: ") {
		t.Errorf("got %q %+v, want the bit, root who reads the secret, and nobody who does not", out, exit)
	}
}

// TestImageAbsent: what was not pulled makes no box.
func TestImageAbsent(t *testing.T) {
	t.Parallel()
	r := newRuntime(t, config(t))
	_, err := r.Create(bounded(t), "box", sandbox.Spec{Image: "sha256:" + strings.Repeat("0", 64)})
	if !errors.Is(err, sandbox.ErrImage) {
		t.Errorf("got %v, want ErrImage", err)
	}
	if err := r.Destroy(bounded(t), "box"); err != nil {
		t.Error(err)
	}
	if left := leftovers(t, r.cfg.StateDir); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
	if _, err := r.Pull(bounded(t), sandbox.Pull{Image: "debian:12"}); !errors.Is(err, sandbox.ErrImage) || !strings.Contains(err.Error(), "images.from") {
		t.Errorf("a name that nobody allowed: got %v, want ErrImage that names images.from", err)
	}
}

// TestImageStays: what a box is made of is not pruned, however old, and is when
// the box is gone.
func TestImageStays(t *testing.T) {
	t.Parallel()
	cfg := config(t)
	cfg.Images.Sources = map[string]string{"test/image": imagetest.Layout(t, imagetest.Busybox(t))}
	cfg.Images.KeepAge = time.Nanosecond
	r := newRuntime(t, cfg)
	img, err := r.Pull(bounded(t), sandbox.Pull{Image: "test/image"})
	if err != nil {
		t.Fatal(err)
	}
	b := create(t, r, "box", sandbox.Spec{Image: img.Ref})
	prune := func() int {
		long := time.Now().Add(-48 * time.Hour)
		for _, p := range []string{"images", "layers"} {
			files, err := filepath.Glob(filepath.Join(r.cfg.StateDir, "images", p, "*"))
			if err != nil || len(files) == 0 {
				t.Fatalf("%s: got %v, %v, want what was pulled", p, files, err)
			}
			for _, f := range files {
				if err := os.Chtimes(f, long, long); err != nil {
					t.Fatal(err)
				}
			}
		}
		gone, err := newRuntime(t, cfg).Images().Prune(bounded(t)) // as a later agent has it
		if err != nil {
			t.Fatal(err)
		}
		return len(gone)
	}
	if n := prune(); n != 0 {
		t.Errorf("pruned %d images while a box is made of one", n)
	}
	if out, exit := script(t, b, "cat /bin/busybox | wc -c"); exit.Code != 0 {
		t.Errorf("got %q %+v", out, exit)
	}
	if err := r.Destroy(bounded(t), "box"); err != nil {
		t.Fatal(err)
	}
	if n := prune(); n != 1 {
		t.Errorf("pruned %d images, want the one", n)
	}
	if left, err := os.ReadDir(filepath.Join(r.cfg.StateDir, "images", "layers")); err != nil || len(left) > 0 {
		t.Errorf("layers left: %v, %v", left, err)
	}
}

// TestImageUnprivileged: an ordinary user's runtime has none, and says so.
func TestImageUnprivileged(t *testing.T) {
	t.Parallel()
	r := &Runtime{cfg: Config{Unprivileged: true}}
	if _, err := r.Pull(bounded(t), sandbox.Pull{Image: "debian:12"}); !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("Pull: got %v, want ErrUnsupported", err)
	}
	if _, err := r.Create(bounded(t), "box", sandbox.Spec{Image: "sha256:" + strings.Repeat("0", 64)}); !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("Create: got %v, want ErrUnsupported", err)
	}
}

// busyboxLayer is the only layer of the image of busybox.
func busyboxLayer(t testing.TB) []byte {
	t.Helper()
	ls, err := imagetest.Busybox(t).Layers()
	if err != nil {
		t.Fatal(err)
	}
	r, err := ls[0].Uncompressed()
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		t.Fatal(err)
	}
	return b
}
