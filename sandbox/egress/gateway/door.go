package gateway

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// pause is waited after an error of a listening socket, which may be due to a
// peer, and then is over, or to a lack of descriptors.
const pause = 20 * time.Millisecond

// A door is the sockets of one box.
type door struct {
	tcp  *net.TCPListener
	dns  *net.UDPConn
	init int                // process 1 of the box, 0 if it is not known
	log  *os.File           // nil: the runtime has none
	net  *os.File           // the network that the sockets are in; nil if it cannot be entered
	own  []*net.TCPListener // of published ports
}

// adopt takes the sockets over. They are closed if it fails.
func adopt(s egress.Sockets) (*door, error) {
	d := &door{init: s.Init}
	if s.TCP == nil || s.DNS == nil {
		// Closing what is not there is an error too, of no interest.
		_, _, _ = s.TCP.Close(), s.DNS.Close(), s.Log.Close()
		return nil, errors.New("the TCP and the DNS socket are needed")
	}
	tcp, err := net.FileListener(s.TCP)
	if l, ok := tcp.(*net.TCPListener); ok {
		d.tcp = l
	} else if err == nil {
		err = errors.Join(errors.New("not TCP"), tcp.Close())
	}
	d.net = network(s.TCP)
	dns, dnsErr := net.FilePacketConn(s.DNS)
	if c, ok := dns.(*net.UDPConn); ok {
		d.dns = c
	} else if dnsErr == nil {
		dnsErr = errors.Join(errors.New("not UDP"), dns.Close())
	}
	err = errors.Join(wrap("TCP listener", err), wrap("DNS socket", dnsErr), s.TCP.Close(), s.DNS.Close())
	if s.Log != nil {
		// The descriptor may have come from elsewhere, in any state.
		log, logErr := nonblocking(s.Log)
		d.log = log
		err = errors.Join(err, wrap("NFLOG socket", logErr), s.Log.Close())
	}
	if err != nil {
		return nil, errors.Join(err, d.close())
	}
	return d, nil
}

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

// nonblocking duplicates a file so that closing the copy ends its reads.
func nonblocking(f *os.File) (*os.File, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	fd, op := -1, error(nil)
	err = raw.Control(func(old uintptr) {
		if fd, op = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0); op == nil {
			op = unix.SetNonblock(fd, true)
		}
	})
	if err := errors.Join(err, op); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// close ends the reads of all sockets.
func (d *door) close() error {
	if d == nil {
		return nil
	}
	var all error
	for _, l := range d.own {
		all = errors.Join(all, l.Close())
	}
	if d.tcp != nil {
		all = errors.Join(all, d.tcp.Close())
	}
	if d.dns != nil {
		all = errors.Join(all, d.dns.Close())
	}
	if d.log != nil {
		all = errors.Join(all, d.log.Close())
	}
	if d.net != nil {
		all = errors.Join(all, d.net.Close())
	}
	return all
}

// serve starts what serves a box. It runs until the root is withdrawn, and
// Close waits for it.
func (b *box) serve(g *Gateway, d *door) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.root.closed {
		return errors.New("is closing")
	}
	if b.door != nil {
		return errors.New("has its box already")
	}
	b.net, d.net = d.net, nil
	if err := b.listen(g, d); err != nil {
		return err
	}
	b.door, b.who = d, newWho(d.init, b.net)
	b.root.wg.Go(func() { g.accept(b, d.tcp, nil) })
	asker := b.who
	b.root.wg.Go(func() { b.resolve(d.dns, asker) })
	if d.log != nil {
		b.root.wg.Go(func() { b.watch(d.log) })
	}
	return nil
}

// accept takes connections until the listener is closed. What they may is known
// of a published port.
func (g *Gateway) accept(b *box, l *net.TCPListener, known *grant) {
	for {
		conn, err := l.AcceptTCP()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// A connection that is gone already, or no descriptors left. The
			// job waits in the listener's queue.
			<-time.After(pause)
			continue
		}
		now := time.Now()
		c := &session{gateway: g, box: b, job: conn, started: now, grant: known, line: egress.Line{Time: now, Network: "tcp"}}
		if !b.room(g.cfg.Conns) {
			c.refuse(cmp.Or(c.decide(), fmt.Sprintf("the job has %d connections open; close some", g.cfg.Conns)))
			continue
		}
		b.root.wg.Go(func() {
			defer b.free()
			c.serve()
		})
	}
}

// room counts a connection in, unless there are limit already.
func (b *box) room(limit int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.conns >= limit {
		return false
	}
	b.conns++
	return true
}

// free counts a connection out.
func (b *box) free() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.conns--
}

// original asks the kernel which address a connection was made to.
func original(conn *net.TCPConn) (netip.AddrPort, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	var to netip.AddrPort
	var op error
	err = raw.Control(func(fd uintptr) {
		var m *unix.IPv6Mreq // the 16 bytes of a sockaddr_in fit into it
		if m, op = unix.GetsockoptIPv6Mreq(int(fd), syscall.IPPROTO_IP, unix.SO_ORIGINAL_DST); op == nil {
			b := m.Multiaddr
			to = netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3]))
		}
	})
	return to, errors.Join(err, op)
}
