// Package containerd makes boxes of containers of a containerd on this machine,
// version 1.6 or newer.
//
// containerd gives what it is good at: images, unpacked by a snapshotter, and an
// OCI runtime (runc) that makes the namespaces, capabilities, system call filter
// and control groups, each of which is looked at in the kernel before the box is
// used. Each box has a user namespace with a range of ids that no other has. The
// container itself is an idle guest in an empty directory. The agent enters its
// namespaces by process 1 and gives it the loopback-only network and a root that
// is an overlay of the image's layers, mapped to the ids of the box, over a disk
// of the plan's size, so that one limit covers all that a job writes (ADR 0011,
// 0015). Nothing of the host is mounted in the box.
//
// What is made in containerd has a name made of the box's, in a namespace of the
// agent's own. From the first moment it is held by a containerd lease, which
// expires, and then by the container, so that its garbage collection takes
// neither what is in use nor leaves what nobody owns. A read-only snapshot, which
// has no files of its own, keeps the layers for as long as the box.
//
// The stream to the guest is an abstract socket in the network namespace of the
// container. It passes no daemon: a step costs no round trip to one, and a job
// survives a restart of containerd, whose containers live on. The guest ends when
// the stream ends, so the death of the agent ends what runs, whatever the daemon
// does.
//
// A box with a kernel of its own (gVisor) is such a container, too: what runs in it
// is a keeper that starts that kernel there (ADR 0016).
//
// The daemon must be on this machine, in its pid namespace, and have its file
// system; the snapshotter must give directories (overlayfs, native) of a file
// system that has id-mapped mounts. Its own variables of the environment are not
// read.
package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine"
	"github.com/mayfly-ci/mayfly/sandbox/gvisor"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

// Defaults of a Config.
const (
	DefaultAddress     = "/run/containerd/containerd.sock"
	DefaultNamespace   = "mayfly"
	DefaultSnapshotter = "overlayfs"
	DefaultRuntime     = "io.containerd.runc.v2"

	// defaultFirst follows the ranges that the native runtime has by default.
	defaultFirst = 1<<30 + 1024*kernel.Span
	defaultSlots = 1024
)

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
	// Address is the path of the daemon's socket.
	Address string
	// Namespace is that of containerd in which images are looked for and
	// containers made. Several agents may share one.
	Namespace string
	// Snapshotter unpacks images.
	Snapshotter string
	// Image is that of boxes whose Spec has none: a tag or a digest.
	Image string
	// Images say which images are pulled.
	Images engine.Images
	// Runtime names a shim of containerd whose OCI runtime runs processes on the
	// kernel of this machine, as runc does.
	Runtime string
	// GVisor is for boxes with a kernel of their own. It is run in the container, by
	// what runs in it, and is nothing that containerd knows.
	GVisor gvisor.Config
	// FirstID is the first user id of the boxes' ranges, and Slots how many
	// ranges of 65536 follow. Nothing else on the host may use them. The
	// defaults are 1140850688 and 1024.
	FirstID uint32
	Slots   int
	// Limits are the defaults of a Spec. What is zero here is 4 GiB of memory,
	// 4096 processes, 2 cores, 10 GiB and a million files.
	Limits sandbox.Limits
	// Ask is the command of a program that calls Ask, so that what the daemon is
	// making outlives the agent. Empty: the agent asks itself.
	Ask []string
	// Trace is called between outside effects, for crash tests.
	Trace func(point string)
}

// Runtime makes boxes. It implements sandbox.Runtime and sandbox.Puller, and may
// be used by several goroutines.
type Runtime struct {
	cfg     Config
	client  *client.Client
	seccomp *specs.LinuxSeccomp
	state   *engine.State
	ids     kernel.IDs
	runsc   *gvisor.Runsc
}

var (
	_ sandbox.Runtime = (*Runtime)(nil)
	_ sandbox.Puller  = (*Runtime)(nil)
)

