// Package native runs boxes on the kernel alone: no daemon, no helper program on
// the way, and an image only where one is asked for.
//
// A box is a process in namespaces of its own, the user namespace included,
// whose ids no other box and nothing of the host has. It sees the host's
// /usr, a few files of /etc and the package database copy-on-write, and
// nothing else of the host; writes go to a private disk that ends with it. Its
// root has the capabilities that a build needs over its own namespace, none
// over the machine, and an allow-list of system calls.
//
// What limits what, as root: memory, processes and CPU by control groups
// (version 1, or 2), bytes and files by the size of the disk, and time by the
// guest, which ends at the expiry and whenever its control stream closes. So
// after the death of the agent only directories, empty control groups and id
// locks stay, all named after the box, and [Runtime.Destroy] removes them from
// the name alone. Everything of it is enforced or Create refuses. An ordinary
// user must ask for less with Config.Unprivileged; [Runtime.Check] then names
// each thing that is not enforced.
//
// Root in the box reads all of /usr and of the extra base directories, files
// of mode 0600 included: they must hold no secrets. /usr/local/etc, where
// package managers keep theirs, is empty in the box.
//
// A box may be made of an image instead (Spec.Image, [Runtime.Pull]): its layers,
// id-mapped, read-only and shared with other boxes, are below the private disk,
// and nothing of the host is in it but the guest program.
//
// Landlock is left out: the box has no file of the host in reach that the
// mounts do not already deny, so a ruleset would repeat them.
package native

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/gvisor"
	"github.com/mayfly-ci/mayfly/sandbox/image"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
	"github.com/mayfly-ci/mayfly/sandbox/native/boxinit"
)

// A Config says where and how boxes are made. StateDir, Owner and Guest are
// required; zero values of the rest are the defaults.
type Config struct {
	// StateDir is an absolute directory of the runtime's own, on a file system
	// with sparse and unnamed files (ext4, xfs, btrfs). Disks live in it.
	StateDir string
	// Owner is the installation; List reports boxes of this state directory.
	Owner string
	// Guest is the guest program (guest.Binary).
	Guest []byte
	// FirstID is the first user id of the boxes' ranges, and Slots how many
	// ranges of 65536 follow. Nothing else on the host may use them. The
	// defaults are 1<<30 and 1024.
	FirstID uint32
	Slots   int
	// CgroupParent is the control group, below the root of each hierarchy, in
	// which each state directory has one for its boxes. The default is
	// "mayfly".
	CgroupParent string
	// Base lists further directories of the host that boxes see read-only at
	// the same path, tool caches for instance. They must hold no secrets.
	Base []string
	// Hide lists directories below the base that boxes see empty, beside
	// /usr/local/etc.
	Hide []string
	// Limits are the defaults of a Spec. What is zero here is 4 GiB of
	// memory, 4096 processes, 2 cores, 10 GiB and a million files; 1 GiB of
	// disk for an unprivileged runtime, where it is memory.
	Limits sandbox.Limits
	// Images says which images boxes may be made of beside the base, and where
	// they come from. Its Dir, InUse and Trace are the runtime's.
	Images image.Config
	// Unprivileged accepts what an ordinary user cannot enforce.
	Unprivileged bool
	// GVisor is for boxes with a kernel of their own.
	GVisor gvisor.Config
	// Trace is called between outside effects, for crash tests.
	Trace func(point string)
}

// Runtime makes boxes. It implements sandbox.Runtime and may be used by
// several goroutines.
type Runtime struct {
	cfg    Config
	groups hierarchy // nil if unprivileged
	ids    kernel.IDs
	filter []byte
	guest  *os.File // sealed
	runsc  *gvisor.Runsc

	names kernel.Names // in work

	images *image.Store // nil if unprivileged

	mu    sync.Mutex
	boxes map[string]*box // that this process made

	baseMu  sync.Mutex // held while the base is made
	etc     string     // the boxes' /etc
	etcSeen time.Time  // when the host's was last looked at
}

var (
	_ sandbox.Runtime = (*Runtime)(nil)
	_ sandbox.Puller  = (*Runtime)(nil)
)

const (
	defaultFirst = 1 << 30
	defaultSlots = 1024
)

