// Package wall looks from inside a box whether anything leaves it: what a
// runtime and a gateway promise is tried in the box itself, before the job's
// first own command and after its last.
//
// Process 1 of the box tries what must be refused: the metadata address, other
// addresses over TCP, UDP and IPv6, a listener of the agent on the loopback of
// the host, sockets below IP. It asks for a name that no rule allows. What is
// expected is the refusal of the box's own network, which comes at once, and a
// line about each attempt in the ledger. Anything else is a surprise, a timeout
// too: it says that a packet went somewhere.
package wall

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// ErrBreached reports that something went through that must not. The box may not
// be used.
var ErrBreached = errors.New("the wall of the box does not hold")

// The addresses that are tried are nobody's (RFC 5737, RFC 3849) but the first,
// where clouds keep the machine's own credentials.
func addresses() []netip.AddrPort {
	return []netip.AddrPort{
		netip.MustParseAddrPort("169.254.169.254:80"),
		netip.MustParseAddrPort("203.0.113.113:443"),
		netip.MustParseAddrPort("[2001:db8::71]:443"),
	}
}

const (
	// Name is what is asked for: one that nobody has (RFC 2606).
	Name = "mayfly-attestation.invalid"

	// patience is how long the ledger of a busy machine may take to write what
	// was refused.
	patience = 20 * time.Second
)

// An attempt is something to try and what is expected of it.
type attempt struct {
	sandbox.Attempt
	want func(sandbox.Outcome) bool
}

// attempts are what is tried. The name is asked for only if somebody answers.
func attempts(canary netip.AddrPort, token string, served bool) ([]attempt, error) {
	all := []attempt{}
	for _, a := range addresses() {
		all = append(all, attempt{sandbox.Attempt{Network: "tcp", Address: a}, refused})
	}
	all = append(all,
		attempt{sandbox.Attempt{Network: "udp", Address: addresses()[1], Text: []byte(token)}, refused},
		attempt{sandbox.Attempt{Network: "raw"}, impossible},
		attempt{sandbox.Attempt{Network: "packet"}, impossible},
		attempt{sandbox.Attempt{Network: "vsock"}, impossible},
	)
	if canary.IsValid() {
		// On its own loopback the box may listen: the canary decides.
		all = append(all, attempt{sandbox.Attempt{Network: "tcp", Address: canary, Text: []byte(token)}, func(o sandbox.Outcome) bool {
			return o.Err == nil || refused(o)
		}})
	}
	if !served {
		return all, nil
	}
	question, err := query()
	all = append(all, attempt{
		sandbox.Attempt{Network: "udp", Address: netip.AddrPortFrom(egress.Resolver, 53), Text: question},
		unknown,
	})
	return all, err
}

// refused is the answer of the box's own network. A box without IPv6 has no
// route instead.
func refused(o sandbox.Outcome) bool {
	for _, e := range []syscall.Errno{syscall.ECONNREFUSED, syscall.ENETUNREACH, syscall.EADDRNOTAVAIL, syscall.EAFNOSUPPORT} {
		if errors.Is(o.Err, e) {
			return true
		}
	}
	return false
}

// impossible is the answer to a socket that a box may not make.
func impossible(o sandbox.Outcome) bool {
	for _, e := range []syscall.Errno{syscall.EPERM, syscall.EACCES, syscall.EAFNOSUPPORT, syscall.EPROTONOSUPPORT, syscall.ESOCKTNOSUPPORT, syscall.ENOSYS} {
		if errors.Is(o.Err, e) {
			return true
		}
	}
	return false
}

// query is a question for Name (RFC 1035, section 4.1).
func query() ([]byte, error) {
	name, err := dnsmessage.NewName(Name + ".")
	if err != nil {
		return nil, err
	}
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 0x6d66, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: name, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	return m.Pack()
}