// CheckAddress refuses the address of a daemon that cannot be on this machine,
// with sandbox.ErrUnsupported. "" is DefaultAddress.
func CheckAddress(address string) error {
	if address != "" && !filepath.IsAbs(strings.TrimPrefix(address, "unix://")) {
		return fmt.Errorf("address %q: the agent enters its containers, so the daemon must be on this machine: write the path of its socket: %w", address, sandbox.ErrUnsupported)
	}
	return nil
}

// CheckNamespace refuses what cannot be a namespace of containerd. "" is
// DefaultNamespace.
func CheckNamespace(name string) error {
	if name == "" {
		return nil
	}
	if err := identifiers.Validate(name); err != nil {
		return fmt.Errorf("namespace: %w", err)
	}
	return nil
}

func (c *Config) complete() error {
	for _, d := range []struct {
		value    *string
		standard string
	}{
		{&c.Address, DefaultAddress},
		{&c.Namespace, DefaultNamespace},
		{&c.Snapshotter, DefaultSnapshotter},
		{&c.Runtime, DefaultRuntime},
	} {
		if *d.value == "" {
			*d.value = d.standard
		}
	}
	if c.FirstID == 0 {
		c.FirstID = defaultFirst
	}
	if c.Slots == 0 {
		c.Slots = defaultSlots
	}
	if c.Trace == nil {
		c.Trace = func(string) {}
	}
	if err := errors.Join(CheckAddress(c.Address), c.Images.Check(), CheckNamespace(c.Namespace), c.GVisor.Validate()); err != nil {
		return err
	}
	c.Address = strings.TrimPrefix(c.Address, "unix://")
	switch {
	case c.Image == "":
		return errors.New("no image: name the one that boxes have if a rule names none")
	case c.Slots < 0 || uint64(c.FirstID)+uint64(c.Slots)*kernel.Span > 1<<32-2 || c.FirstID < kernel.Span:
		return fmt.Errorf("%d id ranges from %d: they must fit in 32 bits and begin at %d or above", c.Slots, c.FirstID, kernel.Span)
	}
	var err error
	c.Limits, err = engine.Defaults(c.Limits)
	return err
}

// New checks the configuration and prepares the state directory. It asks the
// daemon nothing.
func New(cfg Config) (*Runtime, error) {
	r, err := open(cfg)
	if err != nil {
		return nil, fmt.Errorf("containerd: %w", err)
	}
	return r, nil
}

func open(cfg Config) (*Runtime, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	r := &Runtime{cfg: cfg, runsc: gvisor.New(cfg.GVisor)}
	var err error
	if r.state, err = engine.Open(cfg.StateDir, cfg.Owner, cfg.Guest); err != nil {
		return nil, err
	}
	r.cfg.Guest = nil // a file has it now
	r.ids = kernel.IDs{Dir: filepath.Join(cfg.StateDir, "ids"), First: cfg.FirstID, Slots: cfg.Slots}
	if err := os.MkdirAll(r.ids.Dir, 0o700); err != nil {
		return nil, err
	}
	profile, err := engine.Profile(runtime.GOARCH)
	if err == nil { // it is text in the words of the OCI specification
		err = json.Unmarshal([]byte(profile), &r.seccomp)
	}
	if err != nil {
		return nil, fmt.Errorf("system call filter: %w", err)
	}
	// The client has a log of its own; what matters to an operator is in errors.
	if err := log.SetLevel("panic"); err != nil {
		return nil, err
	}
	// It also bounds how long the client is idle before it looks whether a daemon
	// that was away is back.
	r.client, err = client.New(cfg.Address, client.WithDefaultNamespace(cfg.Namespace), client.WithTimeout(time.Second))
	return r, err
}

// within gives calls the namespace, which parts of the client look for here.
func (r *Runtime) within(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, r.cfg.Namespace)
}

// Close lets go of the connections to the daemon. Boxes are not touched.
func (r *Runtime) Close() error { return r.client.Close() }
