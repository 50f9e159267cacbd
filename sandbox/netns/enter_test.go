package netns_test

import (
	"errors"
	"net"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/netns"
	"github.com/mayfly-ci/mayfly/sandbox/netns/netnstest"
)

// TestEnter: the network of a socket is found and entered, and no other: what
// listens in one box is met from In there, and from nowhere else.
func TestEnter(t *testing.T) {
	t.Parallel()
	const address = "127.0.0.1:5432"
	box, other := netnstest.New(t), netnstest.New(t)
	l, err := box.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for name, n := range map[string]*netnstest.Net{"the box": box, "another": other} {
		ns, err := netns.Of(int(n.Sockets().TCP.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		var want string
		err = n.Do(func() (err error) {
			want, err = network()
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		var inside string
		var conn net.Conn
		err = netns.In(ns, func() (err error) {
			if inside, err = network(); err != nil {
				return err
			}
			conn, err = net.Dial("tcp", address)
			return err
		})
		if inside != want {
			t.Errorf("%s: In ran in the network %q, want %q", name, inside, want)
		}
		if n == box && err != nil {
			t.Errorf("%s: got %v, want what listens in it", name, err)
		}
		if n == other && !errors.Is(err, unix.ECONNREFUSED) {
			t.Errorf("%s: got %v, want ECONNREFUSED", name, err)
		}
		if conn != nil {
			conn.Close()
		}
		if err := unix.Close(ns); err != nil {
			t.Error(err)
		}
		if after, err := network(); err != nil || after == want {
			t.Errorf("%s: after In we are in %q (%v), want to be out of it", name, after, err)
		}
	}
}

// network names that of this thread.
func network() (string, error) { return os.Readlink("/proc/thread-self/ns/net") }
