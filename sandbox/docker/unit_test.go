package docker

import (
	"errors"
	"strings"
	"testing"

	"github.com/docker/docker/api/types/system"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine/enginetest"
)

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
	enginetest.PointsAreComplete(t, points())
}
