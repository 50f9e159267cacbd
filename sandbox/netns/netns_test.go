package netns_test

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/netns"
	"github.com/mayfly-ci/mayfly/sandbox/netns/netnstest"
)

// metadata is an address that a box must not reach, and that is local in it.
const metadata = "169.254.169.254:443"

// TestOwnListener: a job that listens everywhere answers itself at any address
// while the wall is absent, and at its own addresses only when it stands.
func TestOwnListener(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		address string
		own     bool
	}{
		{"loopback", "127.0.0.1:443", true},
		{"other loopback", "127.8.9.1:443", true},
		{"self", egress.Self.String() + ":443", true},
		{"IPv6 loopback", "[::1]:443", true},
		{"metadata", metadata, false},
		{"public", "8.8.8.8:443", false},
		{"private", "10.0.0.1:443", false},
		{"resolver", egress.Resolver.String() + ":443", false},
		{"mapped", "[::ffff:8.8.8.8]:443", false},
		{"public IPv6", "[2001:4860:4860::8888]:443", false},
		{"unique local IPv6", "[fd00:ec2::254]:443", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			off := netnstest.Empty(t)
			if err := off.Do(netns.Loopback); err != nil {
				t.Fatal(err)
			}
			if err := answers(t, off, tt.address); err != nil {
				t.Errorf("control off, %s: got %v, want an answer of the job's own listener", tt.address, err)
			}
			err := answers(t, netnstest.New(t), tt.address)
			if tt.own && err != nil {
				t.Errorf("control on, %s: got %v, want an answer: the address is the job's own", tt.address, err)
			}
			if !tt.own && !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("control on, %s: got %v, want ECONNREFUSED", tt.address, err)
			}
		})
	}
}

// answers connects to address, on which a listener of the namespace waits.
func answers(t *testing.T, n *netnstest.Net, address string) error {
	t.Helper()
	l, err := n.Listen("tcp", ":443")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := n.Dial("tcp", address)
	if err != nil {
		return err
	}
	return conn.Close()
}

// TestRefusalIsQuick: a refused connect returns within 5 ms, at best of some,
// whether the socket blocks or not.
func TestRefusalIsQuick(t *testing.T) {
	n := netnstest.New(t)
	for _, address := range []string{metadata, "8.8.8.8:53", "[2001:db8::1]:443"} {
		for _, how := range []struct {
			name    string
			connect func(string) error
		}{
			{"non-blocking", func(a string) error { _, err := n.Dial("tcp", a); return err }},
			{"blocking", func(a string) error { return n.Do(func() error { return connect(a) }) }},
		} {
			best := time.Hour
			for n := 0; n < 10 || best > 5*time.Millisecond && n < 1000; n++ { // a busy machine may take a while for one
				start := time.Now()
				if err := how.connect(address); !errors.Is(err, unix.ECONNREFUSED) {
					t.Fatalf("%s connect %s: got %v, want ECONNREFUSED", how.name, address, err)
				}
				best = min(best, time.Since(start))
			}
			t.Logf("%s connect %s refused in %v", how.name, address, best)
			if best > 5*time.Millisecond {
				t.Errorf("%s connect %s: refused after %v at best, want 5ms", how.name, address, best)
			}
		}
	}
}

// connect uses a blocking socket, as most programs that are not Go do.
func connect(address string) error {
	to := netip.MustParseAddrPort(address)
	family, sa := unix.AF_INET, unix.Sockaddr(&unix.SockaddrInet4{Port: int(to.Port())})
	if to.Addr().Is6() {
		family, sa = unix.AF_INET6, &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
	} else {
		sa.(*unix.SockaddrInet4).Addr = to.Addr().As4()
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return errors.Join(unix.Connect(fd, sa), unix.Close(fd))
}

// TestGate: TCP to the virtual range and UDP 53 to any address but the job's
// own reach the sockets, which see whom the job meant.
func TestGate(t *testing.T) {
	t.Parallel()
	n := netnstest.New(t)
	s := n.Sockets()
	l, err := net.FileListener(s.TCP)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, address := range []string{"198.18.0.1:443", "198.19.255.255:1", "198.18.7.7:65353"} {
		conn, err := n.Dial("tcp", address)
		if err != nil {
			t.Fatalf("connect %s: got %v, want the gateway", address, err)
		}
		got, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		if to := original(t, got.(*net.TCPConn)); to.String() != address {
			t.Errorf("connect %s: the original destination is %v", address, to)
		}
		got.Close()
		conn.Close()
	}

	dns, err := net.FilePacketConn(s.DNS)
	if err != nil {
		t.Fatal(err)
	}
	defer dns.Close()
	for _, address := range []string{egress.Resolver.String() + ":53", "8.8.8.8:53", "198.18.0.1:53"} {
		if got, want := ask(t, n, dns, address), address; got != want {
			t.Errorf("UDP to %s: the answer came from %s", want, got)
		}
	}
	for _, address := range []string{"127.0.0.53:53", egress.Self.String() + ":53"} {
		if got := ask(t, n, nil, address); got != "own" {
			t.Errorf("UDP to %s: got an answer from %q, want the job's own server", address, got)
		}
	}
}

// ask sends a datagram to address. server answers it and the address that the
// answer came from is returned; without server one of the job's own answers.
func ask(t *testing.T, n *netnstest.Net, server net.PacketConn, address string) string {
	t.Helper()
	var client, own net.PacketConn
	err := n.Do(func() (err error) {
		if server == nil {
			if own, err = net.ListenPacket("udp4", address); err != nil {
				return err
			}
		}
		client, err = net.ListenPacket("udp4", ":0")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if own != nil {
		defer own.Close()
		server = own
	}
	to := net.UDPAddrFromAddrPort(netip.MustParseAddrPort(address))
	buf := make([]byte, 16)
	deadline := time.Now().Add(time.Minute)
	server.SetDeadline(deadline)
	client.SetDeadline(deadline)
	if _, err := client.WriteTo([]byte("?"), to); err != nil {
		t.Fatalf("UDP to %s: %v", address, err)
	}
	_, from, err := server.ReadFrom(buf)
	if err != nil {
		t.Fatalf("UDP to %s did not arrive: %v", address, err)
	}
	if _, err := server.WriteTo([]byte("!"), from); err != nil {
		t.Fatalf("answer to %v: %v", from, err)
	}
	_, from, err = client.ReadFrom(buf)
	if err != nil {
		t.Fatalf("answer of %s did not arrive: %v", address, err)
	}
	if own != nil {
		return "own"
	}
	return from.String()
}

// original is SO_ORIGINAL_DST of an accepted connection.
func original(t *testing.T, conn *net.TCPConn) netip.AddrPort {
	t.Helper()
	raw, err := conn.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var to netip.AddrPort
	var opt error
	err = raw.Control(func(fd uintptr) {
		var m *unix.IPv6Mreq // the 16 bytes of a sockaddr_in fit into it
		if m, opt = unix.GetsockoptIPv6Mreq(int(fd), unix.IPPROTO_IP, unix.SO_ORIGINAL_DST); opt == nil {
			b := m.Multiaddr
			to = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3]))
		}
	})
	if err := errors.Join(err, opt); err != nil {
		t.Fatalf("SO_ORIGINAL_DST: %v", err)
	}
	return to
}
