// Package egress defines the only way out of a sandbox.
//
// A [Gateway] holds sockets that were opened inside the network of a box. It
// answers allowed names with virtual addresses, so that it knows for every
// connection which name was meant, decides by the job's [Rules], dials the
// destination itself and gives one [Line] to the ledger per attempt, allowed
// or not. Empty rules allow nothing.
//
// The package imports the standard library and package creds only.
package egress

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"time"
)

// ErrBadRules reports rules that cannot be enforced as written. The job is
// refused.
var ErrBadRules = errors.New("egress rules refused")

// A Protocol says what a rule lets through and what the gateway checks.
type Protocol string

// The protocols of a rule. There is no default: server-first protocols cannot
// be guessed, so each rule names its own.
const (
	TCP  Protocol = "tcp"  // any bytes; the name is checked and nothing else
	TLS  Protocol = "tls"  // a ClientHello whose server name is the rule's name
	HTTP Protocol = "http" // requests whose Host is the rule's name, each checked
	// HTTPS is HTTP inside TLS that ends at the gateway, under the authority of
	// the job (see Terminator), and begins anew towards the destination, whose
	// certificate is verified for the name. Server name and host are the rule's.
	HTTPS Protocol = "https"
)

// A Rule lets a job reach one name at one port.
type Rule struct {
	ID string // where the policy says so: "policy.yaml:14"; copied to every ledger line
	// Name is a lower-case host name, or an IP literal (then Protocol is TCP and
	// Resolve is empty), or "*." and a host name of two labels or more: any name
	// with exactly one label there. Each name that the job asks for is then
	// treated as if it had a rule of its own.
	Name     string
	Port     uint16
	Protocol Protocol
	// Resolve lists what the name may resolve to. Empty: any public address.
	// Single addresses are used as they are, without asking a resolver;
	// prefixes filter the resolver's answer. Metadata addresses and the
	// agent's own listeners are never dialled, whatever it says.
	Resolve []netip.Prefix
	Purpose string
	// Service names another gateway, open and attached, of the same Opening's
	// owner: what connects ends at the same port of 127.0.0.1 in that box, and
	// nothing is dialled outside. Then Protocol is TCP, Resolve is empty, and
	// Port may be 0, which is every port.
	Service string `json:",omitempty"`
	// Requests narrow what HTTP and HTTPS may carry: a request passes if one of
	// them allows it. Empty: any request, but no upgrade. With other protocols
	// it is empty.
	Requests []Request `json:",omitempty"`
	// CA are the certificates, as PEM, that the destination's must chain to with
	// HTTPS and Postgres, instead of those that the machine trusts.
	CA string `json:",omitempty"`
	// Inject puts a credential into the requests, or logs in with it. Then Protocol
	// is HTTPS, SSH or Postgres, and Name no wildcard: what is below it may be
	// anybody's. Of the rules that allow a request those with a credential count
	// first.
	Inject *Injection `json:",omitempty"`
	// Session is what an SSH rule is for. With other protocols it is nil.
	Session *Session `json:",omitempty"`
}

// A Published port is one of 127.0.0.1 and ::1 in a box that the gateway listens
// on: what connects goes where Rule, which has a Service, says.
type Published struct {
	Port uint16
	Rule Rule
}

// Rules are everything a job may reach. The zero value allows nothing.
type Rules struct {
	Allow []Rule
}

// A Verdict is the gateway's decision on one attempt.
type Verdict string

// Verdicts.
const (
	Allowed Verdict = "allowed"
	Refused Verdict = "refused" // by the rules
	Failed  Verdict = "failed"  // allowed, but the destination was not reached
	// Learned is Allowed by no rule, because the gateway learns. Of a question it
	// is about a name that was asked for the first time.
	Learned Verdict = "learned"
	// Ended closes an Allowed or a Learned attempt: a second line, with what was moved. The
	// first one is written before anything is, so that nothing moves unwritten.
	Ended Verdict = "ended"
)

// A Line is one attempt to reach something, as it goes to the ledger: Allowed
// before the first byte and Ended after the last, or Refused, or Failed. It
// never holds payload.
type Line struct {
	Time     time.Time `json:"time"`
	Gateway  string    `json:"gateway"`           // name given to Open
	Network  string    `json:"network"`           // dns, tcp, udp, icmp, other
	Name     string    `json:"name,omitempty"`    // the name the job asked for
	Address  string    `json:"address,omitempty"` // the address the job named, if it named one
	Port     uint16    `json:"port,omitempty"`
	Protocol Protocol  `json:"protocol,omitempty"`
	Verdict  Verdict   `json:"verdict"`
	Rule     string    `json:"rule,omitempty"`   // ID of the rule that allowed it
	Reason   string    `json:"reason,omitempty"` // why not
	Dialled  string    `json:"dialled,omitempty"`
	Request  Exchange  `json:"request,omitzero"` // with TCP and TLS there is none
	Process  Process   `json:"process,omitzero"` // of a connection, and of a question that was refused
	// Mode is "audit" in every line of a gateway that learns.
	Mode string `json:"mode,omitempty"`
	Traffic
}

// Traffic is what a line says of an attempt that is over.
type Traffic struct {
	Sent     int64         `json:"sent,omitempty"`     // bytes from the job
	Received int64         `json:"received,omitempty"` // bytes to the job
	Duration time.Duration `json:"duration,omitempty"` // nanoseconds
}

