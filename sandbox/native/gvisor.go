package native

import (
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
	"github.com/mayfly-ci/mayfly/sandbox/native/boxinit"
)

// A GVisor says with what boxes get a kernel of their own (docs/adr/0016).
type GVisor struct {
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
	// lastWords is how long a keeper may take to say why it ends: it has to be
	// scheduled, and to write.
	lastWords = time.Second
	// complaintBytes is how much of what runsc said is shown.
	complaintBytes = 2 << 10
)

// Validate says what is wrong with the words of it. It looks at no file.
func (g GVisor) Validate() error {
	switch {
	case g.Runsc != "" && (!filepath.IsAbs(g.Runsc) || filepath.Clean(g.Runsc) != g.Runsc):
		return fmt.Errorf("runsc %q is not a clean absolute path", g.Runsc)
	case g.Platform != "" && g.Platform != systrap && g.Platform != "kvm":
		return fmt.Errorf("platform %q: this agent knows systrap and kvm", g.Platform)
	}
	return nil
}

// openRunsc returns the program, looked at. What is executed later is this file,
// whatever its name stands for by then.
func (r *Runtime) openRunsc(ctx context.Context) (f *os.File, day string, err error) {
	f, day, err = r.cfg.GVisor.open(ctx, r.cfg.Unprivileged, &r.runsc)
	if err != nil {
		return nil, "", fmt.Errorf("isolation %q: %w: %w", sandbox.GVisor, err, sandbox.ErrUnsupported)
	}
	return f, day, nil
}

// A runscVersion is what a program said of itself, which takes longer than to look
// whether it is still the same one.
type runscVersion struct {
	mu  sync.Mutex
	of  [4]int64 // device, inode, size, time of change
	day string
}

func (v *runscVersion) ask(ctx context.Context, f *os.File, st unix.Stat_t) (string, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	of := [4]int64{int64(st.Dev), int64(st.Ino), st.Size, st.Ctim.Nano()}
	if v.day != "" && v.of == of {
		return v.day, nil
	}
	day, err := askVersion(ctx, f)
	v.of, v.day = of, day
	return day, err
}

