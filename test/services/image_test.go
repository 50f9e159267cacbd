package services_test

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
	"strings"
	"testing"

	"github.com/mayfly-ci/mayfly/test/dockertest"
)

// Images of this test, beside dockertest's.
const (
	postgresImage = "mayfly-test/postgres:1"
	webImage      = "mayfly-test/web:1"
)

// start is what the image of PostgreSQL is for. It runs as postgres.
const start = `#!/bin/sh
set -e
echo "$POSTGRES_PASSWORD" >/tmp/password
initdb -D /data/db -A scram-sha-256 -U postgres --pwfile /tmp/password --no-sync >/dev/null 2>&1
echo "the database starts with $POSTGRES_PASSWORD"
exec postgres -D /data/db -k /tmp -c fsync=off
`

// A root is the archive of an image that is being made.
type root struct {
	out  bytes.Buffer
	tar  *tar.Writer
	seen map[string]bool
}

// postgresRoot is busybox with the PostgreSQL of this machine.
func postgresRoot(t *testing.T) io.Reader {
	t.Helper()
	bins, err := filepath.Glob("/usr/lib/postgresql/*/bin/initdb")
	if err != nil || len(bins) == 0 {
		t.Fatalf("no PostgreSQL (Debian package postgresql): %v", err)
	}
	bin := filepath.Dir(bins[len(bins)-1])
	r := &root{seen: map[string]bool{}}
	r.tar = tar.NewWriter(&r.out)
	r.busybox(t)
	r.text(t, "etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\npostgres:x:999:999::/data:/bin/sh\n")
	r.text(t, "etc/group", 0o644, "root:x:0:\npostgres:x:999:\n")
	r.text(t, "start", 0o755, start)
	r.header(t, tar.Header{Typeflag: tar.TypeDir, Name: "data/", Mode: 0o700, Uid: 999, Gid: 999})
	r.header(t, tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777})
	for _, tree := range []string{filepath.Dir(bin), "/usr/share/postgresql/" + filepath.Base(filepath.Dir(bin)), "/usr/share/zoneinfo/Etc"} {
		r.tree(t, tree)
	}
	for _, program := range []string{"initdb", "postgres", "psql", "pg_isready"} {
		out, err := exec.Command("ldd", filepath.Join(bin, program)).Output()
		if err != nil {
			t.Fatalf("ldd %s: %v", program, err)
		}
		for word := range strings.FieldsSeq(string(out)) {
			if strings.HasPrefix(word, "/") {
				r.file(t, word)
			}
		}
		r.header(t, tar.Header{Typeflag: tar.TypeSymlink, Name: "usr/bin/" + program, Linkname: filepath.Join(bin, program)})
	}
	if err := r.tar.Close(); err != nil {
		t.Fatal(err)
	}
	return &r.out
}

// busybox copies the image of busybox, but for its users.
func (r *root) busybox(t *testing.T) {
	t.Helper()
	archive, err := dockertest.BusyboxRoot()
	if err != nil {
		t.Fatal(err)
	}
	for in := tar.NewReader(archive); ; {
		h, err := in.Next()
		if err == io.EOF {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Name == "etc/passwd" || h.Name == "etc/group" {
			continue
		}
		r.header(t, *h)
		if _, err := io.Copy(r.tar, in); err != nil {
			t.Fatal(err)
		}
	}
}

func (r *root) header(t *testing.T, h tar.Header) {
	t.Helper()
	r.seen[strings.Trim(h.Name, "/")] = true
	if err := r.tar.WriteHeader(&h); err != nil {
		t.Fatal(err)
	}
}

func (r *root) text(t *testing.T, name string, mode int64, content string) {
	t.Helper()
	r.header(t, tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(content))})
	if _, err := io.WriteString(r.tar, content); err != nil {
		t.Fatal(err)
	}
}

// file copies what is behind a path of this machine to the same path.
func (r *root) file(t *testing.T, path string) {
	t.Helper()
	name := strings.TrimPrefix(path, "/")
	if r.seen[name] {
		return
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	r.text(t, name, 0o755, string(b))
}

// tree copies the files below a directory, without the compiler of queries,
// which is as large as the rest.
func (r *root) tree(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && !strings.Contains(path, "llvmjit") && !strings.Contains(path, "/bitcode/") {
			if info, err := os.Stat(path); err != nil || !info.Mode().IsRegular() {
				return err
			}
			r.file(t, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// load gives a daemon the images.
func load(t *testing.T, d *dockertest.Daemon) {
	t.Helper()
	ctx := context.Background()
	busybox, err := dockertest.BusyboxRoot()
	if err == nil {
		err = d.Import(ctx, busybox, webImage, `CMD ["/bin/sh", "-c", "echo the web starts; httpd -f -p 5432 -h /etc"]`)
	}
	if err == nil {
		err = d.Import(ctx, postgresRoot(t), postgresImage, `ENTRYPOINT ["/start"]`, "ENV LC_ALL=C TZ=Etc/UTC", "USER postgres")
	}
	if err != nil {
		t.Fatal(fmt.Errorf("images: %w", err))
	}
}

// saved are the images, in an archive as "docker save" writes it too.
func saved(t *testing.T) images {
	t.Helper()
	i := images{dockertest.Start(t), filepath.Join(t.TempDir(), "images.tar")}
	load(t, i.daemon)
	f, err := os.Create(i.file)
	if err == nil {
		err = errors.Join(i.daemon.Save(t.Context(), f, postgresImage, webImage), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return i
}
