package serve

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// Where os.Root may not be relied on, nothing is made behind a link, not even
// behind one that stays in the directory; elsewhere that one is allowed.
func TestDirect(t *testing.T) {
	t.Parallel()
	for _, direct := range []bool{false, true} {
		dir := t.TempDir()
		root, err := os.OpenRoot(dir)
		if err := errors.Join(err, os.MkdirAll(dir+"/real/deep", 0o755), os.Symlink("real", dir+"/link"), os.Symlink("..", dir+"/real/up")); err != nil {
			t.Fatal(err)
		}
		for name, behind := range map[string]bool{"real/f": false, "new/deep/f": false, "real/deep/f": false, "link/h": true, "link/deep/g": true, "real/up/g": true} {
			var b bytes.Buffer
			w := tar.NewWriter(&b)
			if err := errors.Join(w.WriteHeader(&tar.Header{Name: name, Mode: 0o644}), w.Close()); err != nil {
				t.Fatal(err)
			}
			err := unpack(&unpacker{root: root, scratch: make([]byte, 512), direct: direct}, &b)
			if refused := err != nil; refused != (direct && behind) {
				t.Errorf("%s, direct %v: got %v, want refused %v", name, direct, err, direct && behind)
			}
			if _, err := os.Lstat(filepath.Join(dir, name)); (err != nil) != (direct && behind) {
				t.Errorf("%s, direct %v: lstat: got %v", name, direct, err)
			}
		}
		if err := root.Close(); err != nil {
			t.Error(err)
		}
	}
}
