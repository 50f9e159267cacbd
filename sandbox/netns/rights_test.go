package netns_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/netns"
	"github.com/mayfly-ci/mayfly/sandbox/netns/netnstest"
)

// TestSelf: the address written out for the guest is that of the contract.
func TestSelf(t *testing.T) {
	t.Parallel()
	if got := netip.AddrFrom4(netns.Self()); got != egress.Self {
		t.Errorf("self: got %v, want %v", got, egress.Self)
	}
}

// TestTwice: Setup may be called again, and the rules stand once.
func TestTwice(t *testing.T) {
	t.Parallel()
	n := netnstest.Empty(t)
	for range 2 {
		if err := n.Do(netns.Setup); err != nil {
			t.Fatal(err)
		}
	}
	if err := answers(t, n, metadata); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("connect %s after two Setups: got %v, want ECONNREFUSED", metadata, err)
	}
	open := func() error {
		fds, err := netns.Open()
		if err != nil {
			return err
		}
		return fds.Close()
	}
	for range 2 { // Close leaves nothing that a second Open would meet
		if err := n.Do(open); err != nil {
			t.Error(err)
		}
	}
}

// TestOpenTaken: a job that was faster is an error, and leaves no descriptor.
func TestOpenTaken(t *testing.T) {
	t.Parallel()
	n := netnstest.Empty(t)
	if err := n.Do(netns.Setup); err != nil {
		t.Fatal(err)
	}
	l, err := n.Listen("tcp", "0.0.0.0:65353")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var fds netns.FDs
	err = n.Do(func() (err error) {
		fds, err = netns.Open()
		return err
	})
	if !errors.Is(err, unix.EADDRINUSE) || fds != (netns.FDs{TCP: -1, DNS: -1, Log: -1}) {
		t.Errorf("Open with the port taken: got %+v %v, want EADDRINUSE and no descriptors", fds, err)
	}
}

// TestWithoutIPv6: a namespace with IPv6 switched off is served.
func TestWithoutIPv6(t *testing.T) {
	t.Parallel()
	n := netnstest.Empty(t)
	err := n.Do(func() error {
		for _, what := range []string{"all", "lo", "default"} {
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+what+"/disable_ipv6", []byte("1"), 0); err != nil {
				return err
			}
		}
		return netns.Setup()
	})
	if err != nil {
		t.Fatalf("Setup without IPv6: %v", err)
	}
	if err := answers(t, n, metadata); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("connect %s: got %v, want ECONNREFUSED", metadata, err)
	}
	if conn, err := n.Dial("tcp", "[2001:db8::9]:443"); err == nil {
		conn.Close()
		t.Error("connect over IPv6 succeeded")
	}
}

// TestWithoutRights: who has no CAP_NET_ADMIN is told so.
func TestWithoutRights(t *testing.T) {
	t.Parallel()
	n := netnstest.Empty(t)
	err := n.Do(func() error {
		none := [2]unix.CapUserData{}
		if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &none[0]); err != nil {
			return err
		}
		return netns.Setup()
	})
	if !errors.Is(err, unix.EPERM) {
		t.Errorf("Setup without CAP_NET_ADMIN: got %v, want EPERM", err)
	}
}

// TestUserNamespace: root of a user namespace, who is nobody outside, may do all
// of it, as the guest does.
func TestUserNamespace(t *testing.T) {
	t.Parallel()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	bin := filepath.Join(dir, "guest")
	if err := errors.Join(os.WriteFile(bin, self, 0o755), os.Chmod(dir, 0o755), os.Chmod(filepath.Dir(dir), 0o755)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 1 << 20, Size: 1}} // nobody's outside
	cmd := exec.CommandContext(ctx, bin, "-test.run=^TestGuest$", "-test.v")
	cmd.Dir = "/"
	cmd.Env = []string{"MAYFLY_TEST_GUEST=1"}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNET,
		UidMappings: ids,
		GidMappings: ids,
		Credential:  &syscall.Credential{NoSetGroups: true}, // root inside
	}
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("guest done")) {
		t.Errorf("in a user namespace: %v\n%s", err, out)
	}
}

// TestGuest is the guest of TestUserNamespace.
func TestGuest(t *testing.T) {
	if os.Getenv("MAYFLY_TEST_GUEST") == "" {
		return // the test of this name is TestUserNamespace
	}
	if err := netns.Setup(); err != nil {
		t.Fatal(err)
	}
	fds, err := netns.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer fds.Close()
	if err := connect(metadata); !errors.Is(err, unix.ECONNREFUSED) {
		t.Fatalf("connect %s: got %v, want ECONNREFUSED", metadata, err)
	}
	if err := connect("198.18.0.1:443"); err != nil {
		t.Fatalf("connect to a virtual address: %v", err)
	}
	buf := make([]byte, 4096)
	if n, err := unix.Read(fds.Log, buf); err != nil || !bytes.Contains(buf[:n], []byte{169, 254, 169, 254}) {
		t.Fatalf("NFLOG: got %x %v, want the refused packet", buf[:n], err)
	}
	if _, err := io.WriteString(os.Stdout, "guest done\n"); err != nil {
		t.Fatal(err)
	}
}
