package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// attempts bounds the addresses of one name that are tried.
const attempts = 6

// reach connects to the destination of a rule, and returns the address that was
// judged and dialled: what is at the other end of the connection may be a proxy.
// The error is a refusal if the rules forbid every address that the name has.
func (g *Gateway) reach(ctx context.Context, r *grant) (net.Conn, string, error) {
	ctx, cancel := g.soon(ctx)
	defer cancel()
	if p := g.cfg.Parent; p != nil && p.Covers(r.Name) {
		conn, err := g.tunnel(ctx, r)
		return conn, "proxy " + p.Address, err
	}
	addrs, err := g.lookup(ctx, r)
	if err != nil {
		return nil, "", err
	}
	var all []error
	for i, a := range addrs {
		to := netip.AddrPortFrom(a, r.Port)
		conn, err := g.dial(ctx, to, len(addrs)-i)
		if err == nil {
			return conn, to.String(), nil
		}
		all = append(all, err)
	}
	return nil, "", errors.Join(all...)
}

// tunnel connects through the parent proxy. Nothing else is tried.
func (g *Gateway) tunnel(ctx context.Context, r *grant) (net.Conn, error) {
	if r.learned {
		return nil, refused("what %s resolves to has to be seen where no rule names it, and the parent proxy looks it up unseen: learn without (no_proxy)", r.Name)
	}
	if len(r.Resolve) > 0 {
		return nil, refused("the rule says what %s may resolve to, and the parent proxy looks it up unseen: reach it without (no_proxy), or take resolve out of the rule", r.Name)
	}
	conn, err := g.cfg.Parent.Connect(ctx, net.JoinHostPort(r.Name, strconv.Itoa(int(r.Port))))
	switch {
	case err == nil:
		return conn, nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	}
	return nil, err
}

// soon bounds the time to connect.
func (g *Gateway) soon(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, g.cfg.Dialling, fmt.Errorf("no connection within %v", g.cfg.Dialling))
}

// dial connects to one address. The time left is shared with the addresses that
// follow, so that a silent one does not take all of it.
func (g *Gateway) dial(ctx context.Context, to netip.AddrPort, share int) (net.Conn, error) {
	if deadline, ok := ctx.Deadline(); ok {
		left := time.Until(deadline) / time.Duration(share)
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, left, fmt.Errorf("connect %v: no answer within %v", to, left.Round(time.Millisecond)))
		defer cancel()
	}
	conn, err := g.cfg.Dial(ctx, "tcp", to.String())
	switch {
	case err == nil:
		return conn, nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	}
	return nil, fmt.Errorf("connect %v: %w", to, innermost(err))
}

// innermost says it all: "connection refused".
func innermost(err error) error {
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		return op.Err
	}
	return err
}

// lookup returns the addresses of a rule's name that may be dialled, judged.
func (g *Gateway) lookup(ctx context.Context, r *grant) ([]netip.Addr, error) {
	var found []netip.Addr
	ask := len(r.Resolve) == 0
	for _, p := range r.Resolve {
		if p.IsSingleIP() {
			found = append(found, p.Addr())
		} else {
			ask = true
		}
	}
	if ask {
		answer, err := g.cfg.Resolver.LookupNetIP(ctx, "ip", r.Name+".")
		switch {
		case err != nil && ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case err != nil && len(found) == 0:
			return nil, lookupError(r.Name, err)
		}
		found = append(found, answer...)
	}
	var good []netip.Addr
	var bad []string
	own := g.ownAddresses()
	for _, a := range found {
		a = a.Unmap()
		if why := g.judge(a, r.Rule, own); why != "" && !g.opens(a, r, own) {
			bad = append(bad, why)
		} else if len(good) < attempts {
			good = append(good, a)
		}
	}
	switch {
	case len(good) > 0:
		return good, nil
	case len(bad) > 0:
		return nil, refused("%s resolves to %s", r.Name, strings.Join(bad[:min(len(bad), attempts)], "; "))
	}
	return nil, fmt.Errorf("lookup of %s: no address", r.Name)
}

// lookupError keeps what a resolver found and drops which server it asked.
func lookupError(name string, err error) error {
	if d := (*net.DNSError)(nil); errors.As(err, &d) {
		return fmt.Errorf("lookup of %s: %s", name, d.Err)
	}
	return fmt.Errorf("lookup of %s: %w", name, err)
}

// judge says why an address may not be dialled under a rule, or nothing.
func (g *Gateway) judge(a netip.Addr, r egress.Rule, own func(netip.Addr) bool) string {
	if !a.IsValid() || a.Zone() != "" {
		return fmt.Sprintf("%v, an address with a zone", a)
	}
	if what := g.table.never(a); what != "" {
		return fmt.Sprintf("%v, a %s, which no rule opens", a, what)
	}
	for _, l := range g.cfg.Never {
		if l.Port() == r.Port && (l.Addr().Unmap() == a || l.Addr().IsUnspecified() && (a.IsLoopback() || own(a))) {
			return fmt.Sprintf("%v, where the agent listens, which no rule opens", a)
		}
	}
	if len(r.Resolve) > 0 {
		for _, p := range r.Resolve {
			if p.Contains(a) {
				return ""
			}
		}
		return fmt.Sprintf("%v, which is not in the rule's resolve", a)
	}
	what := g.table.private(a)
	if what == "" && own(a) {
		what = "local address of this machine"
	}
	if what != "" {
		return fmt.Sprintf("%v, a %s; if that is meant, add resolve: [%v] to the rule", a, what, a)
	}
	return ""
}

// opens says whether the operator lets names that no rule allows resolve to a
// private address.
func (g *Gateway) opens(a netip.Addr, r *grant, own func(netip.Addr) bool) bool {
	open := r.Rule
	open.Resolve = r.private
	return len(r.private) > 0 && g.judge(a, open, own) == ""
}

// ownAddresses tells the addresses of this machine from others. They are asked
// for once, when needed. If they cannot be told every address is its own.
func (g *Gateway) ownAddresses() func(netip.Addr) bool {
	var own map[netip.Addr]bool
	var err error
	return func(a netip.Addr) bool {
		if own == nil && err == nil {
			own, err = interfaceAddresses()
		}
		return err != nil || own[a]
	}
}

func interfaceAddresses() (map[netip.Addr]bool, error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, err
	}
	own := make(map[netip.Addr]bool, len(all))
	for _, a := range all {
		if n, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(n.IP); ok {
				own[ip.Unmap()] = true
			}
		}
	}
	return own, nil
}
