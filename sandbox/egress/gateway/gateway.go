// Package gateway is the way out of boxes whose network package netns made.
//
// For each box it answers DNS with virtual addresses, one per allowed name, and
// serves the TCP connections that the box's network redirects to it. The kernel
// tells which virtual address a connection was made to (SO_ORIGINAL_DST), the
// address tells the name, and name and port tell the rule. A connection that no
// rule allows is reset. An allowed one is served as the rule's protocol says:
//
//   - tcp: the destination is dialled and bytes are passed.
//   - tls: the same, after a ClientHello whose server name is the rule's name
//     was read. An encrypted ClientHello is refused, GREASE included, because
//     the two look alike and a real one may hide another name of the same
//     provider: turn it off in the browsers that send it. Passed-through TLS
//     cannot be checked further: the Host inside it is not seen.
//   - http: requests are parsed and written anew, each one after its Host was
//     checked, so that the destination sees one framing and one host whatever
//     the job sent. HTTP/1 only; CONNECT is refused, and an upgrade that is not
//     one to WebSocket, on a request that the rule allows it.
//   - https: the same for HTTP/1 and HTTP/2 inside TLS, which ends here, under an
//     authority that the box trusts and that no other box has (authority.go), and
//     begins anew towards the destination. The ClientHello is judged as with tls.
//   - ssh and postgres: end here, and begin anew towards the destination, where
//     the gateway logs in with the credential of a lease (login.go). Each channel
//     of an SSH connection is judged by what it is for.
//
// The destination's addresses are looked up and judged once and what was
// judged is dialled, so a name cannot change in between. By default only public
// addresses are. See address.go for the classes. With a parent proxy names are not
// looked up here (Config.Parent).
//
// A rule with a Service leads into the box of another gateway: its network is
// entered by a thread that makes the socket there, and ends. An agent without
// privileges cannot do so, and refuses such rules.
//
// Rules for IP literals are refused by Open: the network of a box redirects the
// virtual range only. Give the address a name and name the address in Resolve.
//
// The ledger gets a line for each TCP connection (with protocol http: for each
// request), each DNS question that is not about an allowed name and each packet
// that the network of the box refused. A question about an allowed name reaches
// nothing and has no line of its own; neither have reverse questions about the
// addresses of the box. Lines of one Open are written one at a time.
//
// What the job sees: connect succeeds before the destination was dialled, and
// whatever goes wrong later is a reset.
package gateway

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// A Resolver looks names up outside of the box. *net.Resolver is one.
type Resolver interface {
	// LookupNetIP returns the addresses of host, which ends with a dot so that
	// no search domain is tried. network is "ip".
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
}

// The values of Config fields that are zero.
const (
	// DefaultNames bounds the names of one job. A virtual address is never
	// given to a second name of the same job, so steps add up.
	DefaultNames = 4096
	// DefaultConns bounds the connections of one job at a time. Each may hold
	// two sockets with what the peers have not read yet, a pipe of up to 1 MiB
	// each way and, while a ClientHello is awaited, 64 KiB.
	DefaultConns = 512
	// DefaultDialling is the time to look a name up and to connect.
	DefaultDialling = 10 * time.Second
	// DefaultHello is the time to send a ClientHello or the header of a request.
	DefaultHello = 10 * time.Second
	// DefaultIdle is the time in which some byte must move. Clouds forget idle
	// connections after 4 to 6 minutes; a slow query may well take more.
	DefaultIdle = 15 * time.Minute
)

// Config says how a gateway reaches the outside. The zero value is usable.
type Config struct {
	Resolver Resolver // nil: the system's
	// Dial connects to an address that was judged. nil: net.Dialer. What it
	// returns should have CloseWrite, else half-close ends the connection.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Roots are what the certificates of HTTPS destinations must chain to whose
	// rule names no CA. nil: what this machine trusts.
	Roots *x509.CertPool
	// Parent is a proxy that reaches names in place of Dial; nil is none.
	Parent *Parent
	// Never are the agent's own listeners, which no rule opens. An unspecified
	// address stands for every address of this machine.
	Never []netip.AddrPort

	Names int // per job; 0: DefaultNames
	Conns int // per job at a time; 0: DefaultConns

	Dialling time.Duration // 0: DefaultDialling
	Hello    time.Duration // 0: DefaultHello
	Idle     time.Duration // 0: DefaultIdle

	// Trace is called between outside effects, for crash tests; nil: none.
	Trace func(point string)
}

// A Parent is a proxy that is told names and looks them up itself. What they
// resolve to is not seen here then, so that a rule which says what it may be
// (Resolve) is refused, and that a name leads to a public address is the proxy's
// to hold.
type Parent struct {
	// Covers says which names it is for. The others are dialled as without it,
	// and never one of its own.
	Covers func(name string) bool
	// Connect makes a tunnel to NAME:PORT. What it returns should have CloseWrite.
	Connect func(ctx context.Context, address string) (net.Conn, error)
	// Address is what the ledger calls it.
	Address string
}

