// Package docker makes boxes of containers of a Docker Engine on this machine,
// over engine API 1.41 or newer.
//
// The engine gives what it is good at: an image as the root, namespaces,
// capabilities, a system call filter and control groups, each of which is looked
// at in the kernel before the box is used. What it cannot give comes from the
// agent, which enters the namespaces of the container by its process 1, while
// that is an idle guest: the loopback-only network and its sockets, and a root
// that is an overlay of the image over a disk of the plan's size, so that one
// limit covers all that a job writes (ADR 0011). Nothing of the host is mounted
// in the box; the socket of the engine is not, and no option makes it so.
//
// The stream to the guest is an abstract socket in the network namespace of the
// container. It passes no engine: a step costs no round trip to one, and a job
// survives the restart of a daemon that keeps its containers (live-restore).
// Otherwise the daemon kills them when it comes back, and the box is
// sandbox.ErrDied. The guest ends when the stream ends, so the death of the
// agent ends what runs, whatever the daemon does.
//
// A box with a kernel of its own (gVisor) is such a container, too: what runs in it
// is a keeper that starts that kernel there (ADR 0016). It needs a daemon that gives
// containers a user namespace.
//
// The daemon must be on this machine, in its pid namespace, and see the state
// directory at the same path. It pulls images, if it is told to (Pull); Create
// asks no registry. The engine's variables of the environment and its
// config.json are not read.
//
// The client is github.com/docker/docker/client, of the owner's choice. That
// module is frozen at v28, and its successor's parts (github.com/moby/moby/client)
// speak the same API: moving is a change of imports in this package, which is
// the only one that has it.
package docker

import (
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"

	"github.com/docker/docker/client"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine"
	"github.com/mayfly-ci/mayfly/sandbox/gvisor"
)

// DefaultHost is where a daemon listens if nobody says otherwise.
const DefaultHost = "unix:///var/run/docker.sock"

// A Config says how boxes are made. StateDir, Owner, Guest and Image are
// required; zero values of the rest are the defaults.
type Config struct {
	// StateDir is an absolute directory of the runtime's own, on a file system
	// with sparse and unnamed files (ext4, xfs, btrfs). Disks live in it, and
	// the daemon must see it at the same path.
	StateDir string
	// Owner is the installation, on the label of every container.
	Owner string
	// Guest is the guest program (guest.Binary).
	Guest []byte
	// Host is the socket of the daemon, "unix:///path". The default is DefaultHost.
	Host string
	// Image is that of boxes whose Spec has none: a tag, a digest or an id.
	Image string
	// Images say which images the daemon is told to pull.
	Images engine.Images
	// Runtime names an OCI runtime of the daemon that runs processes on the
	// kernel of this machine, as runc does. The default is the daemon's.
	Runtime string
	// GVisor is for boxes with a kernel of their own. It is run in the container, by
	// what runs in it, and is nothing that the daemon knows; the daemon must give
	// containers a user namespace (userns-remap).
	GVisor gvisor.Config
	// Limits are the defaults of a Spec. What is zero here is 4 GiB of memory,
	// 4096 processes, 2 cores, 10 GiB and a million files.
	Limits sandbox.Limits
	// Trace is called between outside effects, for crash tests.
	Trace func(point string)
}

// Runtime makes boxes. It implements sandbox.Runtime and may be used by
// several goroutines.
type Runtime struct {
	cfg     Config
	engine  *client.Client
	profile string // seccomp
	state   *engine.State
	runsc   *gvisor.Runsc
}

var (
	_ sandbox.Runtime = (*Runtime)(nil)
	_ sandbox.Puller  = (*Runtime)(nil)
)

// CheckHost refuses the address of a daemon that cannot be on this machine, with
// sandbox.ErrUnsupported. "" is DefaultHost.
func CheckHost(host string) error {
	socket, local := strings.CutPrefix(host, "unix://")
	if host != "" && (!local || !filepath.IsAbs(socket)) {
		return fmt.Errorf("host %q: the agent enters its containers, so the daemon must be on this machine: write unix:///path/of/the/socket: %w", host, sandbox.ErrUnsupported)
	}
	return nil
}

func (c *Config) complete() error {
	if c.Host == "" {
		c.Host = DefaultHost
	}
	if err := CheckHost(c.Host); err != nil {
		return fmt.Errorf("docker: %w", err)
	}
	if c.Image == "" {
		return errors.New("docker: no image: name the one that boxes have if a rule names none")
	}
	if err := errors.Join(c.Images.Check(), c.Images.Allow(c.Image), c.GVisor.Validate()); err != nil {
		return fmt.Errorf("docker: %w", err)
	}
	if c.Trace == nil {
		c.Trace = func(string) {}
	}
	var err error
	c.Limits, err = engine.Defaults(c.Limits)
	if err != nil {
		return fmt.Errorf("docker: %w", err)
	}
	return nil
}

// New checks the configuration and prepares the state directory. It asks the
// daemon nothing.
func New(cfg Config) (*Runtime, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	r := &Runtime{cfg: cfg, runsc: gvisor.New(cfg.GVisor)}
	var err error
	if r.state, err = engine.Open(cfg.StateDir, cfg.Owner, cfg.Guest); err != nil {
		return nil, fmt.Errorf("docker: %w", err)
	}
	r.cfg.Guest = nil // a file has it now
	if r.profile, err = engine.Profile(runtime.GOARCH); err != nil {
		return nil, fmt.Errorf("docker: system call filter: %w", err)
	}
	r.engine, err = client.NewClientWithOpts(client.WithHost(cfg.Host), client.WithAPIVersionNegotiation())
	if err != nil {
		return nil, fmt.Errorf("docker: %w", err)
	}
	return r, nil
}

// Close lets go of the connections to the daemon. Boxes are not touched.
func (r *Runtime) Close() error { return r.engine.Close() }
