// Package netnstest makes network namespaces for tests: the inside of a box
// without the rest of the box. It needs root.
package netnstest

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/netns"
)

// A Net is a network namespace and the thread that lives in it.
type Net struct {
	calls   chan func()
	sockets egress.Sockets
}

// Empty makes a namespace in which nothing is set up. It is gone when the test
// is over. Nothing that is sent in it can leave it.
func Empty(tb testing.TB) *Net {
	tb.Helper()
	n := &Net{calls: make(chan func())}
	ready := make(chan error)
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the namespace
		err := unix.Unshare(unix.CLONE_NEWNET)
		ready <- err
		if err != nil {
			return
		}
		for f := range n.calls {
			f()
		}
	}()
	if err := <-ready; err != nil {
		tb.Fatalf("unshare(CLONE_NEWNET): %v; run the tests as root", err)
	}
	tb.Cleanup(func() {
		close(n.calls)
		<-done
	})
	return n
}

// New makes the network of a box, with its sockets.
func New(tb testing.TB) *Net {
	tb.Helper()
	n := Empty(tb)
	var fds netns.FDs
	err := n.Do(func() (err error) {
		if err := netns.Setup(); err != nil {
			return err
		}
		fds, err = netns.Open()
		return err
	})
	if err != nil {
		tb.Fatalf("network of a box: %v", err)
	}
	n.sockets = egress.Sockets{
		TCP: os.NewFile(uintptr(fds.TCP), "tcp"),
		DNS: os.NewFile(uintptr(fds.DNS), "dns"),
		Log: os.NewFile(uintptr(fds.Log), "log"),
		// What tests start in the namespace are children of the test.
		Init: os.Getpid(),
	}
	tb.Cleanup(func() {
		for _, f := range []*os.File{n.sockets.TCP, n.sockets.DNS, n.sockets.Log} {
			f.Close() // closed already if a gateway took it
		}
	})
	return n
}

// Sockets are those of the box, for its gateway.
func (n *Net) Sockets() egress.Sockets { return n.sockets }

// Do runs f on the thread in the namespace. Sockets that f makes stay in the
// namespace wherever they are used; what f starts on other goroutines does not.
func (n *Net) Do(f func() error) error {
	done := make(chan error)
	n.calls <- func() { done <- f() }
	return <-done
}

// Dial connects from inside the namespace to a literal address.
func (n *Net) Dial(network, address string) (conn net.Conn, err error) {
	if host, _, err := net.SplitHostPort(address); err == nil && net.ParseIP(host) == nil {
		return nil, fmt.Errorf("dial %s: a literal address is needed, a resolver would run outside", address)
	}
	err = n.Do(func() (err error) {
		conn, err = (&net.Dialer{Timeout: time.Minute}).Dial(network, address)
		return err
	})
	return conn, err
}

// Listen listens inside the namespace.
func (n *Net) Listen(network, address string) (l net.Listener, err error) {
	err = n.Do(func() (err error) {
		l, err = net.Listen(network, address)
		return err
	})
	return l, err
}

// Run runs a command whose whole process lives in the namespace and returns
// what it printed.
func (n *Net) Run(ctx context.Context, cmd *exec.Cmd) (string, error) {
	out, err := os.CreateTemp("", "netnstest")
	if err != nil {
		return "", err
	}
	defer os.Remove(out.Name())
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if err := n.Do(cmd.Start); err != nil {
		return "", err
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	defer stop()
	err = cmd.Wait()
	b, readErr := os.ReadFile(out.Name())
	if readErr != nil {
		return "", readErr
	}
	return string(b), err
}
