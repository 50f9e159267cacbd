package gateway

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// virtualAddresses is how many names the virtual range has room for; its first
// address is not used.
const virtualAddresses = 1<<(32-15) - 1

// A book writes the lines of one scope, one at a time.
type book struct {
	name  string
	mode  string
	write egress.Ledger
	mu    sync.Mutex
	lost  int
	first error
}

// line writes l. If that fails, the attempt must be refused.
func (b *book) line(l egress.Line) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	l.Gateway, l.Mode = b.name, b.mode
	err := b.write(l)
	if err != nil {
		if b.lost++; b.first == nil {
			b.first = err
		}
	}
	return err
}

// failure says whether lines are missing.
func (b *book) failure() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.lost == 0 {
		return nil
	}
	return fmt.Errorf("ledger: %d lines not written: %w", b.lost, b.first)
}

// A scope is what one Open admitted: a box, or a widening of one.
type scope struct {
	box  *box
	book *book
	wg   sync.WaitGroup
	// Guarded by box.mu.
	closed bool
	ends   map[any]func()     // how to end the connections and the requests of the scope
	own    []*net.TCPListener // in the box, of names that are served
}

func newScope(name string, b *box, ledger egress.Ledger) *scope {
	s := &scope{box: b, book: &book{name: name, write: ledger}, ends: make(map[any]func())}
	if b.root == nil {
		b.root = s
	}
	if b.learn != nil {
		s.book.mode = egress.ModeAudit
	}
	return s
}

// root says whether the scope has a box of its own.
func (s *scope) root() bool { return s.box.root == s }

// idle is closed when nothing of the scope runs any more.
func (s *scope) idle() <-chan struct{} {
	done := make(chan struct{})
	go func() { // ends with the scope, which the caller has withdrawn
		s.wg.Wait()
		close(done)
	}()
	return done
}

// A grant is a rule and the scope that brought it.
type grant struct {
	egress.Rule
	scope   *scope
	learned bool           // there is no such rule
	private []netip.Prefix // that the name may resolve to, beside public ones
	into    *box           // of a rule with a Service
	narrows []*narrow      // the rule's Requests
	inject  *injection
	answers http.Handler // of a name that is served
}

// A destination is a name of a box. It keeps its address for as long as the box
// lives, because the job may have kept it too.
type destination struct {
	name   string
	addr   netip.Addr
	grants []grant // none: it was allowed once
}

// wildcard is the name of the destination whose grants are for a name too.
func wildcard(name string) string {
	_, rest, _ := strings.Cut(name, ".")
	return "*." + rest
}

// A box is the network of one job, as the gateway sees it.
type box struct {
	root      *scope
	authority *authority // nil: no rule of the box needs one
	trusts    trusts
	limit     int           // names that it may have
	held      chan struct{} // places of requests of which something is held in memory
	mu        sync.Mutex
	// The following are guarded by mu.
	byName map[string]*destination
	byAddr map[netip.Addr]*destination
	scopes []*scope // that are open, the root first
	conns  int
	attached
	learn     *egress.Learning // nil: rules are needed
	published []published      // since Open
	tripwires []tripwire       // of all that were ever open
	logins    logins
}

// attached is what a box has from Attach on.
type attached struct {
	door *door
	net  *os.File // the network of the box; nil after Close, and if it cannot be entered
	who  *who
}

func newBox() *box {
	return &box{
		byName: make(map[string]*destination), byAddr: make(map[netip.Addr]*destination),
		held: make(chan struct{}, heldBodies),
	}
}

// admit adds the rules of a scope, all or none.
func (b *box) admit(s *scope, rules []grant, limit int) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.root.closed {
		return errors.New("the box of the parent is closing")
	}
	b.limit = limit
	fresh := make(map[string]bool)
	for i, r := range rules {
		if certified(r.Protocol) && !b.authority.covers(r.Name) {
			return fmt.Errorf("%w: %s: the authority of the job was not made for %s", egress.ErrBadRules, cite(r.Rule), r.Name)
		}
		d := b.byName[r.Name]
		if d == nil {
			fresh[r.Name] = true
		} else if err := conflict(d.grants, r.Rule); err != nil {
			return err
		}
		if r.answers != nil && (d != nil && len(d.grants) > 0 || slices.ContainsFunc(rules[:i], func(e grant) bool { return e.Name == r.Name })) {
			return fmt.Errorf("%w: %s: %s is served already", egress.ErrBadRules, cite(r.Rule), r.Name)
		}
		for _, earlier := range rules[:i] {
			if earlier.Name == r.Name {
				if err := conflict([]grant{earlier}, r.Rule); err != nil {
					return err
				}
			}
		}
	}
	if n := len(b.byName) + len(fresh); n > limit {
		return fmt.Errorf("%w: %d names, a job may have %d", egress.ErrBadRules, n, limit)
	}
	for _, r := range rules {
		d := b.byName[r.Name]
		if d == nil {
			d = b.destine(r.Name)
		}
		r.Resolve = slices.Clone(r.Resolve)
		r.scope = s
		d.grants = append(d.grants, r)
	}
	b.arm(rules)
	b.scopes = append(b.scopes, s)
	return nil
}