// unknown is the answer that there is no such name.
func unknown(o sandbox.Outcome) bool {
	var p dnsmessage.Parser
	h, err := p.Start(o.Reply)
	return o.Err == nil && err == nil && h.Response && h.RCode == dnsmessage.RCodeNameError
}

// A Look is one look at a box. Its ledger lines are told apart by Line.
type Look struct {
	token string
	lines lines
}

// NewLook prepares a look. Pass the ledger's lines to its Line from now on.
func NewLook() *Look {
	l := &Look{token: "mayfly-" + rand.Text()}
	for _, a := range addresses() {
		l.lines.expect(key{"tcp", a.Addr().String(), a.Port()})
	}
	l.lines.expect(key{"udp", addresses()[1].Addr().String(), addresses()[1].Port()})
	l.lines.expect(key{"dns", Name, 0})
	return l
}

// Line says whether a line of the ledger is about an attempt of this look. Each
// attempt has one.
func (l *Look) Line(line egress.Line) bool {
	k := key{line.Network, line.Address, line.Port}
	if line.Network == "dns" {
		k = key{"dns", strings.TrimSuffix(line.Name, "."), 0}
	}
	return l.lines.take(k)
}

// Options say what is there to be looked at.
type Options struct {
	Canary *Canary // nil: nobody listens on the host
	Served bool    // a gateway answers the box
	Logged bool    // it writes lines about refused packets, which are waited for
}

// Run tries everything and returns what was refused, in words. The error is
// ErrBreached if anything was not, sandbox.ErrUnsupported if the box cannot be
// looked at, or says why nobody knows.
func (l *Look) Run(ctx context.Context, box sandbox.Sandbox, o Options) (string, error) {
	prober, ok := box.(sandbox.Prober)
	if !ok {
		return "", fmt.Errorf("look at the box: it tries nothing for us: %w", sandbox.ErrUnsupported)
	}
	all, err := attempts(o.Canary.Address(), l.token, o.Served)
	if err != nil {
		return "", fmt.Errorf("look at the box: %w", err)
	}
	tries := make([]sandbox.Attempt, len(all))
	for i, a := range all {
		tries[i] = a.Attempt
	}
	outcomes, err := prober.Probe(ctx, tries)
	if err != nil {
		return "", fmt.Errorf("look at the box: %w", err)
	}
	var words, bad []string
	for i, a := range all {
		words = append(words, said(a.Attempt, outcomes[i]))
		if !a.want(outcomes[i]) {
			bad = append(bad, words[i])
		}
		if !errors.Is(outcomes[i].Err, syscall.ECONNREFUSED) && a.Network != "udp" {
			l.lines.take(key{a.Network, a.Address.Addr().String(), a.Address.Port()}) // no packet was sent
		}
	}
	if o.Canary.Heard(l.token, reached(all, outcomes, o.Canary.Address())) {
		bad = append(bad, "the box reaches "+o.Canary.Address().String()+" of the host")
	}
	if len(bad) > 0 {
		return "", fmt.Errorf("%w: %s: do not use this runtime before mayfly doctor is content", ErrBreached, strings.Join(bad, "; "))
	}
	if o.Served && o.Logged {
		if missing := l.lines.wait(ctx, patience); missing != "" {
			return "", fmt.Errorf("%w: no line in the ledger about %s", ErrBreached, missing)
		}
	}
	return strings.Join(words, ", "), nil
}

// reached says whether the canary's address took what was sent.
func reached(all []attempt, outcomes []sandbox.Outcome, canary netip.AddrPort) bool {
	for i, a := range all {
		if a.Address == canary && a.Network == "tcp" && outcomes[i].Err == nil {
			return true
		}
	}
	return false
}

// said is one attempt and its outcome.
func said(a sandbox.Attempt, o sandbox.Outcome) string {
	what := a.Network
	if a.Address.IsValid() {
		what += " " + a.Address.String()
	}
	switch {
	case o.Err != nil:
		return what + ": " + o.Err.Error()
	case unknown(o):
		return what + ": no such name"
	}
	return what + ": went through"
}
