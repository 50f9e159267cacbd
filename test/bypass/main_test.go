// Package bypass plays the known ways around an egress filter, B1 to B32 of the
// catalogue in docs/bypass.md, against a real box behind a real gateway. Each
// attack is made twice by the same program: in a box, where it must fail and be
// written down, and then beside it, without wall and gateway, where it must
// reach the canary; what the box had sent would have arrived before that.
//
// The tests run in a network namespace of their own. Its addresses belong to its
// loopback and it has no route, so nothing that they send can leave the machine.
package bypass

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/native"
)

const (
	// insideEnv says that the tests run in their network namespace already.
	insideEnv = "MAYFLY_BYPASS_INSIDE"
	// clientEnv makes a client of this program: see client.
	clientEnv = "MAYFLY_BYPASS_CLIENT"
	// patience bounds every wait of a test.
	patience = 2 * time.Minute
)

func TestMain(m *testing.M) {
	var err error
	code := 1
	switch {
	case os.Getenv(clientEnv) != "":
		if err = client(os.Getenv(clientEnv)); err == nil {
			code = 0
		}
	case os.Getenv(insideEnv) == "":
		err = goInside()
	default:
		if err = network(); err == nil {
			code = m.Run()
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(code)
}

// goInside starts the tests anew in a network namespace.
func goInside() error {
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("unshare: %w; run the tests as root", err)
	}
	return unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), insideEnv+"=1"))
}

// What the world has. Nobody of the Internet is meant by the public addresses.
const (
	goodAddress  = "93.184.216.34" // the hosts that the job may reach, and others with them
	evilAddress  = "93.184.216.66"
	evilAddress6 = "2606:2800:220::66"
)

// network makes the world.
func network() error {
	for _, args := range []string{
		"link set lo up", "address add " + goodAddress + "/32 dev lo", "address add " + evilAddress + "/32 dev lo",
		"-6 address add " + evilAddress6 + "/128 dev lo nodad", "address add " + egress.Resolver.String() + "/32 dev lo",
		"address add 10.77.0.1/32 dev lo", "address add 169.254.169.254/32 dev lo", "address add 169.254.170.2/32 dev lo",
		"address add 168.63.129.16/32 dev lo", "address add 100.100.100.200/32 dev lo", "-6 address add fd00:ec2::254/128 dev lo nodad",
	} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s (package iproute2): %w: %s", args, err, out)
		}
	}
	return os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 2147483647"), 0)
}

// A world is one box with its gateway, and the canary outside.
type world struct {
	canary *canary
	ledger *ledger
	gate   *gateway.Gateway
	box    sandbox.Sandbox
	conf   string // a resolv.conf for the attacks beside the box
	path   string // of this program, there
}

func bounded(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	t.Cleanup(cancel)
	return ctx
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newWorld makes a box that may reach good.example.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{canary: listen(t), ledger: new(ledger), path: "/proc/self/exe", conf: filepath.Join(t.TempDir(), "resolv.conf")}
	must(t, os.WriteFile(w.conf, []byte("nameserver "+egress.Resolver.String()+"\n"), 0o644))
	var err error
	w.path, err = os.Executable()
	must(t, err)
	w.gate, err = gateway.New(gateway.Config{Resolver: w.canary, Hello: 5 * time.Second})
	must(t, err)
	w.box = newBox(t, w.path)
	ctx := bounded(t)
	must(t, w.gate.Open(ctx, "job", egress.Opening{Rules: egress.Rules{Allow: rules(w.canary.ca)}, Ledger: w.ledger.write}))
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
		defer cancel()
		if err := w.gate.Close(ctx, "job"); err != nil {
			t.Error(err)
		}
	})
	s, err := w.box.Attach(ctx)
	must(t, err)
	must(t, w.gate.Attach(ctx, "job", egress.Sockets(s)))
	return w
}

// placeholder is what the job has of the credential for tenant.example.
const placeholder = "placeholder-0123456789abcdefghijkl"

