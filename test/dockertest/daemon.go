// Package dockertest starts a real Docker daemon for tests: private to the test,
// with its own data, socket, control groups and network namespace, with images
// made of Debian's packages and of no registry. It can be killed and started
// again.
//
// Making the images takes minutes and copying a data directory that has them
// does not, so that one is kept in the user's cache directory (template.go).
package dockertest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/client"
)

// Bounds. A start takes one second on an idle machine; the rest is room.
const (
	startTimeout = 2 * time.Minute
	stopTimeout  = time.Minute
	pollInterval = 10 * time.Millisecond
)

// Images that every daemon has. Debian has bash, git, curl, gcc, make and
// python3; Busybox has a shell that is no bash, and little else.
const (
	Debian  = "mayfly-test/debian:1"
	Busybox = "mayfly-test/busybox:1"
)

// A Daemon is one dockerd. Its methods may not be called at the same time.
type Daemon struct {
	dir     string // holds data, exec, socket, log
	path    string // where programs are looked for
	parent  string // of the containers' control groups
	options []string
	ids     string   // file that is /etc/subuid and /etc/subgid for the daemon, if any
	net     *os.File // network namespace
	engine  *client.Client

	snapshots int // layers of the images that it was given

	cmd  *exec.Cmd
	done chan struct{} // closed when the daemon is gone
}

// New is that of the stable engine.
func New(ctx context.Context, dir string, options ...string) (*Daemon, error) {
	return Stable().New(ctx, dir, options...)
}

// Start is that of the stable engine.
func Start(tb testing.TB, options ...string) *Daemon {
	tb.Helper()
	return Stable().Start(tb, options...)
}

// empty is a daemon without images that has not been started.
func (e Engine) empty(ctx context.Context, dir string, options ...string) (*Daemon, error) {
	path, err := e.path(ctx)
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(dir, 0o711); err != nil {
		return nil, err
	}
	// Not the machine's own, whatever that says.
	if err := os.WriteFile(filepath.Join(dir, "daemon.json"), []byte(e.settings), 0o600); err != nil {
		return nil, err
	}
	d := &Daemon{dir: dir, path: path, parent: "mayfly-dockertest-" + strings.ToLower(rand.Text()[:12]), options: options}
	if d.net, err = loopback(); err != nil {
		return nil, fmt.Errorf("network namespace: %w", err)
	}
	if d.engine, err = client.NewClientWithOpts(client.WithHost(d.Host()), client.WithAPIVersionNegotiation()); err != nil {
		return nil, errors.Join(err, d.net.Close())
	}
	return d, nil
}

// RemappedID is what root of a container is outside, of StartRemapped.
const RemappedID = 1 << 29

// Host is the address of the daemon, which stays the same over a Restart.
func (d *Daemon) Host() string { return "unix://" + filepath.Join(d.dir, "socket") }

// Engine is a client of the daemon, which owns it.
func (d *Daemon) Engine() *client.Client { return d.engine }

// Dir holds all that the daemon has on disk.
func (d *Daemon) Dir() string { return d.dir }

func (d *Daemon) data() string { return filepath.Join(d.dir, "data") }

// Import makes an image of a tar archive of a root directory. Changes are lines of
// a Dockerfile that say what it is for.
func (d *Daemon) Import(ctx context.Context, archive io.Reader, ref string, changes ...string) error {
	out, err := d.engine.ImageImport(ctx, image.ImportSource{Source: archive, SourceName: "-"}, ref, image.ImportOptions{Changes: changes})
	if err != nil {
		return fmt.Errorf("import %s: %w", ref, err)
	}
	_, err = io.Copy(io.Discard, out)
	d.snapshots = len(d.layers())
	return errors.Join(err, out.Close())
}

// CopyImage takes an image over from another daemon.
func (d *Daemon) CopyImage(ctx context.Context, from *Daemon, ref string) error {
	in, err := from.engine.ImageSave(ctx, []string{ref})
	if err != nil {
		return fmt.Errorf("save %s: %w", ref, err)
	}
	out, err := d.engine.ImageLoad(ctx, in)
	if err != nil {
		return errors.Join(fmt.Errorf("load %s: %w", ref, err), in.Close())
	}
	_, err = io.Copy(io.Discard, out.Body)
	d.snapshots = len(d.layers())
	return errors.Join(err, out.Body.Close(), in.Close())
}

// Kill kills the daemon. Its containers live on until it is started again, and
// if it then has the option --live-restore, further.
func (d *Daemon) Kill(ctx context.Context) error { return d.end(ctx, syscall.SIGKILL) }

// Stop ends the daemon in order.
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
		return fmt.Errorf("dockerd still runs: %w", context.Cause(ctx))
	}
}

// command runs the daemon in a network namespace of its own: in that of another
// daemon it would fight over docker0.
func (d *Daemon) command(log *os.File) *exec.Cmd {
	args := append([]string{
		"--host", d.Host(), "--data-root", d.data(), "--exec-root", filepath.Join(d.dir, "exec"),
		"--pidfile", filepath.Join(d.dir, "pid"), "--cgroup-parent", "/" + d.parent, "--config-file", filepath.Join(d.dir, "daemon.json"),
		"--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-masq=false",
	}, d.options...)
	args = append([]string{"nsenter", "--net=/proc/self/fd/3", "dockerd"}, args...)
	if d.ids != "" {
		const script = `mount --bind "$1" /etc/subuid; mount --bind "$1" /etc/subgid; shift; exec "$@"`
		args = append([]string{"unshare", "--mount", "--propagation=private", "sh", "-ec", script, "sh", d.ids}, args...)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.ExtraFiles = []*os.File{d.net}
	cmd.Dir, cmd.Stdout, cmd.Stderr = d.dir, log, log
	cmd.Env = []string{"PATH=" + d.path, "HOME=" + d.dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	return cmd
}

func (d *Daemon) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	log, err := os.OpenFile(d.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	// After a kill both wait for the dead, as long as process 1 has not buried them.
	for _, pid := range []string{"pid", "exec/containerd/containerd.pid"} {
		if err := os.Remove(filepath.Join(d.dir, pid)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
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
		return fmt.Errorf("dockerd (Debian package docker.io, or test/servers/dockerd): %w", err)
	}
	d.cmd, d.done = cmd, done
	return d.ready(ctx)
}

func (d *Daemon) logFile() string { return filepath.Join(d.dir, "log") }

// ready waits until the daemon answers.
func (d *Daemon) ready(ctx context.Context) error {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		_, err := d.engine.Ping(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-d.done:
			log, logErr := os.ReadFile(d.logFile())
			return errors.Join(fmt.Errorf("dockerd ended while it started: %s", log[max(0, len(log)-2000):]), logErr)
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("dockerd does not answer: %w", context.Cause(ctx)), err)
		case <-tick.C:
		}
	}
}
