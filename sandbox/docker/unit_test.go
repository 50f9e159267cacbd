package docker

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/docker/docker/api/types/system"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// empty is an archive of an empty file.
func empty(name string) io.Reader {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Typeflag: tar.TypeReg}), w.Close()); err != nil {
		return strings.NewReader(err.Error()) // is no archive
	}
	return &b
}

func TestUnlimited(t *testing.T) {
	t.Parallel()
	full := system.Info{MemoryLimit: true, CPUCfsQuota: true, PidsLimit: true, CgroupDriver: "cgroupfs"}
	if got := unlimited(full); len(got) > 0 {
		t.Errorf("a daemon with limits: got %+v, want nothing", got)
	}
	rootless := full
	rootless.CgroupDriver = "none"
	if got := unlimited(rootless); len(got) != 3 || got[0].Enforced {
		t.Errorf("a daemon without control groups: got %+v, want three claims that do not hold", got)
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*Config){
		"relative state":  func(c *Config) { c.StateDir = "state" },
		"no owner":        func(c *Config) { c.Owner = "" },
		"no guest":        func(c *Config) { c.Guest = nil },
		"no image":        func(c *Config) { c.Image = "" },
		"tcp":             func(c *Config) { c.Host = "tcp://192.0.2.1:2376" },
		"ssh":             func(c *Config) { c.Host = "ssh://user@host" },
		"relative socket": func(c *Config) { c.Host = "unix://docker.sock" },
		"negative limit":  func(c *Config) { c.Limits.Memory = -1 },
	} {
		c, err := testConfig(t.TempDir(), DefaultHost)
		if err != nil {
			t.Fatal(err)
		}
		change(&c)
		if _, err := New(c); err == nil {
			t.Errorf("%s: got nil, want an error", name)
		} else if strings.Contains(name, "tcp ssh") && !errors.Is(err, sandbox.ErrUnsupported) {
			t.Errorf("%s: got %v, want ErrUnsupported", name, err)
		}
	}
}

// Every point of the code is one of points, so none is forgotten there.
func TestPointsAreComplete(t *testing.T) {
	t.Parallel()
	known := strings.Join(points(), " ") + " "
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, part := range strings.Split(string(b), `cfg.Trace("`)[1:] {
			point, _, _ := strings.Cut(part, `"`)
			if n++; !strings.HasSuffix(f, "_test.go") && !strings.Contains(known, point+" ") {
				t.Errorf("%s: point %q is not in points()", f, point)
			}
		}
	}
	if n < len(points())-1 {
		t.Errorf("got %d points in the code, want %d", n, len(points())-1)
	}
}