// destine gives a name its address. Names are never taken away again.
func (b *box) destine(name string) *destination {
	d := &destination{name: name, addr: virtualAddress(len(b.byName) + 1)}
	b.byName[d.name] = d
	if !strings.HasPrefix(name, "*") { // nobody connects to a wildcard
		b.byAddr[d.addr] = d
	}
	return d
}

// conflict refuses a rule that would make another mean something else.
func conflict(grants []grant, r egress.Rule) error {
	for _, g := range grants {
		if g.Service != r.Service {
			return fmt.Errorf("%w: %s and %s: %s is a service of the job, or a name outside, and not both", egress.ErrBadRules, cite(r), cite(g.Rule), r.Name)
		}
		if g.Port == r.Port && (g.Protocol != r.Protocol || !slices.Equal(g.Resolve, r.Resolve) || g.CA != r.CA) {
			return fmt.Errorf("%w: %s contradicts %s about %s port %d; make protocol, resolve and ca the same", egress.ErrBadRules, cite(r), cite(g.Rule), r.Name, r.Port)
		}
		if g.Port == r.Port && chain(g.Rule) != chain(r) {
			return fmt.Errorf("%w: %s and %s: whole connections to %s port %d have a client certificate; no other rule can be for it", egress.ErrBadRules, cite(r), cite(g.Rule), r.Name, r.Port)
		}
	}
	return nil
}

// virtualAddress is the nth address of the virtual range.
func virtualAddress(n int) netip.Addr {
	a := egress.Virtual.Addr().As4()
	a[1] += byte(n >> 16)
	a[2] += byte(n >> 8)
	a[3] += byte(n)
	return netip.AddrFrom4(a)
}

// answer gives the virtual address of a name that some rule allows, or that the
// box learns now, or says why there is none.
func (b *box) answer(name string) (addr netip.Addr, why string, learned bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	d, wild := b.byName[name], b.byName[wildcard(name)]
	known := d != nil && len(d.grants) > 0 || wild != nil && len(wild.grants) > 0
	if !known && !b.learns(name) {
		return netip.Addr{}, "no rule allows this name", false
	}
	if d == nil {
		if len(b.byName) >= b.limit {
			return netip.Addr{}, fmt.Sprintf("the job has asked for %d names, and no more are allowed", b.limit), false
		}
		d, learned = b.destine(name), !known
	}
	return d.addr, "", learned
}

// decide finds the grant for a connection to a virtual address, and the name
// that was meant even if there is none.
func (b *box) decide(to netip.AddrPort) (name string, g *grant) {
	b.mu.Lock()
	defer b.mu.Unlock()
	d := b.byAddr[to.Addr()]
	if d == nil {
		return "", nil
	}
	if all := b.grants(d, to.Port()); len(all) > 0 {
		return d.name, &all[0]
	}
	if b.learns(d.name) {
		return d.name, b.learned(d.name, to.Port(), "")
	}
	return d.name, nil
}

// grants are those for a port of a name, as grants of exactly that name. A rule
// for the name hides one for a wildcard. The caller holds b.mu.
func (b *box) grants(d *destination, port uint16) []grant {
	for _, from := range []*destination{d, b.byName[wildcard(d.name)]} {
		if from == nil {
			continue
		}
		var all []grant
		for _, g := range from.grants {
			if g.Port == port || g.Port == 0 {
				g.Name = d.name
				all = append(all, g)
			}
		}
		if len(all) > 0 {
			return all
		}
	}
	return nil
}

// offers are the grants for a port of a name: those with a credential first, and
// then those of the newest scope.
func (b *box) offers(name string, port uint16) []grant {
	b.mu.Lock()
	defer b.mu.Unlock()
	d := b.byName[name]
	if d == nil {
		return nil
	}
	all := b.grants(d, port)
	slices.SortStableFunc(all, func(x, y grant) int {
		if (x.inject == nil) != (y.inject == nil) {
			if x.inject == nil {
				return 1
			}
			return -1
		}
		return slices.Index(b.scopes, y.scope) - slices.Index(b.scopes, x.scope)
	})
	return all
}

// enter makes a connection, or a request, one of its scope's. It fails if the
// scope is closed.
func (b *box) enter(s *scope, what any, end func()) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if s.closed {
		return false
	}
	s.wg.Add(1)
	b.root.wg.Add(1) // the box ends with the last of its connections
	s.ends[what] = end
	return true
}

// leave is called when the last line of it is written.
func (b *box) leave(s *scope, what any) {
	b.mu.Lock()
	delete(s.ends, what)
	b.mu.Unlock()
	s.wg.Done()
	b.root.wg.Done()
}

// withdraw takes the rules of a scope back and ends what they allowed. With the
// root everything of the box ends.
func (b *box) withdraw(s *scope) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if s.closed {
		return nil
	}
	going := []*scope{s}
	if s.root() {
		going = slices.Clone(b.scopes)
	}
	for _, s := range going {
		s.closed = true
		for _, d := range b.byName {
			d.grants = slices.DeleteFunc(d.grants, func(g grant) bool { return g.scope == s })
		}
		for _, end := range s.ends {
			end()
		}
		for _, l := range s.own {
			_ = l.Close() // nobody else does
		}
	}
	b.scopes = slices.DeleteFunc(b.scopes, func(s *scope) bool { return s.closed })
	if !s.root() || b.door == nil {
		return nil
	}
	return b.door.close()
}
