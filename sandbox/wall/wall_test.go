package wall_test

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/sandbox/guest"
	"github.com/mayfly-ci/mayfly/sandbox/netns/netnstest"
	"github.com/mayfly-ci/mayfly/sandbox/wall"
)

// A box is a real guest in a network of the test's.
type box struct{ *guest.Client }

func (box) Attach(context.Context) (sandbox.Sockets, error) { return sandbox.Sockets{}, nil }

// A filtered box has a system call filter as well, which needs no guest to show.
type filtered struct{ box }

func (f filtered) Probe(ctx context.Context, attempts []sandbox.Attempt) ([]sandbox.Outcome, error) {
	outcomes, err := f.box.Probe(ctx, attempts)
	for i, a := range attempts {
		if err == nil && a.Network == "vsock" {
			outcomes[i].Err = syscall.EAFNOSUPPORT
		}
	}
	return outcomes, err
}

// start starts a guest in n, as process 1 of namespaces of its own, without the
// right to make raw sockets.
func start(t *testing.T, n *netnstest.Net) sandbox.Sandbox {
	t.Helper()
	return filtered{startAs(t, n, "setpriv --bounding-set=-net_raw --inh-caps=-net_raw")}
}

func startAs(t *testing.T, n *netnstest.Net, as string) box {
	t.Helper()
	program, err := guest.Binary()
	if err != nil {
		t.Fatal(err)
	}
	path := t.TempDir() + "/mayfly-guest"
	if err := os.WriteFile(path, program, 0o755); err != nil {
		t.Fatal(err)
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	near, far := os.NewFile(uintptr(fds[0]), "agent"), os.NewFile(uintptr(fds[1]), "guest")
	cmd := exec.Command("sh", "-c", `mount --make-rprivate / && mount -t proc proc /proc && exec `+as+` "$0" serve`, path)
	cmd.ExtraFiles = []*os.File{far}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS}
	if err := n.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	_ = far.Close() // the guest has it
	conn, err := net.FileConn(near)
	if err != nil {
		t.Fatal(err)
	}
	_ = near.Close() // conn is a copy
	client, err := guest.New(t.Context(), conn, guest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = client.Close() // that ends the guest
		_ = cmd.Wait()     // by its status or ours
	})
	return box{client}
}

// lines are the ledger of a test, of which the look takes its own.
type lines struct {
	look *wall.Look
	mu   sync.Mutex
	rest []egress.Line
}

func (l *lines) take(line egress.Line) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.look.Line(line) {
		l.rest = append(l.rest, line)
	}
	return nil
}

func serve(t *testing.T, n *netnstest.Net, ledger egress.Ledger) {
	t.Helper()
	g, err := gateway.New(gateway.Config{})
	if err == nil {
		err = g.Open(t.Context(), "job", egress.Opening{Ledger: ledger})
	}
	if err == nil {
		err = g.Attach(t.Context(), "job", n.Sockets())
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(context.Background(), "job"); err != nil {
			t.Error(err)
		}
	})
}

// With its wall and its gateway a box reaches nothing, and the look leaves no
// line in the ledger but what somebody else did.
func TestWallHolds(t *testing.T) {
	t.Parallel()
	n := netnstest.New(t)
	canary, err := wall.Listen(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer canary.Close()
	b := start(t, n)
	var l lines
	for range 3 {
		look := wall.NewLook()
		l.mu.Lock()
		first := l.look == nil
		l.look = look
		l.mu.Unlock()
		if first {
			serve(t, n, l.take)
		}
		seen, err := look.Run(t.Context(), b, wall.Options{Canary: canary, Served: true, Logged: true})
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{
			"tcp 169.254.169.254:80: connection refused", "udp 203.0.113.113:443: connection refused",
			"udp 192.0.2.53:53: no such name", "tcp " + canary.Address().String() + ": connection refused",
		} {
			if !strings.Contains(seen, want) {
				t.Errorf("seen: got %q, want %q in it", seen, want)
			}
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.rest) != 0 {
		t.Errorf("ledger: got %+v, want nothing but the look's own", l.rest)
	}
}

// And with each part of it missing, the look says so. The world that is then
// reached lies in the same namespace.
func TestWallThatDoesNotHold(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		listen, on string
		want       string
	}{
		"metadata": {"tcp", "169.254.169.254:80", "tcp 169.254.169.254:80: went through"},
		"tcp":      {"tcp", "203.0.113.113:443", "tcp 203.0.113.113:443: went through"},
		"ipv6":     {"tcp", "[::]:443", "tcp [2001:db8::71]:443: went through"},
		"udp":      {"udp", "203.0.113.113:443", "udp 203.0.113.113:443: went through"},
		"sockets":  {"", "", "raw: went through; packet: went through; vsock: went through"},
		"canary":   {"canary", "", "of the host"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := netnstest.Empty(t)
			open(t, n)
			var canary *wall.Canary
			var err error
			switch c.listen {
			case "tcp":
				var l net.Listener
				if l, err = n.Listen("tcp", c.on); err == nil {
					defer l.Close()
				}
			case "udp":
				err = n.Do(func() error { return echo(t, c.on) })
			case "canary":
				err = n.Do(func() error { canary, err = wall.Listen(t.Context()); return err })
				defer canary.Close()
			}
			if err != nil {
				t.Fatal(err)
			}
			b := start(t, n)
			if name == "sockets" {
				b = startAs(t, n, "")
			}
			_, err = wall.NewLook().Run(t.Context(), b, wall.Options{Canary: canary})
			if !errors.Is(err, wall.ErrBreached) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

// open makes every address local, as in a box, and puts no wall up.
func open(t *testing.T, n *netnstest.Net) {
	t.Helper()
	for _, args := range [][]string{
		{"link", "set", "lo", "up"},
		{"addr", "add", "192.0.2.1/32", "dev", "lo"},
		{"route", "add", "local", "default", "dev", "lo"},
		{"-6", "route", "add", "local", "default", "dev", "lo"},
	} {
		cmd := exec.Command("ip", args...)
		if err := n.Do(cmd.Run); err != nil {
			t.Fatalf("ip %v: %v", args, err)
		}
	}
}

// echo answers datagrams until the test is over.
func echo(t *testing.T, on string) error {
	conn, err := net.ListenPacket("udp", on)
	if err != nil {
		return err
	}
	var done sync.WaitGroup
	t.Cleanup(func() { conn.Close(); done.Wait() })
	done.Go(func() {
		b := make([]byte, 512)
		for {
			size, from, err := conn.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = conn.WriteTo(b[:size], from) // nobody may be there any more
		}
	})
	return nil
}

// A ledger that stays silent about what was refused is no ledger.
func TestLedgerWithoutLines(t *testing.T) {
	t.Parallel()
	n := netnstest.New(t)
	serve(t, n, func(egress.Line) error { return nil })
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	_, err := wall.NewLook().Run(ctx, start(t, n), wall.Options{Served: true, Logged: true})
	if !errors.Is(err, wall.ErrBreached) || !strings.Contains(err.Error(), "tcp 169.254.169.254 port 80") {
		t.Errorf("got %v, want what has no line", err)
	}
}

// What no guest runs in cannot be looked at, and is not used.
func TestBoxThatTriesNothing(t *testing.T) {
	t.Parallel()
	if _, err := wall.NewLook().Run(t.Context(), nil, wall.Options{}); !errors.Is(err, sandbox.ErrUnsupported) {
		t.Errorf("got %v, want ErrUnsupported", err)
	}
}
