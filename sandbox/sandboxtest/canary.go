package sandboxtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// A Canary listens where no box must get, and remembers what has got there.
type Canary struct {
	targets []Target
	closers []func() error
	wait    sync.WaitGroup

	mu    sync.Mutex
	heard strings.Builder
}

// A Target is an address of a Canary, in words of package net.
type Target struct{ Network, Address string }

// ListenHost listens on every address of the host: TCP and UDP, and, as root,
// ICMP.
func ListenHost(ctx context.Context) (*Canary, error) {
	c := &Canary{}
	var cfg net.ListenConfig
	l, err := cfg.Listen(ctx, "tcp", "[::]:0")
	if err != nil {
		return nil, fmt.Errorf("canary: %w", err)
	}
	c.accept(l)
	port := strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
	packets := [][2]string{{"udp", "[::]:" + port}}
	networks := []string{"tcp", "udp"}
	if os.Geteuid() == 0 {
		packets = append(packets, [2]string{"ip4:icmp", "0.0.0.0"}, [2]string{"ip6:ipv6-icmp", "::"})
		networks = append(networks, "icmp")
	}
	for _, p := range packets {
		conn, err := cfg.ListenPacket(ctx, p[0], p[1])
		if err != nil {
			return nil, errors.Join(fmt.Errorf("canary: %w", err), c.Close())
		}
		c.receive(conn)
	}
	if c.targets, err = targets(networks, port); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c, nil
}

// targets are all addresses of the interfaces.
func targets(networks []string, port string) ([]Target, error) {
	interfaces, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("canary: %w", err)
	}
	var out []Target
	for _, i := range interfaces {
		addrs, err := i.Addrs()
		if err != nil {
			return nil, fmt.Errorf("canary: %w", err)
		}
		for _, a := range addrs {
			ip, _, err := net.ParseCIDR(a.String())
			if err != nil {
				return nil, fmt.Errorf("canary: %w", err)
			}
			host, icmp := ip.String(), "ip4:icmp"
			if ip.To4() == nil {
				icmp = "ip6:ipv6-icmp"
				if ip.IsLinkLocalUnicast() {
					host += "%" + i.Name
				}
			}
			for _, n := range networks {
				if n == "icmp" {
					out = append(out, Target{icmp, host})
				} else {
					out = append(out, Target{n, net.JoinHostPort(host, port)})
				}
			}
		}
	}
	return out, nil
}

// serve listens on the sockets of a box instead of a gateway.
func serve(s sandbox.Sockets) (*Canary, error) {
	l, tcpErr := net.FileListener(s.TCP)
	p, dnsErr := net.FilePacketConn(s.DNS)
	err := errors.Join(tcpErr, dnsErr, s.TCP.Close(), s.DNS.Close())
	if s.Log != nil {
		err = errors.Join(err, s.Log.Close())
	}
	if err != nil {
		return nil, fmt.Errorf("sockets of the box: %w", err)
	}
	c := &Canary{}
	c.accept(l)
	c.receive(p)
	return c, nil
}

// ListenUnix listens at a path or, after @, under an abstract name.
func ListenUnix(ctx context.Context, name string) (*Canary, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", name)
	if err != nil {
		return nil, fmt.Errorf("canary: %w", err)
	}
	c := &Canary{targets: []Target{{"unix", name}}}
	c.accept(l)
	return c, nil
}

func (c *Canary) accept(l net.Listener) {
	c.closers = append(c.closers, l.Close)
	c.wait.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return // closed
			}
			c.wait.Go(func() {
				defer conn.Close()
				_ = conn.SetReadDeadline(time.Now().Add(time.Minute)) // it is open
				b := make([]byte, 1024)
				for {
					n, err := conn.Read(b)
					c.note(b[:n])
					if err != nil {
						return
					}
				}
			})
		}
	})
}

func (c *Canary) receive(p net.PacketConn) {
	c.closers = append(c.closers, p.Close)
	c.wait.Go(func() {
		b := make([]byte, 2048)
		for {
			n, _, err := p.ReadFrom(b)
			if err != nil {
				return // closed
			}
			c.note(b[:n])
		}
	})
}

func (c *Canary) note(b []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.heard.Write(b)
}

// Targets are the addresses on which it listens.
func (c *Canary) Targets() []Target { return c.targets }

// Reached reports whether token has arrived.
func (c *Canary) Reached(token string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return strings.Contains(c.heard.String(), token)
}

// Close stops listening and waits for its goroutines, at most some seconds.
func (c *Canary) Close() error {
	var all error
	for _, f := range c.closers {
		all = errors.Join(all, f())
	}
	c.wait.Wait()
	return all
}
