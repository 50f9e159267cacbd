package gateway

import (
	"bytes"
	"encoding/binary"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// ip4 is a packet to 203.0.113.9.
func ip4(proto byte, payload ...byte) []byte {
	p := make([]byte, 20)
	p[0], p[9] = 0x45, proto
	copy(p[16:], []byte{203, 0, 113, 9})
	return append(p, payload...)
}

// ip6 is a packet to 2001:db8::9.
func ip6(next byte, payload ...byte) []byte {
	p := make([]byte, 40)
	p[0], p[6] = 0x60, next
	copy(p[24:], []byte{0x20, 1, 0xd, 0xb8})
	p[39] = 9
	return append(p, payload...)
}

// nflog is a datagram with one packet.
func nflog(seq uint32, packet []byte) []byte {
	attr := func(b []byte, typ uint16, v []byte) []byte {
		b = binary.NativeEndian.AppendUint16(b, uint16(4+len(v)))
		b = binary.NativeEndian.AppendUint16(b, typ)
		b = append(b, v...)
		return append(b, make([]byte, align(len(b))-len(b))...)
	}
	body := attr([]byte{2, 0, 0, 5}, nflogPayload, packet)
	body = attr(body, nflogSeq, binary.BigEndian.AppendUint32(nil, seq))
	m := make([]byte, 16, 16+len(body))
	binary.NativeEndian.PutUint32(m, uint32(16+len(body)))
	binary.NativeEndian.PutUint16(m[4:], nflogPacket)
	return append(m, body...)
}

func TestPacketLine(t *testing.T) {
	t.Parallel()
	ports := []byte{0x80, 1, 1, 0xbb} // to 443
	later := ip4(unix.IPPROTO_TCP, ports...)
	later[7] = 1
	options := ip4(unix.IPPROTO_TCP, append([]byte{1, 1, 1, 1}, ports...)...)
	options[0] = 0x46
	for _, tt := range []struct {
		name    string
		packet  []byte
		network string
		address string
		port    uint16
	}{
		{"TCP", ip4(unix.IPPROTO_TCP, ports...), "tcp", "203.0.113.9", 443},
		{"TCP with IP options", options, "tcp", "203.0.113.9", 443},
		{"TCP, a later fragment", later, "tcp", "203.0.113.9", 0},
		{"TCP, cut", ip4(unix.IPPROTO_TCP, 1, 2), "tcp", "203.0.113.9", 0},
		{"UDP", ip4(unix.IPPROTO_UDP, ports...), "udp", "203.0.113.9", 443},
		{"ICMP", ip4(unix.IPPROTO_ICMP, 8, 0), "icmp", "203.0.113.9", 0},
		{"SCTP", ip4(unix.IPPROTO_SCTP, ports...), "other", "203.0.113.9", 0},
		{"TCP over IPv6", ip6(unix.IPPROTO_TCP, ports...), "tcp", "2001:db8::9", 443},
		{"after extensions", ip6(unix.IPPROTO_HOPOPTS, append([]byte{unix.IPPROTO_UDP, 0, 0, 0, 0, 0, 0, 0}, ports...)...), "udp", "2001:db8::9", 443},
		{"extension, cut", ip6(unix.IPPROTO_HOPOPTS, unix.IPPROTO_UDP, 9), "other", "2001:db8::9", 0},
		{"ICMPv6", ip6(unix.IPPROTO_ICMPV6, 128), "icmp", "2001:db8::9", 0},
		{"empty", nil, "other", "", 0},
		{"half a header", []byte{0x45, 0, 0}, "other", "", 0},
		{"version 7", bytes.Repeat([]byte{0x70}, 60), "other", "", 0},
	} {
		got := packetLine(tt.packet)
		if got.Network != tt.network || got.Address != tt.address || got.Port != tt.port || got.Reason == "" {
			t.Errorf("%s: got %+v, want %s to %s port %d and a reason", tt.name, got, tt.network, tt.address, tt.port)
		}
	}
}

func TestNFLOGMessages(t *testing.T) {
	t.Parallel()
	one, two := ip4(unix.IPPROTO_UDP, 0, 1, 0, 2), ip6(unix.IPPROTO_TCP, 0, 1, 0, 3)
	all := nflogMessages(append(nflog(7, one), nflog(8, two)...))
	if len(all) != 2 || !bytes.Equal(all[0].packet, one) || !bytes.Equal(all[1].packet, two) || all[1].seq != 8 || !all[1].numbered {
		t.Errorf("got %+v, want the two packets, numbered 7 and 8", all)
	}
}

// FuzzNFLOG: any datagram gives lines, or none, that are fit to print.
func FuzzNFLOG(f *testing.F) {
	f.Add(nflog(1, ip4(unix.IPPROTO_TCP, 0, 1, 0, 2)))
	f.Add(append(nflog(1, ip6(unix.IPPROTO_HOPOPTS, 17, 0)), nflog(2, nil)...))
	f.Fuzz(func(t *testing.T, datagram []byte) {
		for _, m := range nflogMessages(datagram) {
			l := packetLine(m.packet)
			switch l.Network {
			case "tcp", "udp", "icmp", "other":
			default:
				t.Errorf("line %+v of %x", l, m.packet)
			}
			if l.Reason == "" || l.Verdict != egress.Verdict("") {
				t.Errorf("line %+v of %x", l, m.packet)
			}
		}
	})
}
