// Package gvisor is what runtimes need to give a box a kernel of its own: the
// program runsc of gVisor, looked at before it is used, and what it is told of the
// box (docs/adr/0016). How it runs in the box is in keeper.
package gvisor

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/gvisor/keeper"
)

// A Config says with what boxes get a kernel of their own.
type Config struct {
	// Runsc is the absolute path of the program; "" is none, and then isolation
	// "gvisor" is refused.
	Runsc string
	// Platform is how it catches system calls: "systrap", the default, or "kvm",
	// which does not come up on every machine that has a /dev/kvm.
	Platform string
}

const (
	systrap = "systrap" // works everywhere

	// oldestRunsc is the day, as its version says it, of the oldest runsc that
	// has all options that we need. The tests know that of their own only.
	oldestRunsc = "20250101"
	// askTime bounds "runsc --version".
	askTime = 10 * time.Second
	// complaintBytes is how much of what runsc said is shown.
	complaintBytes = 2 << 10
)

// Validate says what is wrong with the words of it. It looks at no file.
func (g Config) Validate() error {
	switch {
	case g.Runsc != "" && (!filepath.IsAbs(g.Runsc) || filepath.Clean(g.Runsc) != g.Runsc):
		return fmt.Errorf("runsc %q is not a clean absolute path", g.Runsc)
	case g.Platform != "" && g.Platform != systrap && g.Platform != "kvm":
		return fmt.Errorf("platform %q: this agent knows systrap and kvm", g.Platform)
	}
	return nil
}

// A Runsc is the program of a Config. It may be used by several goroutines.
type Runsc struct {
	cfg Config

	// What a program said of itself, which takes longer than to look whether it is
	// still the same one.
	mu  sync.Mutex
	of  [4]int64 // device, inode, size, time of change
	day string
}

// New is the program of a valid Config. It looks at no file.
func New(cfg Config) *Runsc {
	cfg.Platform = cmp.Or(cfg.Platform, systrap)
	return &Runsc{cfg: cfg}
}

// Platform is how it catches system calls.
func (r *Runsc) Platform() string { return r.cfg.Platform }

// Open returns the program, looked at, and the day that it is of. What is executed
// later is this file, whatever its name stands for by then. What cannot be used is
// sandbox.ErrUnsupported.
func (r *Runsc) Open(ctx context.Context) (f *os.File, day string, err error) {
	f, day, err = r.open(ctx)
	if err != nil {
		return nil, "", fmt.Errorf("isolation %q: %w: %w", sandbox.GVisor, err, sandbox.ErrUnsupported)
	}
	return f, day, nil
}

func (r *Runsc) open(ctx context.Context) (f *os.File, day string, err error) {
	if r.cfg.Runsc == "" {
		return nil, "", errors.New(`no runsc is configured: install gVisor and say "gvisor: {runsc: /usr/local/bin/runsc}" in the section of this runtime`)
	}
	if f, err = os.Open(r.cfg.Runsc); err != nil {
		return nil, "", fmt.Errorf("install gVisor's runsc: %w", err)
	}
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	switch {
	case err != nil:
	case st.Mode&unix.S_IFMT != unix.S_IFREG || st.Mode&0o005 != 0o005:
		err = fmt.Errorf("%s is not a program that everybody may read and run, as root of a box has to: chmod 755", r.cfg.Runsc)
	case st.Mode&0o022 != 0 || st.Uid != 0:
		err = fmt.Errorf("%s can be changed by others than root: chown root, chmod 755", r.cfg.Runsc)
	default:
		day, err = r.ask(ctx, f, st)
	}
	if err != nil {
		return nil, "", errors.Join(err, f.Close())
	}
	return f, day, nil
}

func (r *Runsc) ask(ctx context.Context, f *os.File, st unix.Stat_t) (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	of := [4]int64{int64(st.Dev), int64(st.Ino), st.Size, st.Ctim.Nano()}
	if r.day != "" && r.of == of {
		return r.day, nil
	}
	day, err := askVersion(ctx, f)
	r.of, r.day = of, day
	return day, err
}

// askVersion runs the program to hear how old it is.
func askVersion(ctx context.Context, f *os.File) (day string, err error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, f.Name(), "--version") // the same file: only root can change what it names
	cmd.Env = []string{"PATH=/usr/bin:/bin"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w: %.200s", f.Name(), err, out)
	}
	if day, err = runscDay(string(out)); err != nil {
		return "", fmt.Errorf("%s: %w", f.Name(), err)
	}
	if day < oldestRunsc {
		return "", fmt.Errorf("%s is of %s, and at least %s is needed: update gVisor", f.Name(), day, oldestRunsc)
	}
	return day, nil
}

