package isolation

import (
	"archive/tar"
	"bytes"
	"errors"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/sandboxtest"
)

// archive is the probe as tar.
func archive(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := w.WriteHeader(&tar.Header{Name: "probe", Mode: 0o755, Size: int64(len(probeProgram))})
	_, writeErr := w.Write(probeProgram)
	if err := errors.Join(err, writeErr, w.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// The listeners of the host, on its loopback, its LAN, at the address of cloud
// metadata, on IPv6 and link-local: by TCP, UDP and ICMP. Off: a process of the
// host, with the host's network.
func TestNetworkOfTheHost(t *testing.T) {
	t.Parallel()
	canary, err := sandboxtest.ListenHost(bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	defer canary.Close()
	b := newBox(t, sandbox.Limits{})
	kinds := map[string]int{}
	inside := token()
	for _, target := range canary.Targets() {
		kinds[target.Network]++
		attempt(t, b, canary, target, inside)
		if target.Network == "ip4:icmp" {
			mine := token()
			child(t, nil, "ping", target.Address, mine)
			eventually(t, "an echo request by a datagram socket", func() bool { return canary.Reached(mine) })
			if b.probe(t, "ping", target.Address, inside); canary.Reached(inside) {
				t.Errorf("ping of %s from a box arrived", target.Address)
			}
		}
	}
	for _, kind := range []string{"tcp", "udp", "ip4:icmp", "ip6:ipv6-icmp"} {
		if kinds[kind] < 2 {
			t.Errorf("got %d addresses by %s, want two or more", kinds[kind], kind)
		}
	}
}

// attempt sends to a target from the box, and then from outside of it, so that
// the first would have arrived when the second has.
func attempt(t *testing.T, b *box, canary *sandboxtest.Canary, target sandboxtest.Target, inside string) {
	t.Helper()
	r := b.probe(t, "connect", target.Network, target.Address, inside)
	if r.code > 1 {
		t.Errorf("%v from a box: got %+v, want sent or refused", target, r)
	}
	mine := token()
	off := child(t, nil, "connect", target.Network, target.Address, mine)
	if !off.got() {
		t.Errorf("%v from the host: got %+v, want it sent", target, off)
		return
	}
	eventually(t, "the token of a process of the host at "+target.Address, func() bool { return canary.Reached(mine) })
	if canary.Reached(inside) {
		t.Errorf("%v from a box arrived", target)
	}
}

// A box that has the gateway's sockets has no more of the host than before.
func TestNetworkAfterAttach(t *testing.T) {
	t.Parallel()
	canary, err := sandboxtest.ListenHost(bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	defer canary.Close()
	b := newBox(t, sandbox.Limits{})
	s, err := b.Attach(bounded(t))
	if err != nil {
		t.Fatal(err)
	}
	defer s.TCP.Close()
	defer s.DNS.Close()
	defer s.Log.Close()
	for _, target := range canary.Targets() {
		if target.Network == "tcp" || target.Network == "udp" {
			attempt(t, b, canary, target, token())
		}
	}
}

// Unix sockets: one with an abstract name, which belongs to the network, and
// one at a path, as that of a container engine.
func TestUnixSocketsOfTheHost(t *testing.T) {
	t.Parallel()
	b := newBox(t, sandbox.Limits{})
	for _, name := range []string{"@" + token(), filepath.Join(t.TempDir(), "docker.sock")} {
		canary, err := sandboxtest.ListenUnix(bounded(t), name)
		if err != nil {
			t.Fatal(err)
		}
		defer canary.Close()
		inside := token()
		attempt(t, b, canary, canary.Targets()[0], inside)
		if r := b.probe(t, "connect", "unix", name, inside); !r.refused() {
			t.Errorf("%s from a box: got %+v, want refused", name, r)
		}
	}
	// What an abstract name is to another box.
	name := "@" + token()
	other := newBox(t, sandbox.Limits{})
	script := `import socket,sys,os
s = socket.socket(socket.AF_UNIX); s.bind("\0" + sys.argv[1]); s.listen()
if os.fork() == 0:
    os.setsid(); null = os.open("/dev/null", 2); [os.dup2(null, n) for n in range(3)]
    kept = []
    while True: kept.append(s.accept())`
	if r := other.run(t, "/usr/bin/python3", "-c", script, name[1:]); !r.got() {
		t.Fatalf("listen in a box: got %+v", r)
	}
	twoSided(t, "an abstract name of another box", other.probe(t, "connect", "unix", name, "x"), b.probe(t, "connect", "unix", name, "x"))
}

// Sockets that a job has no use for. Off: root outside of a box, which is what
// a job believes to be.
func TestSocketFamilies(t *testing.T) {
	t.Parallel()
	b := newBox(t, sandbox.Limits{})
	all := htons(unix.ETH_P_ALL)
	for name, s := range map[string][3]int{
		"vsock":                  {unix.AF_VSOCK, unix.SOCK_STREAM, 0},
		"packet":                 {unix.AF_PACKET, unix.SOCK_RAW, all},
		"packet datagram":        {unix.AF_PACKET, unix.SOCK_DGRAM, all},
		"alg":                    {unix.AF_ALG, unix.SOCK_SEQPACKET, 0},
		"xdp":                    {unix.AF_XDP, unix.SOCK_RAW, 0},
		"raw":                    {unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP},
		"raw with own header":    {unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW},
		"raw IPv6":               {unix.AF_INET6, unix.SOCK_RAW, unix.IPPROTO_ICMPV6},
		"netlink of netfilter":   {unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_NETFILTER},
		"netlink of audit":       {unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_AUDIT},
		"netlink of devices":     {unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_KOBJECT_UEVENT},
		"netlink of families":    {unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_GENERIC},
		"netlink of diagnostics": {unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_SOCK_DIAG},
		"netlink of xfrm":        {unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_XFRM},
	} {
		args := []string{"socket", strconv.Itoa(s[0]), strconv.Itoa(s[1]), strconv.Itoa(s[2])}
		off, on := child(t, nil, args...), b.probe(t, args...)
		if strings.Contains(off.out, "not supported") { // nor is there anything to attack
			t.Logf("%s: this kernel has none", name)
			off = result{}
		}
		twoSided(t, name, off, on)
	}
	twoSided(t, "an address for lo", child(t, nil, "address", "10.77.0.9"), b.probe(t, "address", "10.77.0.9"))
	if _, err := net.InterfaceByName("eth0"); err == nil {
		t.Error("the tests run in the network of the machine")
	}
}

func htons(n int) int { return n>>8 | n&0xff<<8 }
