package dockertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// An Engine is a release of the Docker Engine, and where it keeps its images.
type Engine struct {
	Name string
	// servers are directories of test/servers that have its programs. Those
	// that they lack, and an engine without any, are Debian's.
	servers []string
	// settings are those of its daemon.json.
	settings string
	// layers are directories of its data whose files never change, but for
	// databases (*.db).
	layers []string
}

// Stable is Debian's engine (20.10, API 1.41), which keeps images by itself.
func Stable() Engine { return Engine{Name: "stable", settings: "{}", layers: []string{"overlay2"}} }

// Newer is the engine of test/servers (API 1.56), which keeps images in a
// containerd as new as it is. It runs Debian's runc, which knows no time
// namespaces.
func Newer() Engine {
	return Engine{
		Name: "newer", servers: []string{"dockerd", "containerd"},
		settings: `{"features": {"time-namespaces": false}}`, layers: []string{"containerd"},
	}
}

// Engines are all of them, oldest first.
func Engines() []Engine { return []Engine{Stable(), Newer()} }

// envServers begins the names of variables that say where the programs of a
// directory of test/servers are, for tests that run where the repository is out
// of sight.
const envServers = "MAYFLY_SERVER_"

// path is where the programs of the engine are looked for. They are built if
// they are not there, which takes minutes, once.
func (e Engine) path(ctx context.Context) (string, error) {
	dirs := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, name := range e.servers {
		dir, err := server(ctx, name)
		if err != nil {
			return "", err
		}
		dirs = dir + ":" + dirs
	}
	return dirs, nil
}

func server(ctx context.Context, name string) (string, error) {
	if dir := os.Getenv(envServers + name); dir != "" {
		return dir, nil
	}
	root, err := os.Getwd()
	if err != nil {
		return "", err
	}
	const script = "test/scripts/server.sh"
	for {
		if _, err := os.Stat(filepath.Join(root, script)); err == nil {
			break
		}
		if root == filepath.Dir(root) {
			return "", fmt.Errorf("%s: not inside of the repository", name)
		}
		root = filepath.Dir(root)
	}
	cmd := exec.CommandContext(ctx, filepath.Join(root, script), name)
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		said := complaint.String()
		return "", fmt.Errorf("%s: %w: %s", name, err, said[max(0, len(said)-2000):])
	}
	return strings.TrimSpace(out.String()), nil
}

// Prepare builds the engine and makes its images if they are not there, which
// takes minutes and the network, once, and lets the tests that this process
// starts find them. It is for TestMain of tests that run without either.
func (e Engine) Prepare() error {
	ctx := context.Background()
	for _, name := range e.servers {
		dir, err := server(ctx, name)
		if err == nil {
			err = os.Setenv(envServers+name, dir)
		}
		if err != nil {
			return err
		}
	}
	_, err := e.template(ctx)
	return err
}

// New starts a daemon below dir, which it creates. options are flags of dockerd.
// It ends with Close, and by itself when the calling process dies.
func (e Engine) New(ctx context.Context, dir string, options ...string) (*Daemon, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("dockertest: not root")
	}
	template, err := e.template(ctx)
	if err != nil {
		return nil, fmt.Errorf("dockertest: images: %w", err)
	}
	d, err := e.empty(ctx, dir, options...)
	if err == nil {
		err = e.copyData(ctx, template, d.data())
	}
	if err == nil {
		err = d.start(ctx)
	}
	if err != nil {
		err = fmt.Errorf("dockertest: %w", err)
		if d != nil {
			err = errors.Join(err, d.Close())
		}
		return nil, err
	}
	d.snapshots = len(d.layers())
	return d, nil
}

// Start is New for a test: the daemon and all of it go with tb, and what goes
// wrong is fatal.
func (e Engine) Start(tb testing.TB, options ...string) *Daemon {
	tb.Helper()
	d, err := e.New(context.Background(), filepath.Join(place(tb), "docker"), options...)
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

// StartRemapped is Start for a daemon that gives its containers a user namespace,
// with ids from RemappedID. It has no images.
func (e Engine) StartRemapped(tb testing.TB) *Daemon {
	tb.Helper()
	dir := place(tb)
	d, err := e.empty(tb.Context(), filepath.Join(dir, "docker"), "--userns-remap=nobody:nogroup")
	if err != nil {
		tb.Fatalf("dockertest: %v", err)
	}
	tb.Cleanup(func() {
		if err := d.Close(); err != nil {
			tb.Error(err)
		}
	})
	d.ids = filepath.Join(d.dir, "ids")
	err = errors.Join(os.WriteFile(d.ids, fmt.Appendf(nil, "nobody:%d:65536\nnogroup:%[1]d:65536\n", RemappedID), 0o644), os.Chmod(dir, 0o711))
	if err == nil {
		err = d.start(context.Background())
	}
	if err != nil {
		tb.Fatalf("dockertest: %v", err)
	}
	return d
}

// place is a directory for a daemon; a test's own is too long for a socket.
func place(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "mayfly-dockertest-")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			tb.Errorf("dockertest: %v", err)
		}
	})
	return dir
}
