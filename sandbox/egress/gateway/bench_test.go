package gateway_test

import (
	"io"
	"net"
	"net/netip"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
)

// BenchmarkConnect is a connection and one round trip: through the gateway, and
// directly on loopback for comparison.
func BenchmarkConnect(b *testing.B) {
	port := server(b, echo)
	bx := newBox(b, gateway.Config{}, tcpRule("echo.example", port))
	addr, err := bx.lookup("echo.example")
	if err != nil {
		b.Fatal(err)
	}
	for _, way := range []struct {
		name string
		dial func() (net.Conn, error)
	}{
		{"gateway", func() (net.Conn, error) { return bx.net.Dial("tcp", netip.AddrPortFrom(addr, port).String()) }},
		{"direct", func() (net.Conn, error) {
			return net.Dial("tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port).String())
		}},
	} {
		b.Run(way.name, func(b *testing.B) {
			for b.Loop() {
				conn, err := way.dial()
				if err != nil {
					b.Fatal(err)
				}
				if err := roundTrip(conn); err != nil {
					b.Fatal(err)
				}
				conn.Close()
			}
		})
	}
}

// BenchmarkThroughput is one stream from the destination to the job.
func BenchmarkThroughput(b *testing.B) {
	const size = 256 << 20
	block := make([]byte, 256<<10)
	port := server(b, func(conn net.Conn) {
		for range size / len(block) {
			if _, err := conn.Write(block); err != nil {
				return
			}
		}
	})
	bx := newBox(b, gateway.Config{}, tcpRule("big.example", port))
	for _, way := range []struct {
		name string
		dial func() (net.Conn, error)
	}{
		{"gateway", func() (net.Conn, error) { return bx.connect("big.example", port) }},
		{"direct", func() (net.Conn, error) {
			return net.Dial("tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port).String())
		}},
	} {
		b.Run(way.name, func(b *testing.B) {
			b.SetBytes(size)
			buf := make([]byte, 256<<10)
			for b.Loop() {
				conn, err := way.dial()
				if err != nil {
					b.Fatal(err)
				}
				n := 0
				for {
					m, err := conn.Read(buf)
					n += m
					if err == io.EOF {
						break
					}
					if err != nil {
						b.Fatal(err)
					}
				}
				if n != size {
					b.Fatalf("got %d bytes, want %d", n, size)
				}
				conn.Close()
			}
		})
	}
}