// A Process is who in the box made an attempt, as far as that can be told when
// the gateway hears of it. The job chooses what its programs are called.
type Process struct {
	PID        int    `json:"pid,omitempty"`        // as the box counts; 0 is not known
	Executable string `json:"executable,omitempty"` // path in the box: printable ASCII, and bounded
	Unknown    string `json:"unknown,omitempty"`    // why one of them is not known
}

// An Exchange is what a line says of an HTTP request, of what an SSH channel is
// for (Method is exec, shell or subsystem), or of a login to PostgreSQL (login or
// cancel). What a path, a query or a command may carry of a secret is not in it.
type Exchange struct {
	Method string `json:"method,omitempty"`
	// Path is the pattern that allowed the request, or the shape of the path: the
	// same with "*" for each segment that is more than a plain word. Of a command
	// it is the pattern, or CommandShape; of a login the database.
	Path   string `json:"path,omitempty"`
	Status int    `json:"status,omitempty"` // of the answer, when it Ended; of a command its exit status
	// Lease is whose credential the destination gets, if it gets one; or whose
	// placeholder stood where it is not for, and was refused.
	Lease string `json:"lease,omitempty"`
}

// A Ledger takes lines. It may block, which holds the attempt back: lines are
// never lost for speed. If it fails the attempt is refused.
type Ledger func(Line) error

// Sockets are the box's sockets; sandbox.Sockets is the same type for the
// other side of the contract. The gateway owns them once Attach is called.
type Sockets struct {
	TCP *os.File // listener that all TCP to the virtual range reaches
	DNS *os.File // UDP socket that all UDP to port 53 reaches
	Log *os.File // netlink NFLOG socket: one packet per refused attempt; nil if the runtime has none
	// Init is process 1 of the box as this machine counts, for the ledger to say
	// which of its descendants made an attempt; 0 if they are not on this machine,
	// or are no processes of its kernel.
	Init int
}

// An Opening is what Open needs to know.
type Opening struct {
	Rules  Rules
	Ledger Ledger // required
	// Parent names an open gateway whose box these rules are for. A gateway
	// with a parent has no box of its own: it widens its parent until it is
	// closed. This is how a rule is bound to one step.
	Parent string
	// Learn lets the box reach what no rule allows. Not with a Parent. nil: nothing.
	Learn *Learning
	// Publish are listeners in the box, from Attach on. Not with a Parent.
	Publish []Published
	// Serve are names that the agent answers for itself. With a Parent, as rules
	// are.
	Serve []Served
	// Terminate are names, beside those of Rules, that the authority is made
	// for: those of HTTPS rules that come later, with this one as their Parent.
	Terminate []string
	// Expires is when the box is gone at the latest. The authority is valid no
	// longer. Zero: a day.
	Expires time.Time
}

// ModeAudit marks what was done while no rule was needed.
const ModeAudit = "audit"

// Learning is how far a box may go for which there are no rules yet: to any name,
// at any port, by any protocol over TCP, for one of the job's own requests as
// well. Each attempt is written as Learned. Metadata addresses and the agent's
// own listeners stay out of reach, what says of itself that it is another's
// credential too, and raw addresses are none of a name.
type Learning struct {
	// Private are the addresses, beside public ones, that such names may resolve
	// to.
	Private []netip.Prefix
}

// A Terminator is a Gateway that carries HTTPS. Others refuse such rules.
type Terminator interface {
	// Authority returns the certificate, as PEM, that signs for the destinations
	// of name's HTTPS rules, or nil if an open gateway of that name and with a
	// box of its own can have none. It is this name's alone, its key is in memory
	// only and gone with Close, and it is made when it is first needed.
	Authority(name string) ([]byte, error)
}

// A Gateway is the way out of boxes.
type Gateway interface {
	// Open admits rules under name, which must be new. It returns ErrBadRules
	// if it cannot enforce them. Nothing flows before Attach.
	Open(ctx context.Context, name string, o Opening) error

	// Attach serves the sockets of a box under the rules of name.
	Attach(ctx context.Context, name string, s Sockets) error

	// Probe connects to a port of 127.0.0.1 in the box of name, and hangs up. Its
	// error says why nothing answers. It moves no byte and has no ledger line.
	Probe(ctx context.Context, name string, port uint16) error

	// Close withdraws the rules of name, ends every connection that they
	// allowed, and returns when the last ledger line is written. Closing an
	// absent name succeeds, so a gateway that died with the agent is closed.
	Close(ctx context.Context, name string) error
}

// The addresses of a box's network. They are part of the contract between
// runtimes, which route them, and gateways, which answer on them.
var (
	// Virtual is the range that allowed names resolve to (RFC 2544: never on
	// the Internet). The runtime redirects TCP to it to the gateway.
	Virtual = netip.MustParsePrefix("198.18.0.0/15")
	// Self is the box's own address beside loopback: glibc's AI_ADDRCONFIG
	// wants one, and the job's host name resolves to it (RFC 5737).
	Self = netip.MustParseAddr("192.0.2.1")
	// Resolver is where the box's resolv.conf points (RFC 5737). The runtime
	// redirects UDP port 53, to it or to any other address, to the gateway.
	Resolver = netip.MustParseAddr("192.0.2.53")
)