func (g *GVisor) open(ctx context.Context, unprivileged bool, v *runscVersion) (f *os.File, day string, err error) {
	switch {
	case g.Runsc == "":
		return nil, "", errors.New(`no runsc is configured: install gVisor and say "gvisor: {runsc: /usr/local/bin/runsc}" in the section of this runtime`)
	case unprivileged:
		return nil, "", errors.New("it needs a range of user ids: run the agent as root")
	}
	if f, err = os.Open(g.Runsc); err != nil {
		return nil, "", fmt.Errorf("install gVisor's runsc: %w", err)
	}
	var st unix.Stat_t
	err = unix.Fstat(int(f.Fd()), &st)
	switch {
	case err != nil:
	case st.Mode&unix.S_IFMT != unix.S_IFREG || st.Mode&0o005 != 0o005:
		err = fmt.Errorf("%s is not a program that everybody may read and run, as root of a box has to: chmod 755", g.Runsc)
	case st.Mode&0o022 != 0 || st.Uid != 0:
		err = fmt.Errorf("%s can be changed by others than root: chown root, chmod 755", g.Runsc)
	default:
		day, err = v.ask(ctx, f, st)
	}
	if err != nil {
		return nil, "", errors.Join(err, f.Close())
	}
	return f, day, nil
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

// bundle is config.json of the box (OCI runtime specification 1.2): the guest as
// process 1, over the root that boxinit made, in the network of the box.
func bundle(expires uint64, filter []byte) ([]byte, error) {
	type dict map[string]any
	args := []string{"mayfly-guest", "enter"}
	if expires != 0 {
		args = append(args, fmt.Sprint(expires))
	}
	caps := capabilities()
	tmpfs := func(path string, size int, mode string) dict {
		return dict{"destination": path, "type": "tmpfs", "source": "tmpfs", "options": []string{"nosuid", "nodev", "mode=" + mode, fmt.Sprintf("size=%d", size)}}
	}
	namespaces := []dict{{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}} // the network is the one it is started in
	return json.Marshal(dict{
		"ociVersion": "1.2.0", "hostname": boxinit.Host,
		"root": dict{"path": "/rootfs"},
		"process": dict{
			"args": args, "cwd": "/", "user": dict{"uid": 0, "gid": 0}, "noNewPrivileges": true,
			"env":          []string{boxinit.FilterVariable + "=" + hex.EncodeToString(filter)},
			"capabilities": dict{"bounding": caps, "effective": caps, "permitted": caps},
			"rlimits": []dict{
				{"type": "RLIMIT_CORE", "hard": 0, "soft": 0},
				{"type": "RLIMIT_NOFILE", "hard": maxFiles, "soft": maxFiles},
			},
		},
		"mounts": []dict{
			{"destination": "/proc", "type": "proc", "source": "proc"},
			{"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": []string{"ro", "nosuid", "nodev", "noexec"}},
			{"destination": "/dev", "type": "tmpfs", "source": "dev"},
			tmpfs("/dev/shm", shmBytes, "1777"),
			tmpfs(sandbox.Run, runBytes, "755"),
		},
		"linux": dict{"namespaces": namespaces},
	})
}

// newBox is a box of which nothing is made, with the program that its wall needs
// until it is made. Who calls it calls made.
func (r *Runtime) newBox(ctx context.Context, name string, wall sandbox.Isolation) (b *box, err error) {
	b = &box{name: name, groups: r.groups, dead: make(chan struct{})}
	switch wall {
	case sandbox.Kernel:
	case sandbox.GVisor:
		b.runsc, _, err = r.openRunsc(ctx)
	default:
		err = fmt.Errorf("isolation %q: this runtime has %q: %w", wall, sandbox.GVisor, sandbox.ErrUnsupported)
	}
	return b, err
}

// made lets go of the program.
func (b *box) made() {
	if b.runsc != nil {
		_ = b.runsc.Close() // only read from
		b.runsc = nil
	}
}

// A complaint is where runsc and the keeper say why there is no box. Its memory
// is the box's, who also may write to it.
func newComplaint() (*os.File, error) {
	fd, err := unix.MemfdCreate("mayfly-complaint", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("complaint: %w", err)
	}
	return os.NewFile(uintptr(fd), "complaint"), nil
}

// complained is the end of what was said. A box that is about to end gets the
// time to say why.
func (b *box) complained() error {
	if b.complaint == nil || b.process == nil {
		return nil
	}
	select {
	case <-b.dead:
	case <-time.After(lastWords):
	}
	st, err := b.complaint.Stat()
	if err != nil || st.Size() == 0 {
		return nil
	}
	text, err := io.ReadAll(io.NewSectionReader(b.complaint, max(0, st.Size()-complaintBytes), complaintBytes))
	if err != nil {
		return nil
	}
	return fmt.Errorf("gVisor said: %q", strings.TrimSpace(string(text)))
}

// checkGVisor makes a box with a kernel of its own and asks it whose it is.
func (r *Runtime) checkGVisor(ctx context.Context) sandbox.Claim {
	claim := sandbox.Claim{Name: string(sandbox.GVisor)}
	f, day, err := r.openRunsc(ctx)
	if err == nil {
		err = f.Close()
	}
	var says string
	if err == nil {
		says, err = r.try(ctx, sandbox.GVisor, "/bin/cat", "/proc/version")
	}
	if err == nil && !strings.Contains(strings.ToLower(says), "gvisor") {
		err = fmt.Errorf("the kernel of the box says that it is %.100q", says)
	}
	if err != nil {
		claim.Detail = fmt.Sprintf("rules that ask for it are refused: %v", err)
		return claim
	}
	claim.Enforced = true
	claim.Detail = "a kernel of its own in user space (runsc of " + day + ", " + r.cfg.GVisor.Platform + "), inside of the same namespaces, ids, limits and disk; " +
		"its connections are sockets of the box's network namespace, whose rules stand in the machine's kernel, so that kernel's TCP and UDP are in its reach; memory over the limit ends the box"
	return claim
}
