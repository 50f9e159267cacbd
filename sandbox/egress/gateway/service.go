package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/netns"
)

// published is a port of a box's loopback and what connects to it may.
type published struct {
	port  uint16
	grant grant
}

// grants finds the boxes that the rules of an opening lead into, once: a name
// that is opened anew later is another box. The caller holds g.mu.
func (g *Gateway) grants(o egress.Opening) ([]grant, []published, error) {
	var all []grant
	counts := counters{}
	for _, r := range o.Rules.Allow {
		if r.Inject != nil {
			counts.of(r.Inject.Lease, r.Inject.Uses)
		}
	}
	for _, r := range o.Rules.Allow {
		into, err := g.into(r)
		if err != nil {
			return nil, nil, err
		}
		in := newInjection(r.Inject)
		if in != nil {
			in.uses = counts[in.Lease]
		}
		all = append(all, grant{Rule: r, into: into, narrows: narrows(r.Requests), inject: in})
	}
	if err := wallets(all); err != nil {
		return nil, nil, err
	}
	for _, s := range o.Serve {
		all = append(all, grant{Rule: s.Rule, answers: s.Handler})
	}
	var ports []published
	for _, p := range o.Publish {
		into, err := g.into(p.Rule)
		if err != nil {
			return nil, nil, err
		}
		ports = append(ports, published{p.Port, grant{Rule: p.Rule, into: into}})
	}
	return all, ports, nil
}

// into is the box of a rule's service, nil if it has none.
func (g *Gateway) into(r egress.Rule) (*box, error) {
	if r.Service == "" {
		return nil, nil
	}
	s := g.scopes[r.Service]
	if s == nil || !s.root() {
		return nil, fmt.Errorf("%w: %s: service %q is not an open gateway with a box", egress.ErrBadRules, cite(r), r.Service)
	}
	if _, err := s.box.network(); err != nil {
		return nil, fmt.Errorf("%w: %s: service %q: %w", egress.ErrBadRules, cite(r), r.Service, err)
	}
	return s.box, nil
}

// network is the namespace that a socket is in, nil if we may not enter it.
func network(socket *os.File) *os.File {
	raw, err := socket.SyscallConn()
	if err != nil {
		return nil
	}
	ns := -1
	err = raw.Control(func(fd uintptr) {
		if n, err := netns.Of(int(fd)); err == nil {
			ns = n
		}
	})
	if err != nil || ns < 0 {
		return nil
	}
	return os.NewFile(uintptr(ns), "network")
}

func (b *box) network() (*os.File, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.root.closed:
		return nil, errors.New("its box is closing")
	case b.door == nil:
		return nil, errors.New("it has no box yet")
	case b.net == nil:
		return nil, errors.New("the agent may not enter the network of its box: run the agent as root")
	}
	return b.net, nil
}

// leaveNetwork lets go of the namespace. What is being dialled keeps it so long.
func (b *box) leaveNetwork() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.who.close()
	_ = b.net.Close() // it was only entered; nil has nothing to close
	b.net = nil
}

// within calls f on a thread in a network.
func within(ns *os.File, f func() error) error {
	raw, err := ns.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	// The descriptor stays what it is until f is done, whoever closes it.
	err = raw.Control(func(fd uintptr) { inner = netns.In(int(fd), f) })
	return errors.Join(err, inner)
}

// dial connects to a port of the box's own loopback.
func (b *box) dial(ctx context.Context, port uint16) (conn net.Conn, err error) {
	ns, err := b.network()
	if err != nil {
		return nil, fmt.Errorf("service: %w", err)
	}
	to := netip.AddrPortFrom(loopback(), port).String()
	err = within(ns, func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, "tcp4", to)
		return err
	})
	switch {
	case err == nil:
		return conn, nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	}
	return nil, fmt.Errorf("service: connect %s: %w", to, innermost(err))
}

func loopback() netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 0, 1}) }

// listen opens the published ports. If it fails the caller closes the door. The
// caller holds b.mu.
func (b *box) listen(g *Gateway, d *door) error {
	if len(b.published) == 0 {
		return nil
	}
	if b.net == nil {
		return errors.New("published ports: the agent may not enter the network of the box: run the agent as root")
	}
	for _, p := range b.published {
		p.grant.scope = b.root
		for _, network := range []string{"tcp4", "tcp6"} {
			address := map[string]string{"tcp4": "127.0.0.1", "tcp6": "[::1]"}[network]
			var l net.Listener
			err := within(b.net, func() (err error) {
				l, err = net.Listen(network, fmt.Sprintf("%s:%d", address, p.port))
				return err
			})
			if err != nil && network == "tcp6" {
				continue // a machine without IPv6
			}
			if err != nil {
				return fmt.Errorf("published port %d: %w", p.port, innermost(err))
			}
			tcp, ok := l.(*net.TCPListener)
			if !ok {
				return errors.Join(fmt.Errorf("published port %d: not TCP", p.port), l.Close())
			}
			d.own = append(d.own, tcp)
			b.root.wg.Go(func() { g.accept(b, tcp, &p.grant) })
		}
	}
	return nil
}

// Probe implements egress.Gateway.
func (g *Gateway) Probe(ctx context.Context, name string, port uint16) error {
	g.mu.Lock()
	s := g.scopes[name]
	g.mu.Unlock()
	if s == nil || !s.root() {
		return fmt.Errorf("gateway %s: is not open, or has no box of its own", name)
	}
	ctx, cancel := g.soon(ctx)
	defer cancel()
	conn, err := s.box.dial(ctx, port)
	if err != nil {
		return fmt.Errorf("gateway %s: %w", name, err)
	}
	reset(conn)
	return nil
}
