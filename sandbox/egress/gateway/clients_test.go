package gateway_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/sandbox/netns"
	"github.com/mayfly-ci/mayfly/sandbox/netns/netnstest"
)

// portOf is where a test server listens.
func portOf(s *httptest.Server) uint16 { return s.Listener.Addr().(*net.TCPAddr).AddrPort().Port() }

// shell runs a script in the box, with a resolv.conf of its own.
func (b *box) shell(script string) (string, error) {
	b.tb.Helper()
	for _, tool := range []string{"unshare", "mount", "curl", "getent"} {
		if _, err := exec.LookPath(tool); err != nil {
			b.tb.Fatalf("%v; install util-linux, mount, curl and libc-bin", err)
		}
	}
	conf := filepath.Join(b.tb.TempDir(), "resolv.conf")
	if err := os.WriteFile(conf, []byte("nameserver "+egress.Resolver.String()+"\n"), 0o600); err != nil {
		b.tb.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	// /proc/sys and all else stay the machine's: only what is needed is hidden.
	return b.net.Run(ctx, exec.Command("unshare", "--mount", "--propagation", "private", "sh", "-c",
		"mount --bind "+conf+" /etc/resolv.conf && { "+script+"\n}"))
}

// TestRealClients: the programs that jobs use see names, refusals and answers.
func TestRealClients(t *testing.T) {
	t.Parallel()
	hello := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		fmt.Fprintf(w, "hello %s %d", strings.Split(r.Host, ":")[0], n)
	})
	plain, secure := httptest.NewServer(hello), httptest.NewTLSServer(hello)
	t.Cleanup(plain.Close)
	t.Cleanup(secure.Close)
	b := newBox(t, gateway.Config{},
		egress.Rule{Name: "plain.example", Port: portOf(plain), Protocol: egress.HTTP},
		egress.Rule{Name: "secure.example", Port: portOf(secure), Protocol: egress.TLS})
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	const curl = "curl -sS -m 10 "
	httpURL, tlsURL := fmt.Sprintf("http://plain.example:%d/", portOf(plain)), fmt.Sprintf("https://secure.example:%d/", portOf(secure))
	for _, tt := range []struct {
		name, script, want string
		code               int
	}{
		{"getent", "getent ahostsv4 plain.example", "198.18.", 0},
		{"getent of another name", "getent hosts other.example", "", 2},
		{"curl, http", curl + httpURL, "hello plain.example 0", 0},
		{"curl, two requests", curl + httpURL + " " + httpURL, "hello plain.example 0hello plain.example 0", 0},
		{"curl, upload with Expect", curl + "-H 'Expect: 100-continue' --data-binary @/etc/services " + httpURL, "hello plain.example", 0},
		{"curl, https", curl + "-k " + tlsURL, "hello secure.example 0", 0},
		{"curl, other host", curl + "-H 'Host: other.example' " + httpURL, "", 56},
		{"curl, other server name", curl + "-k --connect-to ::secure.example: " + strings.Replace(tlsURL, "secure", "other", 1), "alert", 35},
		{"curl, other name", curl + "http://other.example/", "Could not resolve host", 6},
		{"curl, other port", curl + "http://plain.example:1/ || exit 1", "curl: (", 1}, // reset while connecting, or later
		{"curl, an address", curl + "http://203.0.113.9/", "", 7},
		{"curl, an IPv6 address", curl + "'http://[2001:db8::9]/'", "", 7},
		{"curl, HTTP/2 without TLS", curl + "--http2 " + httpURL, "", 56},
		{"Go", "MAYFLY_TEST_GET=" + httpURL + " " + self + " -test.run '^TestGet$'", "hello plain.example 0", 0},
		{"Go, other name", "MAYFLY_TEST_GET=http://other.example/ " + self + " -test.run '^TestGet$'", "no such host", 1},
	} {
		out, err := b.shell(tt.script)
		code := 0
		if err != nil {
			code = -1
			if exit, ok := err.(*exec.ExitError); ok {
				code = exit.ExitCode()
			}
		}
		if code != tt.code || !strings.Contains(out, tt.want) {
			t.Errorf("%s: got %d %q, want %d and %q", tt.name, code, out, tt.code, tt.want)
		}
	}
	b.await("line with the hint", refusedWith("203.0.113.9"))
}

// TestGet is a client, when it runs in a box.
func TestGet(t *testing.T) {
	url := os.Getenv("MAYFLY_TEST_GET")
	if url == "" {
		return // not a client: the test of this name is TestRealClients
	}
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(os.Stdout, resp.Body); err != nil {
		t.Fatal(err)
	}
}

