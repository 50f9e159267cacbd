package gateway

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// From linux/netfilter/nfnetlink_log.h.
const (
	nflogPacket  = unix.NFNL_SUBSYS_ULOG << 8 // NFULNL_MSG_PACKET is 0
	nflogPayload = 9
	nflogSeq     = 12
	nfgenmsg     = 4 // size of the header of the family
)

// nflogBuffer holds a datagram of the kernel: one packet, as netns asks for, or
// the few that wait while more are refused.
const nflogBuffer = 64 << 10

// watch writes a line for each packet that the network of the box refused,
// until the socket is closed. The kernel drops messages when the ledger is slow
// and numbers them, so that a line can say how many are missing.
func (b *box) watch(log *os.File) {
	buf := make([]byte, nflogBuffer)
	var next uint32
	overrun := false // the kernel says that it dropped some, and the gap was not seen yet
	for {
		n, err := log.Read(buf)
		switch {
		case errors.Is(err, os.ErrClosed):
			if overrun {
				b.refused(egress.Line{Network: "other", Reason: "the last refused packets have no line: the job sent them faster than they could be written"})
			}
			return
		case errors.Is(err, unix.ENOBUFS):
			overrun = true
			continue
		case err != nil:
			b.refused(egress.Line{Network: "other", Reason: "refused packets have no lines from now on: " + err.Error()})
			return
		}
		for _, m := range nflogMessages(buf[:n]) {
			if lost := m.seq - next; m.numbered && lost != 0 {
				overrun = false
				b.refused(egress.Line{Network: "other", Reason: fmt.Sprintf("%d refused packets have no line: the job sent them faster than they could be written", lost)})
			}
			if m.numbered {
				next = m.seq + 1
			}
			b.refused(packetLine(m.packet))
		}
	}
}

// refused writes a line about what the kernel refused already.
func (b *box) refused(l egress.Line) {
	l.Time, l.Verdict = time.Now(), egress.Refused
	_ = b.root.book.line(l) // nothing is left to refuse; Close tells of it
}

// A logged is one NFLOG message.
type logged struct {
	packet   []byte // from the IP header on, cut
	seq      uint32
	numbered bool
}

// nflogMessages cuts a datagram of an NFLOG socket. What is malformed is left
// out.
func nflogMessages(b []byte) []logged {
	var all []logged
	for len(b) >= unix.NLMSG_HDRLEN {
		n := int(binary.NativeEndian.Uint32(b))
		if n < unix.NLMSG_HDRLEN || n > len(b) {
			break
		}
		m := b[unix.NLMSG_HDRLEN:n]
		if binary.NativeEndian.Uint16(b[4:]) == nflogPacket && len(m) >= nfgenmsg {
			all = append(all, nflogMessage(m[nfgenmsg:]))
		}
		b = b[min(align(n), len(b)):]
	}
	return all
}

// nflogMessage reads the attributes of one message.
func nflogMessage(b []byte) logged {
	var l logged
	for len(b) >= unix.SizeofNlAttr {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofNlAttr || n > len(b) {
			break
		}
		value := b[unix.SizeofNlAttr:n]
		switch binary.NativeEndian.Uint16(b[2:]) &^ unix.NLA_F_NESTED {
		case nflogPayload:
			l.packet = value
		case nflogSeq:
			if len(value) == 4 {
				l.seq, l.numbered = binary.BigEndian.Uint32(value), true
			}
		}
		b = b[min(align(n), len(b)):]
	}
	return l
}

// align is NLMSG_ALIGN and NLA_ALIGN.
func align(n int) int { return (n + 3) &^ 3 }

// packetLine says what a refused packet was. A packet that makes no sense still
// gives a line.
func packetLine(p []byte) egress.Line {
	l := egress.Line{Network: "other", Reason: "only TCP to the names that the policy allows is carried"}
	if len(p) == 0 {
		return l
	}
	var proto byte
	var rest []byte
	switch {
	case p[0]>>4 == 4 && len(p) >= 20:
		proto = p[9]
		l.Address = netip.AddrFrom4([4]byte(p[16:20])).String()
		if head := int(p[0]&15) * 4; head >= 20 && head <= len(p) && binary.BigEndian.Uint16(p[6:])&0x1fff == 0 {
			rest = p[head:]
		}
	case p[0]>>4 == 6 && len(p) >= 40:
		proto, rest = extensions(p[6], p[40:])
		l.Address = netip.AddrFrom16([16]byte(p[24:40])).String()
	default:
		return l
	}
	port := func() uint16 {
		if len(rest) < 4 {
			return 0
		}
		return binary.BigEndian.Uint16(rest[2:])
	}
	switch proto {
	case unix.IPPROTO_TCP:
		l.Network, l.Port = "tcp", port()
		l.Reason = "an address and not a name; connect to a name, for which a rule may say resolve: [" + l.Address + "]"
		if l.Port == 53 {
			l.Reason = "DNS is answered over UDP only"
		}
	case unix.IPPROTO_UDP:
		l.Network, l.Port = "udp", port()
		l.Reason = "UDP is not carried, except DNS over IPv4"
		if l.Port == 443 {
			l.Reason += "; use HTTPS over TCP in place of QUIC"
		}
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		l.Network, l.Reason = "icmp", "ICMP is not carried"
	}
	return l
}

// extensions skips the IPv6 extension headers (RFC 8200 section 4) that stand
// before the ports.
func extensions(next byte, b []byte) (byte, []byte) {
	for range 8 { // no honest packet has more
		switch next {
		case unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS:
			if len(b) < 8 || (int(b[1])+1)*8 > len(b) {
				return next, nil
			}
			next, b = b[0], b[(int(b[1])+1)*8:]
		case unix.IPPROTO_FRAGMENT:
			if len(b) < 8 || binary.BigEndian.Uint16(b[2:])>>3 != 0 {
				return next, nil
			}
			next, b = b[0], b[8:]
		default:
			return next, b
		}
	}
	return next, nil
}
