package containerd

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine/enginetest"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

func TestConfig(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*Config){
		"relative state":      func(c *Config) { c.StateDir = "state" },
		"no owner":            func(c *Config) { c.Owner = "" },
		"no guest":            func(c *Config) { c.Guest = nil },
		"no image":            func(c *Config) { c.Image = "" },
		"tcp":                 func(c *Config) { c.Address = "tcp://192.0.2.1:2376" },
		"relative socket":     func(c *Config) { c.Address = "containerd.sock" },
		"no namespace":        func(c *Config) { c.Namespace = "../x" },
		"no policy":           func(c *Config) { c.Images.Pull = "sometimes" },
		"negative limit":      func(c *Config) { c.Limits.Memory = -1 },
		"ids of the host":     func(c *Config) { c.FirstID = 1000 },
		"ids beyond 32 bits":  func(c *Config) { c.FirstID = 1<<32 - 1 },
		"negative id ranges":  func(c *Config) { c.Slots = -1 },
		"more ids than exist": func(c *Config) { c.Slots = 1 << 16 },
	} {
		c, err := testConfig(t.TempDir(), DefaultAddress)
		if err != nil {
			t.Fatal(err)
		}
		change(&c)
		if _, err := New(c); err == nil {
			t.Errorf("%s: got nil, want an error", name)
		} else if name == "tcp" && !errors.Is(err, sandbox.ErrUnsupported) {
			t.Errorf("%s: got %v, want ErrUnsupported", name, err)
		}
	}
}

// A daemon that is too old, or that does not say how old it is, is refused.
func TestRecent(t *testing.T) {
	t.Parallel()
	for version, ok := range map[string]bool{
		"1.6.20~ds1": true, "v1.7.28": true, "1.6.0": true, "2.4.2": true, "v2.0.0-rc.1": true, "10.0.0": true,
		"1.5.18": false, "v1.4.3": false, "0.9": false, "": false, "unknown": false, "2": false,
	} {
		if err := recent(version); (err == nil) != ok || err != nil && !errors.Is(err, sandbox.ErrUnsupported) {
			t.Errorf("%q: got %v, want accepted %v", version, err, ok)
		}
	}
}

// Only directories can be the layers of a box.
func TestLayers(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		mounts []mount.Mount
		want   string
	}{
		"one layer":  {[]mount.Mount{{Type: "bind", Source: "/a/fs", Options: []string{"ro", "rbind"}}}, "/a/fs"},
		"overlay":    {[]mount.Mount{{Type: "overlay", Options: []string{"index=off", "lowerdir=/b/fs:/a/fs"}}}, "/b/fs:/a/fs"},
		"volume":     {[]mount.Mount{{Type: "btrfs", Source: "/dev/sda", Options: []string{"subvolid=5"}}}, ""},
		"two mounts": {[]mount.Mount{{Type: "erofs"}, {Type: "overlay", Options: []string{"lowerdir=/a"}}}, ""},
		"nothing":    {nil, ""},
	} {
		got, err := layers(c.mounts)
		if strings.Join(got, ":") != c.want || (err != nil) != (c.want == "") || err != nil && !errors.Is(err, sandbox.ErrUnsupported) {
			t.Errorf("%s: got %q, %v, want %q", name, got, err, c.want)
		}
	}
}

// TestNothingOfTheHost: the specification has every namespace, no device, and no
// mount of the host but the guest's directory.
func TestNothingOfTheHost(t *testing.T) {
	t.Parallel()
	cfg, err := testConfig(t.TempDir(), DefaultAddress)
	if err != nil {
		t.Fatal(err)
	}
	r := newRuntime(t, cfg)
	s := r.spec("id", sandbox.Spec{Limits: cfg.Limits}, 1<<30)
	for _, m := range s.Mounts {
		if m.Type == "bind" && (m.Source != r.state.GuestDir() || !slices.Contains(m.Options, "ro") || !slices.Contains(m.Options, "rprivate")) {
			t.Errorf("mount %+v: want the guest's directory only, read-only", m)
		}
	}
	if len(s.Linux.Namespaces) != 7 || slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Path != "" }) {
		t.Errorf("namespaces: got %+v, want seven, all new", s.Linux.Namespaces)
	}
	if len(s.Linux.Devices) > 0 || s.Hooks != nil || len(s.Process.Env) > 0 || !s.Process.NoNewPrivileges || s.Linux.Seccomp.DefaultAction != specs.ActErrno {
		t.Errorf("specification %+v: want nothing of the host", s)
	}
	if ids := s.Linux.UIDMappings; len(ids) != 1 || ids[0] != (specs.LinuxIDMapping{HostID: 1 << 30, Size: kernel.Span}) || !slices.Equal(ids, s.Linux.GIDMappings) {
		t.Errorf("ids: got %+v", ids)
	}
	if c := s.Process.Capabilities; len(c.Inheritable)+len(c.Ambient) > 0 || len(c.Bounding) != 8 {
		t.Errorf("capabilities: got %+v, want eight that nobody inherits", c)
	}
}

// Every point of the code is one of points, so none is forgotten there.
func TestPointsAreComplete(t *testing.T) {
	t.Parallel()
	enginetest.PointsAreComplete(t, points())
}
