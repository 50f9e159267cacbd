// Package containerdtest starts a real containerd for tests: private to the test,
// with its own data and socket, and with the images of dockertest in the
// namespace Namespace. It can be killed and started again. There is the one of
// Debian and a newer one, which test/servers/containerd builds.
//
// A data directory that has the images is kept in the user's cache directory
// (template.go), from which those of tests are copied.
package containerdtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"

	"github.com/mayfly-ci/mayfly/test/dockertest"
)

// Bounds. A start takes a fraction of a second on an idle machine; the rest is
// room.
const (
	startTimeout = 2 * time.Minute
	stopTimeout  = time.Minute
	pollInterval = 10 * time.Millisecond
)

// Images that every daemon has: see dockertest.
const (
	Debian  = dockertest.Debian
	Busybox = dockertest.Busybox
)

// Namespace is that of containerd where the images are.
const Namespace = "mayfly"

// A Version says which containerd is started.
type Version string

// Versions.
const (
	Packaged Version = "packaged" // Debian's, in $PATH
	Newer    Version = "newer"    // of test/servers/containerd
)

// Versions are all of them.
func Versions() []Version { return []Version{Packaged, Newer} }

// A Daemon is one containerd. Its methods may not be called at the same time.
type Daemon struct {
	dir    string // holds data, state, socket, log
	bin    string // directory of the programs; "" is that of Debian
	client *client.Client

	cmd  *exec.Cmd
	done chan struct{} // closed when the daemon is gone
}

// New starts a daemon below dir, which it creates. It ends with Close, and by
// itself when the calling process dies.
func New(ctx context.Context, dir string, v Version) (*Daemon, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("containerdtest: not root")
	}
	template, err := template(ctx)
	if err != nil {
		return nil, fmt.Errorf("containerdtest: images: %w", err)
	}
	d, err := empty(ctx, dir, v)
	if err == nil {
		err = copyData(ctx, template, d.data())
	}
	if err == nil {
		err = d.start(ctx)
	}
	if err != nil {
		err = fmt.Errorf("containerdtest: %w", err)
		if d != nil {
			err = errors.Join(err, d.Close())
		}
		return nil, err
	}
	return d, nil
}

// Start is New for a test: the daemon and all of it go with tb, and what goes
// wrong is fatal.
func Start(tb testing.TB, v Version) *Daemon {
	tb.Helper()
	dir, err := os.MkdirTemp("", "mayfly-containerdtest-")
	if err == nil {
		err = os.Chmod(dir, 0o711) // root of a user namespace goes through it
	}
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			tb.Errorf("containerdtest: %v", err)
		}
	})
	d, err := New(context.Background(), filepath.Join(dir, "containerd"), v)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := d.Close(); err != nil {
			tb.Error(err)
		}
	})
	return d
}

// empty prepares a daemon without images.
func empty(ctx context.Context, dir string, v Version) (*Daemon, error) {
	d := &Daemon{dir: dir}
	var err error
	if v == Newer {
		if d.bin, err = built(ctx); err != nil {
			return nil, err
		}
	}
	if err := os.MkdirAll(d.dir, 0o711); err != nil {
		return nil, err
	}
	// What a box does not need, and what asks for more of the machine than a test
	// may take.
	const text = `version = 2
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime", "io.containerd.nri.v1.nri",
	"io.containerd.internal.v1.restart", "io.containerd.monitor.v1.cgroups", "io.containerd.podsandbox.controller.v1.podsandbox"]
[plugins."io.containerd.internal.v1.opt"]
path = %q
`
	if err := os.WriteFile(d.file("config.toml"), fmt.Appendf(nil, text, d.file("opt")), 0o600); err != nil {
		return nil, err
	}
	d.client, err = client.New(d.Address(), client.WithDefaultNamespace(Namespace), client.WithTimeout(time.Second))
	return d, err
}

// built is the directory of the newer programs.
func built(ctx context.Context) (string, error) {
	root, err := os.Getwd()
	for err == nil {
		if _, statErr := os.Stat(filepath.Join(root, "test/scripts/server.sh")); statErr == nil {
			break
		}
		if root == filepath.Dir(root) {
			err = errors.New("not inside of the repository")
		}
		root = filepath.Dir(root)
	}
	if err != nil {
		return "", err
	}
	cmd := exec.CommandContext(ctx, filepath.Join(root, "test/scripts/server.sh"), "containerd")
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, complaint.String())
	}
	return strings.TrimSpace(string(out)), nil
}

// Address is the path of the socket, which stays the same over a Restart.
func (d *Daemon) Address() string { return d.file("socket") }

// Client is one of the daemon, which owns it, in Namespace.
func (d *Daemon) Client() *client.Client { return d.client }

// Dir holds all that the daemon has on disk.
func (d *Daemon) Dir() string { return d.dir }

func (d *Daemon) data() string { return d.file("data") }

func (d *Daemon) file(name string) string { return filepath.Join(d.dir, name) }

// Kill kills the daemon. Its containers live on.
func (d *Daemon) Kill(ctx context.Context) error { return d.end(ctx, syscall.SIGKILL) }

// Stop ends the daemon in order. Its containers live on.
func (d *Daemon) Stop(ctx context.Context) error { return d.end(ctx, syscall.SIGTERM) }

// Restart starts the daemon again after Kill or Stop.
func (d *Daemon) Restart(ctx context.Context) error { return d.start(ctx) }

func (d *Daemon) end(ctx context.Context, how syscall.Signal) error {
	if d.cmd == nil {
		return nil
	}
	if err := d.cmd.Process.Signal(how); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-d.done:
		d.cmd = nil
		return nil
	case <-ctx.Done():
		return fmt.Errorf("containerd still runs: %w", context.Cause(ctx))
	}
}

func (d *Daemon) command(log *os.File) *exec.Cmd {
	path, program := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "/usr/bin/containerd"
	if d.bin != "" {
		path, program = d.bin+":"+path, filepath.Join(d.bin, "containerd")
	}
	cmd := exec.Command(program, "--config", d.file("config.toml"), "--root", d.data(), "--state", d.file("state"), "--address", d.Address())
	cmd.Dir, cmd.Stdout, cmd.Stderr = d.dir, log, log
	cmd.Env = []string{"PATH=" + path, "HOME=" + d.dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	return cmd
}

func (d *Daemon) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	log, err := os.OpenFile(d.file("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	cmd, started, done := d.command(log), make(chan error, 1), make(chan struct{})
	go func() { // end waits for it
		// The death signal is bound to the thread that starts the child, so
		// that this one is kept until the child is gone.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(done)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended is in its log
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("containerd (Debian package containerd): %w", err)
	}
	d.cmd, d.done = cmd, done
	return d.ready(ctx)
}

// ready waits until the daemon answers.
func (d *Daemon) ready(ctx context.Context) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		_, err := d.client.Version(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-d.done:
			log, logErr := os.ReadFile(d.file("log"))
			return errors.Join(fmt.Errorf("containerd ended while it started: %s", log[max(0, len(log)-2000):]), logErr)
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("containerd does not answer: %w", context.Cause(ctx)), err)
		case <-tick.C:
		}
	}
}
