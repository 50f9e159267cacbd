package dockertest

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// templateVersion names what a template holds; raise it with the images.
const templateVersion = 1

// suite is the Debian that the image is made of, the one that the tests run on.
const suite = "bookworm"

// packages of the image beside the essential ones.
const packages = "bash,ca-certificates,curl,gcc,git,libc6-dev,make,python3"

// Prepare is that of the stable engine.
func Prepare() error { return Stable().Prepare() }

// template is the data directory of a daemon that has the images. Whoever is
// first makes it, the others wait; renaming makes it appear whole.
func (e Engine) template(ctx context.Context) (_ string, err error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	parent := filepath.Join(cache, "mayfly", "docker")
	if err := os.MkdirAll(parent, 0o711); err != nil {
		return "", err
	}
	lock, err := os.OpenFile(filepath.Join(parent, "lock-"+e.Name), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", err
	}
	dir := filepath.Join(parent, fmt.Sprintf("data-%s-%s-%s-%d", e.Name, suite, runtime.GOARCH, templateVersion))
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return dir, err
	}
	// On the file system of the daemons, where its files can be linked to.
	work, err := os.MkdirTemp("", "mayfly-dockertest-images-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	if err := e.makeImages(ctx, work); err != nil {
		return "", err
	}
	unfinished := dir + ".new"
	if err := os.RemoveAll(unfinished); err != nil {
		return "", err
	}
	if err := e.copyData(ctx, filepath.Join(work, "data"), unfinished); err != nil {
		return "", err
	}
	return dir, os.Rename(unfinished, dir)
}

// makeImages runs a daemon below work, makes the images and leaves its data
// there. All engines have the images that the stable one made.
func (e Engine) makeImages(ctx context.Context, work string) (err error) {
	fill := func(d *Daemon) error { return d.makeImages(ctx, filepath.Join(work, "root")) }
	if len(e.servers) > 0 {
		stable, err := Stable().New(ctx, filepath.Join(work, "stable"))
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, stable.Close()) }()
		fill = func(d *Daemon) error {
			return errors.Join(d.CopyImage(ctx, stable, Busybox), d.CopyImage(ctx, stable, Debian))
		}
	}
	d, err := e.empty(ctx, filepath.Join(work, "docker"))
	if err != nil {
		return err
	}
	if err := d.start(ctx); err != nil {
		return errors.Join(err, d.Close())
	}
	err = fill(d)
	if err == nil {
		err = d.Stop(ctx)
	}
	if err == nil {
		err = os.Rename(d.data(), filepath.Join(work, "data"))
	}
	return errors.Join(err, d.Close())
}

func (d *Daemon) makeImages(ctx context.Context, root string) error {
	if err := bootstrap(ctx, root); err != nil {
		return err
	}
	busybox, err := BusyboxRoot()
	if err == nil {
		err = d.Import(ctx, busybox, Busybox)
	}
	if err == nil {
		err = d.importTree(ctx, root, Debian)
	}
	return err
}

// bootstrap installs a small Debian below root.
func bootstrap(ctx context.Context, root string) error {
	cmd := exec.CommandContext(ctx, "debootstrap", "--variant=minbase", "--include="+packages, suite, root)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/", "LC_ALL=C"}
	cmd.Env = append(cmd.Env, proxies()...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("debootstrap (Debian package debootstrap): %w: %s", err, out[max(0, len(out)-2000):])
	}
	for _, p := range []string{"var/cache/apt/archives", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"} {
		if err := os.RemoveAll(filepath.Join(root, p)); err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Join(root, p), 0o755); err != nil {
			return err
		}
	}
	return nil
}

// proxies are the variables by which this machine reaches Debian's packages, if
// it needs any.
func proxies() []string {
	var out []string
	for _, name := range []string{"http_proxy", "https_proxy", "no_proxy"} {
		if v := os.Getenv(name); v != "" {
			out = append(out, name+"="+v)
		}
	}
	return out
}

func (d *Daemon) importTree(ctx context.Context, root, ref string) error {
	cmd := exec.CommandContext(ctx, "tar", "-C", root, "--numeric-owner", "-cf", "-", ".")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return err
	}
	return errors.Join(d.Import(ctx, out, ref), cmd.Wait())
}

// copyData copies the data of a daemon that has stopped. Layers of images never
// change, so their files are links if the file system is the same.
func (e Engine) copyData(ctx context.Context, from, to string) error {
	script := `from=$1 to=$2; shift 2; mkdir -m 711 "$to"; cd "$from"
linked=" $* "
for f in *; do case $linked in *" $f "*) ;; *) cp -a "$f" "$to";; esac; done
for f in "$@"; do
	cp -al "$f" "$to" 2>/dev/null || { rm -rf "$to/$f"; cp -a "$f" "$to"; }
	find "$f" -name '*.db' -exec cp -a --remove-destination '{}' "$to/{}" ';'
done`
	args := append([]string{"-ec", script, "sh", from, to}, e.layers...)
	if out, err := exec.CommandContext(ctx, "/bin/sh", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("copy images: %w: %s", err, out)
	}
	return nil
}

// BusyboxRoot is the archive of the image Busybox.
func BusyboxRoot() (io.Reader, error) {
	const program = "/bin/busybox"
	b, err := os.ReadFile(program)
	if err != nil {
		return nil, fmt.Errorf("busybox (Debian package busybox-static): %w", err)
	}
	list, err := exec.Command(program, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("busybox (Debian package busybox-static): %w", err)
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	add := func(h tar.Header, content []byte) {
		h.Size = int64(len(content))
		err = errors.Join(err, w.WriteHeader(&h))
		_, writeErr := w.Write(content)
		err = errors.Join(err, writeErr)
	}
	for _, dir := range []string{"bin/", "etc/", "root/", "usr/", "usr/bin/"} {
		add(tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}, nil)
	}
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/busybox", Mode: 0o755}, b)
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/passwd", Mode: 0o644}, []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"))
	add(tar.Header{Typeflag: tar.TypeReg, Name: "etc/group", Mode: 0o644}, []byte("root:x:0:\nnogroup:x:65534:\n"))
	for name := range strings.FieldsSeq(string(list)) {
		if name != "busybox" { // or it would be a link to itself
			add(tar.Header{Typeflag: tar.TypeSymlink, Name: "bin/" + name, Linkname: "busybox"}, nil)
		}
	}
	add(tar.Header{Typeflag: tar.TypeSymlink, Name: "usr/bin/env", Linkname: "/bin/busybox"}, nil)
	return &out, errors.Join(err, w.Close())
}
