package gateway

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

const (
	// queryLimit is more than any question needs (RFC 1035 section 2.3.4,
	// RFC 6891 for the options that come with it).
	queryLimit = 4096
	// answerTTL is how long a job may keep an answer, in seconds. The address
	// stays the name's for as long as the box lives.
	answerTTL = 60
)

// resolve answers the questions of a box until its socket is closed. One at a
// time: a ledger that blocks holds the next question back, in the kernel, which
// drops what does not fit.
func (b *box) resolve(conn *net.UDPConn, asker *who) {
	buf := make([]byte, queryLimit)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			<-time.After(pause) // an ICMP error for an answer that nobody waited for
			continue
		}
		reply, line := b.reply(buf[:n])
		if line.Verdict != "" {
			line.Time = time.Now()
			line.Process = asker.of(unix.IPPROTO_UDP, netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), netip.AddrPortFrom(egress.Resolver, 53))
			if b.root.book.line(line) != nil && line.Verdict == egress.Learned {
				continue // a refused one is refused anyway
			}
		}
		if reply != nil {
			_, _ = conn.WriteToUDPAddrPort(reply, from) // nobody may be there any more
		}
	}
}

// reply answers a packet, with nil if it deserves no answer. The line has no
// verdict if nothing is to be written.
func (b *box) reply(packet []byte) ([]byte, egress.Line) {
	var p dnsmessage.Parser
	h, err := p.Start(packet)
	if err != nil || h.Response {
		return nil, dnsRefusal("", "not a DNS question")
	}
	h = dnsmessage.Header{ID: h.ID, Response: true, OpCode: h.OpCode, RecursionDesired: h.RecursionDesired, RecursionAvailable: true}
	if h.OpCode != 0 {
		h.RCode = dnsmessage.RCodeNotImplemented
		return pack(h, nil, netip.Addr{}), dnsRefusal("", "not a DNS question but another operation")
	}
	questions, err := p.AllQuestions()
	if err != nil || len(questions) != 1 {
		h.RCode = dnsmessage.RCodeFormatError
		return pack(h, nil, netip.Addr{}), dnsRefusal("", "not one DNS question")
	}
	q := questions[0]
	h.RCode = dnsmessage.RCodeNameError
	asked := q.Name.String()
	name, err := canonical(asked)
	if err != nil {
		return pack(h, &q, netip.Addr{}), dnsRefusal(strings.TrimSuffix(printable(asked), "."), "not a host name")
	}
	if ownReverse(name) {
		return pack(h, &q, netip.Addr{}), egress.Line{}
	}
	addr, why, learned := b.answer(name)
	if why != "" {
		return pack(h, &q, netip.Addr{}), dnsRefusal(name, why)
	}
	h.RCode = dnsmessage.RCodeSuccess
	if q.Type != dnsmessage.TypeA || q.Class != dnsmessage.ClassINET {
		addr = netip.Addr{} // no data of this type; HTTPS records would carry ECH keys
	}
	if learned {
		return pack(h, &q, addr), egress.Line{Network: "dns", Name: name, Verdict: egress.Learned}
	}
	return pack(h, &q, addr), egress.Line{}
}

func dnsRefusal(name, reason string) egress.Line {
	return egress.Line{Network: "dns", Name: name, Verdict: egress.Refused, Reason: reason}
}

// pack makes a packet of a header, the question as it was asked and, if valid,
// an address. It is nil if the library cannot make one.
func pack(h dnsmessage.Header, q *dnsmessage.Question, addr netip.Addr) []byte {
	m := dnsmessage.Message{Header: h}
	if q != nil {
		m.Questions = []dnsmessage.Question{*q}
	}
	if addr.IsValid() {
		m.Answers = []dnsmessage.Resource{{
			Header: dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET, TTL: answerTTL},
			Body:   &dnsmessage.AResource{A: addr.As4()},
		}}
	}
	b, err := m.Pack()
	if err != nil {
		return nil
	}
	return b
}

// ownReverse reports a reverse question about an address that only exists in
// boxes: programs ask for names of their peers and of themselves.
func ownReverse(name string) bool {
	labels := strings.Split(strings.TrimSuffix(name, ".in-addr.arpa"), ".")
	if len(labels) != 4 || !strings.HasSuffix(name, ".in-addr.arpa") {
		return false
	}
	addr, err := netip.ParseAddr(labels[3] + "." + labels[2] + "." + labels[1] + "." + labels[0])
	return err == nil && (egress.Virtual.Contains(addr) || addr == egress.Self || addr == egress.Resolver || addr.IsLoopback())
}
