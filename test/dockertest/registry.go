package dockertest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/docker/docker/api/types/image"
	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

// loopback makes the network namespace of a daemon, which lives as long as the
// file is open. It has loopback only.
func loopback() (f *os.File, err error) {
	err = kernel.OnThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		lo, err := unix.NewIfreq("lo")
		if err == nil {
			lo.SetUint16(unix.IFF_UP)
			err = unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo)
		}
		if err := errors.Join(err, unix.Close(fd)); err != nil {
			return err
		}
		f, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	return f, err
}

// Listen listens where the daemon, and nobody else, can connect to: loopback.
func (d *Daemon) Listen(address string) (l net.Listener, err error) {
	err = kernel.OnThread(func() (err error) {
		if err := unix.Setns(int(d.net.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		l, err = net.Listen("tcp", address)
		return err
	})
	return l, err
}

// Serve has a server answer at an address of Listen until the end of tb, and
// returns the address with its port.
func (d *Daemon) Serve(tb testing.TB, address string, handler http.Handler) string {
	tb.Helper()
	l, err := d.Listen(address)
	if err != nil {
		tb.Fatalf("dockertest: %v", err)
	}
	server := &http.Server{Handler: handler, ReadHeaderTimeout: time.Minute}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(l) }) // until it is closed
	tb.Cleanup(func() {
		if err := server.Close(); err != nil {
			tb.Errorf("dockertest: %v", err)
		}
		serving.Wait()
	})
	return l.Addr().String()
}

// A Registry is Debian's docker-registry. Only the daemon reaches it, at Host,
// and the test stands in front of it.
type Registry struct {
	Host string // 127.0.0.1:port

	daemon *Daemon
	behind http.Handler

	mu    sync.Mutex
	front func(w http.ResponseWriter, r *http.Request, next http.Handler)
	asked int
}

const registryYAML = `version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: %[1]s/blobs}}
http: {net: unix, addr: %[1]s/socket, relativeurls: true}
`

// StartRegistry starts an empty registry. It ends with tb.
func (d *Daemon) StartRegistry(tb testing.TB) *Registry {
	tb.Helper()
	dir := place(tb)
	config, socket := filepath.Join(dir, "config.yml"), filepath.Join(dir, "socket")
	if err := os.WriteFile(config, fmt.Appendf(nil, registryYAML, dir), 0o600); err != nil {
		tb.Fatal(err)
	}
	cmd, started, done := exec.Command("docker-registry", "serve", config), make(chan error, 1), make(chan struct{})
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	go func() { // the cleanup waits for it
		runtime.LockOSThread() // the death signal is bound to the thread
		defer runtime.UnlockOSThread()
		defer close(done)
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // it is killed
		}
	}()
	if err := <-started; err != nil {
		tb.Fatalf("dockertest: registry (Debian package docker-registry): %v", err)
	}
	tb.Cleanup(func() {
		_ = cmd.Process.Kill() // it has ended by itself, or not
		<-done
	})
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}
	ctx, cancel := context.WithTimeout(tb.Context(), startTimeout)
	defer cancel()
	if err := kernel.Poll(ctx, "the registry listens", func() (bool, error) {
		c, err := dial(ctx, "", "")
		if err != nil {
			return false, nil
		}
		return true, c.Close()
	}); err != nil {
		tb.Fatalf("dockertest: %v", err)
	}
	transport := &http.Transport{DialContext: dial}
	tb.Cleanup(transport.CloseIdleConnections)
	r := &Registry{daemon: d, behind: &httputil.ReverseProxy{
		Rewrite:   func(p *httputil.ProxyRequest) { p.Out.URL.Scheme, p.Out.URL.Host = "http", p.In.Host },
		Transport: transport,
	}}
	r.Host = d.Serve(tb, "127.0.0.1:0", r)
	return r
}

// ServeHTTP implements http.Handler.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	front := r.front
	r.asked++
	r.mu.Unlock()
	if front == nil {
		r.behind.ServeHTTP(w, req)
		return
	}
	front(w, req, r.behind)
}

// Front has f answer requests, or pass them on; nil is the registry alone.
func (r *Registry) Front(f func(w http.ResponseWriter, r *http.Request, next http.Handler)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.front = f
}

// Asked is how many requests there were.
func (r *Registry) Asked() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.asked
}

// Push gives an image of the daemon to the registry as repository:tag, and
// returns its name there and its digest. The daemon forgets that name again.
func (r *Registry) Push(ctx context.Context, ref, as string) (name, digest string, err error) {
	name = r.Host + "/" + as
	if err := r.daemon.engine.ImageTag(ctx, ref, name); err != nil {
		return "", "", fmt.Errorf("dockertest: %w", err)
	}
	out, err := r.daemon.engine.ImagePush(ctx, name, image.PushOptions{RegistryAuth: "e30="}) // {}
	if err != nil {
		return "", "", fmt.Errorf("dockertest: push %s: %w", name, err)
	}
	lines := json.NewDecoder(out)
	for {
		var line struct {
			Error, Status string
		}
		if err = lines.Decode(&line); err != nil {
			break
		}
		if line.Error != "" {
			err = errors.New(line.Error)
			break
		}
		if _, rest, ok := strings.Cut(line.Status, "digest: "); ok {
			digest, _, _ = strings.Cut(rest, " ")
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	if err = errors.Join(err, out.Close()); err != nil || digest == "" {
		return "", "", fmt.Errorf("dockertest: push %s: digest %q: %w", name, digest, err)
	}
	_, err = r.daemon.engine.ImageRemove(ctx, name, image.RemoveOptions{})
	return name, digest, err
}