// TestOtherProtocols: what is not TCP has no answer in a box, although the
// kernel would answer for every address if the wall were absent.
func TestOtherProtocols(t *testing.T) {
	t.Parallel()
	off := netnstest.Empty(t)
	if err := off.Do(func() error {
		// The box's network without its rules: the control, switched off.
		if err := netns.Setup(); err != nil {
			return err
		}
		return flush()
	}); err != nil {
		t.Fatal(err)
	}
	on := newBox(t, gateway.Config{})
	for _, tt := range []struct {
		network string
		probe   func() (bool, error)
		line    func(egress.Line) bool
	}{
		{
			"ICMP", func() (bool, error) { return ping(unix.AF_INET, unix.IPPROTO_ICMP, 8, "203.0.113.9") },
			func(l egress.Line) bool { return l.Network == "icmp" && l.Address == "203.0.113.9" },
		},
		{
			"ICMPv6", func() (bool, error) { return ping(unix.AF_INET6, unix.IPPROTO_ICMPV6, 128, "2001:db8::9") },
			func(l egress.Line) bool { return l.Network == "icmp" && l.Address == "2001:db8::9" },
		},
		{
			"UDP", func() (bool, error) { return datagram("udp4", "203.0.113.9:443") },
			func(l egress.Line) bool { return l.Network == "udp" && l.Address == "203.0.113.9" && l.Port == 443 },
		},
		{
			"UDP over IPv6", func() (bool, error) { return datagram("udp6", "[2001:db8::9]:53") },
			func(l egress.Line) bool { return l.Network == "udp" && l.Address == "2001:db8::9" && l.Port == 53 },
		},
		{
			"UDP to a virtual address", func() (bool, error) { return datagram("udp4", "198.18.0.1:443") },
			func(l egress.Line) bool { return l.Network == "udp" && l.Address == "198.18.0.1" },
		},
		{
			"raw protocol 253", func() (bool, error) { return raw("203.0.113.9") },
			func(l egress.Line) bool { return l.Network == "other" && l.Address == "203.0.113.9" },
		},
	} {
		for control, n := range map[string]*netnstest.Net{"off": off, "on": on.net} {
			var arrived bool
			err := n.Do(func() (err error) {
				arrived, err = tt.probe()
				return err
			})
			if err != nil {
				t.Errorf("%s, control %s: %v", tt.network, control, err)
			}
			if arrived != (control == "off") {
				t.Errorf("%s, control %s: arrived %v", tt.network, control, arrived)
			}
		}
		on.await(tt.network, has(func(l egress.Line) bool { return l.Verdict == egress.Refused && tt.line(l) }))
	}
}

// flush deletes the rules of the thread's namespace.
func flush() error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	const deleteTable = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_DELTABLE
	message := func(typ uint16, flags byte, family byte, resource byte, attrs ...byte) []byte {
		return append([]byte{
			byte(20 + len(attrs)), 0, 0, 0, byte(typ), byte(typ >> 8), unix.NLM_F_REQUEST | flags, 0, 0, 0, 0, 0, 0, 0, 0, 0,
			family, 0, 0, resource,
		}, attrs...)
	}
	batch := message(unix.NFNL_MSG_BATCH_BEGIN, 0, 0, unix.NFNL_SUBSYS_NFTABLES)
	batch = append(batch, message(deleteTable, unix.NLM_F_ACK, unix.NFPROTO_INET, 0, append([]byte{11, 0, 1, 0}, "mayfly\x00\x00"...)...)...)
	batch = append(batch, message(unix.NFNL_MSG_BATCH_END, 0, 0, unix.NFNL_SUBSYS_NFTABLES)...)
	if err := unix.Sendto(fd, batch, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	buf := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, buf, 0)
	if err != nil {
		return err
	}
	if n < 20 || !bytes.Equal(buf[16:20], make([]byte, 4)) {
		return fmt.Errorf("delete table: answer %x", buf[:n])
	}
	return nil
}

// probeWait is how long a probe waits for what should not come.
const probeWait = 100 * time.Millisecond

// ping reports whether an echo request is answered.
func ping(family, protocol int, request byte, to string) (bool, error) {
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	wait := unix.NsecToTimeval(int64(probeWait))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return false, err
	}
	message := []byte{request, 0, 0, 0, 0x12, 0x34, 0, 1}
	if family == unix.AF_INET {
		sum := ^(uint16(request)<<8 + 0x1234 + 1)
		message[2], message[3] = byte(sum>>8), byte(sum)
	}
	if err := unix.Sendto(fd, message, 0, sockaddr(to, 0)); err != nil {
		return false, err
	}
	buf := make([]byte, 256)
	for range 8 { // the socket sees the request too, and errors about it
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return false, nil
		}
		body := buf[:n]
		if family == unix.AF_INET && n > 20 {
			body = buf[20:n]
		}
		if reply := map[byte]byte{8: 0, 128: 129}[request]; body[0] == reply {
			return true, nil
		}
	}
	return false, nil
}

func sockaddr(ip string, port int) unix.Sockaddr {
	if v4 := net.ParseIP(ip).To4(); v4 != nil {
		return &unix.SockaddrInet4{Addr: [4]byte(v4), Port: port}
	}
	return &unix.SockaddrInet6{Addr: [16]byte(net.ParseIP(ip)), Port: port}
}

// datagram reports whether one arrives at a listener of the namespace.
func datagram(network, to string) (bool, error) {
	_, port, err := net.SplitHostPort(to)
	if err != nil {
		return false, err
	}
	l, err := net.ListenPacket(network, ":"+port)
	if err != nil {
		return false, err
	}
	defer l.Close()
	conn, err := net.Dial(network, to)
	if err != nil {
		return false, err
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("x")); err != nil {
		return false, err
	}
	if err := l.SetReadDeadline(time.Now().Add(probeWait)); err != nil {
		return false, err
	}
	_, _, err = l.ReadFrom(make([]byte, 1))
	return err == nil, nil
}

// raw reports whether a packet of an experimental protocol arrives.
func raw(to string) (bool, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 253)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	wait := unix.NsecToTimeval(int64(probeWait))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return false, err
	}
	if err := unix.Sendto(fd, []byte("x"), 0, sockaddr(to, 0)); err != nil {
		return false, err
	}
	_, _, err = unix.Recvfrom(fd, make([]byte, 64), 0)
	return err == nil, nil
}