// runscDay is the date in what "runsc --version" prints: "runsc version
// release-20250820.0", or the version of a Go module.
func runscDay(text string) (string, error) {
	line, _, _ := strings.Cut(text, "\n")
	version, ok := strings.CutPrefix(line, "runsc version ")
	found := regexp.MustCompile(`(?:^release-|-)(20[0-9]{6})`).FindStringSubmatch(version)
	if !ok || found == nil {
		return "", fmt.Errorf("its version, %.80q, says no date: take an official release of gVisor", line)
	}
	return found[1], nil
}

// capabilities of a box by name (linux/capability.h), as boxinit keeps them.
func capabilities() []string {
	return []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_SETUID", "CAP_SETGID", "CAP_KILL", "CAP_NET_BIND_SERVICE"}
}

// A Box is what its kernel is told of a box.
type Box struct {
	Host     string
	Expires  uint64 // Unix seconds; 0 is never
	Filter   []byte // of system calls: kernel.Filter
	RunBytes int    // size of sandbox.Run
	ShmBytes int    // size of /dev/shm
	Files    uint64 // open files of a process
}

// Bundle is config.json of a box (OCI runtime specification 1.2): the guest as
// process 1, over the root at keeper.Root, in the network of the box.
func (b Box) Bundle() ([]byte, error) {
	type dict map[string]any
	args := []string{"mayfly-guest", "enter"}
	if b.Expires != 0 {
		args = append(args, fmt.Sprint(b.Expires))
	}
	caps := capabilities()
	tmpfs := func(path string, size int, mode string) dict {
		return dict{"destination": path, "type": "tmpfs", "source": "tmpfs", "options": []string{"nosuid", "nodev", "mode=" + mode, fmt.Sprintf("size=%d", size)}}
	}
	namespaces := []dict{{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}} // the network is the one it is started in
	return json.Marshal(dict{
		"ociVersion": "1.2.0", "hostname": b.Host,
		"root": dict{"path": keeper.Root},
		"process": dict{
			"args": args, "cwd": "/", "user": dict{"uid": 0, "gid": 0}, "noNewPrivileges": true,
			"env":          []string{keeper.FilterVariable + "=" + hex.EncodeToString(b.Filter)},
			"capabilities": dict{"bounding": caps, "effective": caps, "permitted": caps},
			"rlimits": []dict{
				{"type": "RLIMIT_CORE", "hard": 0, "soft": 0},
				{"type": "RLIMIT_NOFILE", "hard": b.Files, "soft": b.Files},
			},
		},
		"mounts": []dict{
			{"destination": "/proc", "type": "proc", "source": "proc"},
			{"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": []string{"ro", "nosuid", "nodev", "noexec"}},
			{"destination": "/dev", "type": "tmpfs", "source": "dev"},
			tmpfs("/dev/shm", b.ShmBytes, "1777"),
			tmpfs(sandbox.Run, b.RunBytes, "755"),
		},
		"linux": dict{"namespaces": namespaces},
	})
}

// NewComplaint is where runsc and the keeper say why there is no box. Its memory is
// the box's, who also may write to it.
func NewComplaint() (*os.File, error) {
	fd, err := unix.MemfdCreate("mayfly-complaint", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("complaint: %w", err)
	}
	return os.NewFile(uintptr(fd), "complaint"), nil
}

// Said is the end of what a complaint says, if it is one.
func Said(complaint *os.File) error {
	if complaint == nil {
		return nil
	}
	st, err := complaint.Stat()
	if err != nil || st.Size() == 0 {
		return nil
	}
	text, err := io.ReadAll(io.NewSectionReader(complaint, max(0, st.Size()-complaintBytes), complaintBytes))
	if err != nil {
		return nil
	}
	return fmt.Errorf("gVisor said: %q", strings.TrimSpace(string(text)))
}

// Claim says whether boxes can have a kernel of their own here. try makes one,
// and is what /proc/version says in it.
func (r *Runsc) Claim(ctx context.Context, try func() (version string, err error)) sandbox.Claim {
	claim := sandbox.Claim{Name: string(sandbox.GVisor)}
	f, day, err := r.Open(ctx)
	if err == nil {
		err = f.Close()
	}
	var says string
	if err == nil {
		says, err = try()
	}
	if err == nil && !strings.Contains(strings.ToLower(says), "gvisor") {
		err = fmt.Errorf("the kernel of the box says that it is %.100q", says)
	}
	if err != nil {
		claim.Detail = fmt.Sprintf("rules that ask for it are refused: %v", err)
		return claim
	}
	claim.Enforced = true
	claim.Detail = "a kernel of its own in user space (runsc of " + day + ", " + r.cfg.Platform + "), inside of the same namespaces, ids, limits and disk; " +
		"its connections are sockets of the box's network namespace, whose rules stand in the machine's kernel, so that kernel's TCP and UDP are in its reach; memory over the limit ends the box"
	return claim
}
