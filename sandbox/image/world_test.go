package image

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/test/imagetest"
)

// open makes a store of its own.
func open(t *testing.T, change func(*Config)) *Store {
	t.Helper()
	cfg := Config{Dir: filepath.Join(t.TempDir(), "images")}
	if change != nil {
		change(&cfg)
	}
	s, err := Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// bounded ends a test that hangs.
func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func must[T any](v T, err error) func(t *testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// pull is that of a name without credentials.
func (s *Store) get(t *testing.T, name string) (sandbox.Image, error) {
	t.Helper()
	return s.Pull(bounded(t), sandbox.Pull{Image: name})
}

// refused says what is wrong with an error that should be a refusal with a
// reason.
func refused(t *testing.T, what string, err error, reason string) {
	t.Helper()
	if !errors.Is(err, sandbox.ErrImage) || !strings.Contains(err.Error(), reason) {
		t.Errorf("%s: got %v, want ErrImage because of %q", what, err, reason)
	}
}

// tree lists what is below a directory.
func tree(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := e.Info()
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		line := rel + " " + st.Mode().String()
		if st.Mode().IsRegular() {
			b, readErr := os.ReadFile(p)
			line, err = line+" "+string(b[:min(len(b), 100)]), errors.Join(err, readErr)
		}
		out = append(out, line)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// empty says what a store has beside its directories.
func (s *Store) empty(t *testing.T) {
	t.Helper()
	left := slices.DeleteFunc(tree(t, s.cfg.Dir), func(line string) bool {
		name, _, _ := strings.Cut(line, " ")
		return slices.Contains([]string{".", "images", "layers", "names", "work", "lock"}, name)
	})
	if len(left) > 0 {
		t.Errorf("left in the store: %.2000q", left)
	}
}

// dirs are the layers of an image, the top one first.
func (s *Store) dirs(t *testing.T, ref string) []string {
	t.Helper()
	var out []string
	if err := s.Layers(bounded(t), ref, func(dirs []string) error { out = dirs; return nil }); err != nil {
		t.Fatal(err)
	}
	return out
}

// saved writes an image as "docker save" did before version 25.
func savedArchive(t *testing.T, img v1.Image, tags string) string {
	t.Helper()
	config := must(img.RawConfigFile())(t)
	hash := must(img.ConfigName())(t)
	file := filepath.Join(t.TempDir(), "saved.tar")
	entries := []imagetest.Entry{imagetest.File(hash.Hex+".json", string(config))}
	var names []string
	for i, l := range must(img.Layers())(t) {
		b := must(io.ReadAll(must(l.Uncompressed())(t)))(t)
		dir := string(rune('a' + i))
		entries = append(entries, imagetest.Dir(dir+"/"), imagetest.File(dir+"/layer.tar", string(b)))
		names = append(names, `"`+dir+`/layer.tar"`)
	}
	manifest := `[{"Config":"` + hash.Hex + `.json","RepoTags":[` + tags + `],"Layers":[` + strings.Join(names, ",") + `]}]`
	entries = append(entries, imagetest.File("manifest.json", manifest))
	if err := os.WriteFile(file, imagetest.Layer(t, entries...), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// packed is a directory as an archive.
func packed(t *testing.T, dir string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "packed.tar")
	f := must(os.Create(file))(t)
	w := tar.NewWriter(f)
	if err := errors.Join(w.AddFS(os.DirFS(dir)), w.Close(), f.Close()); err != nil {
		t.Fatal(err)
	}
	return file
}