// withDefaults returns c with its zero values replaced.
func (c Config) withDefaults() (Config, error) {
	if c.Names < 0 || c.Conns < 0 || c.Dialling < 0 || c.Hello < 0 || c.Idle < 0 {
		return c, errors.New("gateway config: a limit is negative; 0 is the default, there is no unlimited")
	}
	for _, a := range c.Never {
		if !a.IsValid() || a.Port() == 0 {
			return c, fmt.Errorf("gateway config: listener %v: an address and a port are needed", a)
		}
	}
	if p := c.Parent; p != nil && (p.Covers == nil || p.Connect == nil) {
		return c, errors.New("gateway config: a parent needs Covers and Connect")
	}
	if c.Resolver == nil {
		c.Resolver = net.DefaultResolver
	}
	if c.Dial == nil {
		c.Dial = (&net.Dialer{}).DialContext
	}
	if c.Trace == nil {
		c.Trace = func(string) {}
	}
	c.Never = slices.Clone(c.Never)
	c.Names = min(cmp.Or(c.Names, DefaultNames), virtualAddresses)
	c.Conns = cmp.Or(c.Conns, DefaultConns)
	c.Dialling = cmp.Or(c.Dialling, DefaultDialling)
	c.Hello = cmp.Or(c.Hello, DefaultHello)
	c.Idle = cmp.Or(c.Idle, DefaultIdle)
	return c, nil
}

// A Gateway serves any number of boxes. It implements egress.Gateway.
type Gateway struct {
	cfg    Config
	table  *table
	mu     sync.Mutex
	scopes map[string]*scope // by the name given to Open

	buffers *buffers // for bodies
}

var (
	_ egress.Gateway    = (*Gateway)(nil)
	_ egress.Terminator = (*Gateway)(nil)
	_ egress.Host       = (*Gateway)(nil)
)

// New makes a gateway without boxes.
func New(c Config) (*Gateway, error) {
	c, err := c.withDefaults()
	if err != nil {
		return nil, err
	}
	return &Gateway{cfg: c, table: newTable(), scopes: make(map[string]*scope), buffers: newBuffers()}, nil
}

// Open implements egress.Gateway.
func (g *Gateway) Open(ctx context.Context, name string, o egress.Opening) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if name == "" || o.Ledger == nil {
		return fmt.Errorf("gateway %q: a name and a ledger are needed", name)
	}
	if err := validate(o); err != nil {
		return fmt.Errorf("gateway %s: %w", name, err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.scopes[name] != nil {
		return fmt.Errorf("gateway %s: is open already", name)
	}
	b := newBox()
	b.learn = o.Learn
	var err error
	if b.authority, err = newAuthority(o); err != nil {
		return fmt.Errorf("gateway %s: %w", name, err)
	}
	if o.Parent != "" {
		parent := g.scopes[o.Parent]
		if parent == nil || !parent.root() {
			return fmt.Errorf("gateway %s: parent %q is not an open gateway with a box", name, o.Parent)
		}
		b = parent.box
	}
	grants, published, err := g.grants(o)
	if err != nil {
		return fmt.Errorf("gateway %s: %w", name, err)
	}
	s := newScope(name, b, o.Ledger)
	b.published = append(b.published, published...)
	if err := b.admit(s, grants, g.cfg.Names); err != nil {
		return fmt.Errorf("gateway %s: %w", name, err)
	}
	if err := g.serveLocal(s, o.Serve); err != nil {
		return errors.Join(fmt.Errorf("gateway %s: %w", name, err), b.withdraw(s))
	}
	g.scopes[name] = s
	g.cfg.Trace("gateway.opened")
	return nil
}

// Attach implements egress.Gateway. The sockets are those of netns.Open.
func (g *Gateway) Attach(ctx context.Context, name string, s egress.Sockets) error {
	d, err := adopt(s)
	if err != nil {
		return fmt.Errorf("gateway %s: %w", name, err)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	sc := g.scopes[name]
	switch {
	case ctx.Err() != nil:
		err = ctx.Err()
	case sc == nil:
		err = errors.New("is not open")
	case !sc.root():
		err = errors.New("has no box of its own, its parent has")
	default:
		err = sc.box.serve(g, d)
	}
	if err != nil {
		return fmt.Errorf("gateway %s: %w", name, errors.Join(err, d.close()))
	}
	g.cfg.Trace("gateway.attached")
	return nil
}

// Close implements egress.Gateway. It returns an error if ctx ends first, and
// may then be called again, or if the ledger failed, and has closed the name.
func (g *Gateway) Close(ctx context.Context, name string) error {
	g.mu.Lock()
	s := g.scopes[name]
	g.mu.Unlock()
	if s == nil {
		return nil
	}
	if err := s.box.withdraw(s); err != nil {
		return fmt.Errorf("gateway %s: %w", name, err)
	}
	g.cfg.Trace("gateway.withdrawn")
	select {
	case <-s.idle():
	case <-ctx.Done():
		return fmt.Errorf("gateway %s: waiting for the last ledger line: %w", name, ctx.Err())
	}
	g.mu.Lock()
	if g.scopes[name] == s {
		delete(g.scopes, name)
		if s.root() {
			s.box.authority = nil // nothing uses the key any more
		}
	}
	g.mu.Unlock()
	if s.root() {
		s.box.leaveNetwork()
	}
	g.cfg.Trace("gateway.closed")
	if err := s.book.failure(); err != nil {
		return fmt.Errorf("gateway %s: %w", name, err)
	}
	return nil
}