func (c *Config) complete() error {
	switch {
	case !filepath.IsAbs(c.StateDir):
		return fmt.Errorf("native: state directory %q is not absolute", c.StateDir)
	case c.Owner == "":
		return errors.New("native: owner is empty")
	case len(c.Guest) == 0:
		return errors.New("native: guest program is empty")
	case c.Slots < 0 || uint64(c.FirstID)+uint64(c.Slots)*kernel.Span > 1<<32-2:
		return fmt.Errorf("native: %d id ranges from %d do not fit in 32 bits", c.Slots, c.FirstID)
	case c.FirstID != 0 && c.FirstID < kernel.Span:
		return fmt.Errorf("native: first id %d belongs to the host: take one of at least %d", c.FirstID, kernel.Span)
	case len(c.Base) > boxinit.Dirs-3 || len(c.Hide) > boxinit.Dirs-1:
		return fmt.Errorf("native: more than %d base or %d hidden directories", boxinit.Dirs-3, boxinit.Dirs-1)
	}
	for _, p := range append(append([]string{}, c.Base...), c.Hide...) {
		if !filepath.IsAbs(p) || filepath.Clean(p) != p || p == "/" {
			return fmt.Errorf("native: base or hidden directory %q is not a clean absolute path below /", p)
		}
	}
	if err := c.GVisor.Validate(); err != nil {
		return fmt.Errorf("native: %w", err)
	}
	if c.FirstID == 0 {
		c.FirstID = defaultFirst
	}
	if c.Slots == 0 {
		c.Slots = defaultSlots
	}
	if c.CgroupParent == "" {
		c.CgroupParent = "mayfly"
	}
	if !filepath.IsLocal(c.CgroupParent) || c.CgroupParent == "." {
		return fmt.Errorf("native: cgroup parent %q leaves the hierarchy", c.CgroupParent)
	}
	c.StateDir = filepath.Clean(c.StateDir)
	if c.Trace == nil {
		c.Trace = func(string) {}
	}
	disk := int64(10 << 30)
	if c.Unprivileged {
		disk = 1 << 30
	}
	var err error
	c.Limits, err = kernel.Limits(c.Limits, sandbox.Limits{Memory: 4 << 30, Pids: 4096, MilliCPU: 2000, Disk: disk, Inodes: 1 << 20})
	if err != nil {
		return fmt.Errorf("native: %w", err)
	}
	return nil
}

// groupParent keeps boxes of the same name in different state directories
// apart: what has a box's name is killed and removed by Destroy.
func (c *Config) groupParent() string {
	sum := sha256.Sum256([]byte(c.StateDir))
	return filepath.Join(c.CgroupParent, hex.EncodeToString(sum[:6]))
}

// New checks the configuration and prepares the state directory. It makes no
// box and changes nothing else but the parent control groups.
func New(cfg Config) (*Runtime, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	if root := os.Geteuid() == 0; !root && !cfg.Unprivileged {
		return nil, fmt.Errorf("native: not root: run the agent as root, or accept weaker boxes with the unprivileged option: %w", sandbox.ErrUnsupported)
	} else if root && cfg.Unprivileged {
		return nil, errors.New("native: root does not need the unprivileged option: remove it")
	}
	r := &Runtime{cfg: cfg, boxes: map[string]*box{}, runsc: gvisor.New(cfg.GVisor)}
	for _, d := range []string{"", "boxes", "ids", "base"} {
		if err := os.MkdirAll(filepath.Join(cfg.StateDir, d), 0o700); err != nil {
			return nil, fmt.Errorf("native: %w", err)
		}
	}
	r.ids = kernel.IDs{Dir: filepath.Join(cfg.StateDir, "ids"), First: cfg.FirstID, Slots: cfg.Slots}
	var err error
	if r.filter, err = kernel.Filter(runtime.GOARCH); err != nil {
		return nil, fmt.Errorf("native: %w", err)
	}
	if !cfg.Unprivileged {
		info, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			return nil, fmt.Errorf("native: %w", err)
		}
		if r.groups, err = findHierarchy(info, cfg.groupParent()); err != nil {
			return nil, fmt.Errorf("native: %w", err)
		}
		if err := r.openImages(); err != nil {
			return nil, err
		}
	}
	if r.guest, err = sealed(cfg.Guest); err != nil {
		return nil, fmt.Errorf("native: guest program: %w", err)
	}
	r.cfg.Guest = nil // the kernel has it now
	return r, nil
}

// sealed puts the guest program into memory that nobody can change.
func sealed(b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("mayfly-guest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate("mayfly-guest", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "mayfly-guest")
	_, err = f.Write(b)
	if err == nil {
		err = f.Chmod(0o555)
	}
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