func rules(ca string) []egress.Rule {
	all := []egress.Rule{
		{Name: "good.example", Port: 80, Protocol: egress.HTTP},
		{Name: "good.example", Port: 443, Protocol: egress.HTTPS, CA: ca},
		{Name: "good.example", Port: 8443, Protocol: egress.TLS},
		{Name: "repo.example", Port: 443, Protocol: egress.HTTPS, CA: ca, Requests: []egress.Request{
			{Methods: []string{"GET"}, Path: "/acme/app/**"},
			{Methods: []string{"POST"}, Path: "/acme/upload", Sent: 1024},
		}},
		{Name: "tenant.example", Port: 443, Protocol: egress.HTTPS, CA: ca, Inject: &egress.Injection{
			Lease: "lease", As: egress.Bearer, Value: creds.NewSecret("the-tokens-of-the-lease-0123456789"), Placeholder: placeholder,
		}},
		{Name: "rebind.example", Port: 80, Protocol: egress.HTTP},
		{Name: "meta.example", Port: 80, Protocol: egress.HTTP, Resolve: []netip.Prefix{netip.MustParsePrefix("169.254.0.0/16")}},
	}
	for i := range all {
		all[i].ID = "policy:" + strconv.Itoa(i+1)
		if name := all[i].Name; name == "good.example" || name == "repo.example" || name == "tenant.example" { // an address of this machine, here
			all[i].Resolve = []netip.Prefix{netip.MustParsePrefix(goodAddress + "/32")}
		}
	}
	return all
}

// newBox makes a native box with this program in it.
func newBox(t *testing.T, self string) sandbox.Sandbox {
	t.Helper()
	program, err := guest.Binary()
	must(t, err)
	parent := "mayfly-bypass-" + strconv.Itoa(os.Getpid())
	r, err := native.New(native.Config{
		StateDir: filepath.Join(t.TempDir(), "state"), Owner: "bypass", Guest: program, CgroupParent: parent,
		Limits: sandbox.Limits{Memory: 512 << 20, Pids: 256, MilliCPU: 2000, Disk: 1 << 30, Inodes: 50_000},
	})
	must(t, err)
	name := "bypass-" + strings.ToLower(rand.Text())
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
		defer cancel()
		if err := r.Destroy(ctx, name); err != nil {
			t.Errorf("destroy: %v", err)
		}
		for _, pattern := range []string{"/sys/fs/cgroup/*/" + parent, "/sys/fs/cgroup/" + parent} {
			found, _ := filepath.Glob(pattern) // the patterns are well formed
			for _, p := range found {
				_ = unix.Rmdir(p) // files of a group cannot be removed and need not be
			}
		}
	})
	b, err := r.Create(bounded(t), name, sandbox.Spec{Labels: sandbox.Labels{Owner: "bypass"}, Expires: time.Now().Add(10 * time.Minute)})
	must(t, err)
	content, err := os.ReadFile(self)
	must(t, err)
	var archive bytes.Buffer
	tw := tar.NewWriter(&archive)
	err = tw.WriteHeader(&tar.Header{Name: "client", Mode: 0o755, Size: int64(len(content))})
	_, writeErr := tw.Write(content)
	must(t, errors.Join(err, writeErr, tw.Close()))
	must(t, b.Put(bounded(t), "/run/mayfly", &archive))
	return b
}

// A result is what became of a script.
type result struct {
	out  string
	code int
}

// path is where scripts find programs, in the box and beside it.
const path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"

// inside runs a script in the box, with token as its first argument.
func (w *world) inside(t *testing.T, script, token string) result {
	t.Helper()
	var out bytes.Buffer
	print := func(_ time.Time, p []byte) error { out.Write(p); return nil }
	exit, err := w.box.Run(bounded(t), sandbox.Process{
		Args: []string{"/bin/sh", "-c", script, "sh", token}, Stdout: print, Stderr: print,
		Env: []string{path, "HOME=/root", "CLIENT=/run/mayfly/client"},
	})
	if err != nil {
		t.Fatalf("run: %v: %s", err, &out)
	}
	return result{out.String(), exit.Code}
}

// beside runs it with the same programs and resolver, and no wall or gateway.
func (w *world) beside(t *testing.T, script, token string) result {
	t.Helper()
	cmd := exec.CommandContext(bounded(t), "unshare", "--mount", "--propagation", "private", "/bin/sh", "-c",
		`mount --bind "$2" /etc/resolv.conf && exec /bin/sh -c "$3" sh "$1"`, "sh", token, w.conf, script)
	cmd.Env = []string{path, "HOME=" + t.TempDir(), "CLIENT=" + w.path}
	cmd.WaitDelay = time.Second // what the script left behind keeps no pipe open
	out, err := cmd.CombinedOutput()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		t.Fatalf("run: %v: %s", err, out)
	}
	return result{string(out), cmd.ProcessState.ExitCode()}
}
