package egresstest_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/egress/egresstest"
	"github.com/mayfly-ci/mayfly/sandbox/egress/gateway"
	"github.com/mayfly-ci/mayfly/sandbox/netns/netnstest"
)

func newNet(tb testing.TB) egresstest.Net { return netnstest.New(tb) }

// config is that of a gateway which the suite can see through.
func config(o *egresstest.Outside) gateway.Config {
	return gateway.Config{Resolver: o, Dial: o.Dial, Never: []netip.AddrPort{egresstest.Own()}}
}

func newGateway(tb testing.TB, c gateway.Config) *gateway.Gateway {
	tb.Helper()
	g, err := gateway.New(c)
	if err != nil {
		tb.Fatal(err)
	}
	return g
}

// TestGateway holds the gateway to its contract.
func TestGateway(t *testing.T) {
	t.Parallel()
	egresstest.Run(t, egresstest.Subject{
		Gateway: func(tb testing.TB, o *egresstest.Outside) egress.Gateway { return newGateway(tb, config(o)) },
		Net:     newNet,
	})
}

// broken is a gateway that breaks its contract in one place.
type broken struct {
	egress.Gateway
	open   func(next egress.Gateway, name string, o egress.Opening) error
	attach func(next egress.Gateway, name string, s egress.Sockets) error
	close  func(ctx context.Context, next egress.Gateway, name string) error
	probe  func() error

	hostKey func(next egress.Host, name string) ([]byte, error)
}

func (b broken) Open(ctx context.Context, name string, o egress.Opening) error {
	if b.open == nil {
		return b.Gateway.Open(ctx, name, o)
	}
	return b.open(b.Gateway, name, o)
}

func (b broken) Attach(ctx context.Context, name string, s egress.Sockets) error {
	if b.attach == nil {
		return b.Gateway.Attach(ctx, name, s)
	}
	return b.attach(b.Gateway, name, s)
}

func (b broken) Probe(ctx context.Context, name string, port uint16) error {
	if b.probe == nil {
		return b.Gateway.Probe(ctx, name, port)
	}
	return b.probe()
}

// Authority implements egress.Terminator.
func (b broken) Authority(name string) ([]byte, error) {
	return b.Gateway.(egress.Terminator).Authority(name)
}

// HostKey implements egress.Host.
func (b broken) HostKey(name string) ([]byte, error) {
	h := b.Gateway.(egress.Host)
	if b.hostKey == nil {
		return h.HostKey(name)
	}
	return b.hostKey(h, name)
}

func (b broken) Close(ctx context.Context, name string) error {
	if b.close == nil {
		return b.Gateway.Close(ctx, name)
	}
	return b.close(ctx, b.Gateway, name)
}

// rules breaks the rules.
func rules(change func([]egress.Rule) []egress.Rule) broken {
	return broken{open: func(next egress.Gateway, name string, o egress.Opening) error {
		o.Rules.Allow = change(slices.Clone(o.Rules.Allow))
		return next.Open(context.Background(), name, o)
	}}
}

// each breaks each rule.
func each(change func(*egress.Rule)) broken {
	return rules(func(all []egress.Rule) []egress.Rule {
		for i := range all {
			change(&all[i])
		}
		return all
	})
}

// adds allows something that the policy does not.
func adds(name string, port uint16) broken {
	return rules(func(all []egress.Rule) []egress.Rule {
		return append(all, egress.Rule{ID: "extra", Name: name, Port: port, Protocol: egress.TCP})
	})
}

// lines breaks the ledger.
func lines(change func(next egress.Ledger, l egress.Line) error) broken {
	return broken{open: func(next egress.Gateway, name string, o egress.Opening) error {
		if ledger := o.Ledger; ledger != nil {
			o.Ledger = func(l egress.Line) error { return change(ledger, l) }
		}
		return next.Open(context.Background(), name, o)
	}}
}

// twice looks everything up again.
type twice struct{ gateway.Resolver }

func (r twice) LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error) {
	if _, err := r.Resolver.LookupNetIP(ctx, network, host); err != nil {
		return nil, err
	}
	return r.Resolver.LookupNetIP(ctx, network, host)
}

func prefixes(all ...string) []netip.Prefix {
	var p []netip.Prefix
	for _, s := range all {
		p = append(p, netip.MustParsePrefix(s))
	}
	return p
}

// A mutation makes a gateway that is broken, perhaps by its config.
type mutation = func(*gateway.Config) broken

func of(b broken) mutation { return func(*gateway.Config) broken { return b } }

// unchecked passes a protocol without looking at it.
func unchecked(p egress.Protocol) mutation {
	return of(each(func(r *egress.Rule) {
		if r.Protocol == p {
			r.Protocol, r.CA, r.Requests = egress.TCP, "", nil
		}
	}))
}

// resolves gives each rule other addresses.
func resolves(p ...string) mutation {
	return of(each(func(r *egress.Rule) { r.Resolve = prefixes(p...) }))
}

// dials something else.
func dials(dial func(ctx context.Context, network, address string) (net.Conn, error)) mutation {
	return func(c *gateway.Config) broken {
		c.Dial = dial
		return broken{}
	}
}

// dialEnded is a dial that succeeds where nobody is: the connection ends at once.
func dialEnded(context.Context, string, string) (net.Conn, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer l.Close()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		return nil, err
	}
	end, err := l.Accept()
	if err != nil {
		return nil, err
	}
	return conn, end.Close()
}

// ruleMutants are broken in what they allow.
func ruleMutants(o *egresstest.Outside) map[string]mutation {
	return map[string]mutation{
		"empty rules allow nothing":                    of(adds("echo.example", 7)),
		"a rule is for one port":                       of(adds("echo.example", 8)),
		"names have data of type A only":               of(adds("other.example", 7)),
		"tls: the server name is the rule's":           unchecked(egress.TLS),
		"http: the host of each request is the rule's": unchecked(egress.HTTP),
		"a name resolves to public addresses only":     resolves("0.0.0.0/0", "::/0"),
		"the address that was judged is dialled": func(c *gateway.Config) broken {
			c.Resolver = twice{c.Resolver}
			return broken{}
		},
		"resolve: addresses are used without a lookup": resolves("10.9.8.0/24"),
		"resolve: prefixes filter the lookup":          resolves("0.0.0.0/0"),
		"metadata addresses are never dialled": func(c *gateway.Config) broken {
			c.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
				return o.Dial(ctx, network, "169.254.169.254:80")
			}
			return each(func(r *egress.Rule) { r.Resolve = prefixes("10.0.0.1/32") })
		},
		"the agent's listeners are never dialled": func(c *gateway.Config) broken {
			c.Never = nil
			return broken{}
		},
		"rules that cannot be enforced are refused": of(broken{open: func(next egress.Gateway, name string, op egress.Opening) error {
			if err := next.Open(context.Background(), name, op); !errors.Is(err, egress.ErrBadRules) {
				return err
			}
			return nil
		}}),
		"boxes do not share names": func(*gateway.Config) broken {
			var mu sync.Mutex
			var all []egress.Rule
			return rules(func(r []egress.Rule) []egress.Rule {
				mu.Lock()
				defer mu.Unlock()
				all = append(all, r...)
				return slices.Clone(all)
			})
		},
	}
}

// conductMutants are broken in what they do.
func conductMutants(o *egresstest.Outside) map[string]mutation {
	return map[string]mutation{
		"an allowed name is reached, with two lines": of(lines(func(next egress.Ledger, l egress.Line) error {
			if l.Verdict == egress.Ended {
				return nil
			}
			return next(l)
		})),
		"a line names the process in the box, or says why not": of(lines(func(next egress.Ledger, l egress.Line) error {
			l.Process = egress.Process{}
			return next(l)
		})),
		"nothing moves before its line is written": of(lines(func(next egress.Ledger, l egress.Line) error {
			go next(l) // the clause opens its gate before it ends
			return nil
		})),
		"an attempt whose line fails is refused": of(lines(func(next egress.Ledger, l egress.Line) error {
			_ = next(l)
			return nil
		})),
		"services of one port are told apart by name": of(each(func(r *egress.Rule) { r.Service = "job-1-s0" })),
		"a service is its own job's alone": of(broken{open: func(next egress.Gateway, name string, op egress.Opening) error {
			if name == "job-2" {
				op.Rules.Allow = []egress.Rule{{Name: "db", Protocol: egress.TCP, Service: "job-1-s0"}}
			}
			return next.Open(context.Background(), name, op)
		}}),
		"a published port leads to its service": of(broken{open: func(next egress.Gateway, name string, op egress.Opening) error {
			for i := range op.Publish {
				op.Publish[i].Port++
			}
			return next.Open(context.Background(), name, op)
		}}),
		"Probe says whether a port answers": of(broken{probe: func() error { return nil }}),
		"a rule for a service that is not there is refused": of(broken{open: func(next egress.Gateway, name string, op egress.Opening) error {
			op.Rules, op.Publish = egress.Rules{}, nil
			return next.Open(context.Background(), name, op)
		}}),
		"nothing flows before Attach": of(broken{open: func(next egress.Gateway, name string, op egress.Opening) error {
			if conn, err := o.Dial(context.Background(), "tcp", "93.184.216.34:7"); err == nil {
				conn.Close()
			}
			return next.Open(context.Background(), name, op)
		}}),
		"a connection to no name is refused": of(lines(func(next egress.Ledger, l egress.Line) error {
			if l.Address != "" {
				return nil
			}
			return next(l)
		})),
		"a refused packet has a line": of(broken{attach: func(next egress.Gateway, name string, s egress.Sockets) error {
			s.Log = nil
			return next.Attach(context.Background(), name, s)
		}}),
		"an unreachable destination is Failed and reset": dials(dialEnded),
		"half-close passes both ways": dials(func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := o.Dial(ctx, network, address)
			return struct{ net.Conn }{conn}, err
		}),
		"a name is open once": of(broken{open: func(next egress.Gateway, name string, op egress.Opening) error {
			_ = next.Open(context.Background(), name, op)
			return nil
		}}),
		"a parent's box is widened until Close": of(broken{close: func(ctx context.Context, next egress.Gateway, name string) error {
			if name == "job-1-step-1" {
				return nil
			}
			return next.Close(ctx, name)
		}}),
		"Close ends connections after their last line": of(broken{close: func(context.Context, egress.Gateway, string) error { return nil }}),
		"Close of an absent name succeeds": of(broken{close: func(ctx context.Context, next egress.Gateway, name string) error {
			if name == "never-open" {
				return errors.New("no such gateway")
			}
			return next.Close(ctx, name)
		}}),
	}
}

// TestSuite holds the suite to its word: for each clause a gateway that breaks
// it is found out.
func TestSuite(t *testing.T) {
	t.Parallel()
	for _, name := range egresstest.Names() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := egresstest.Subject{Net: newNet, Gateway: func(tb testing.TB, o *egresstest.Outside) egress.Gateway {
				mutate := ruleMutants(o)[name]
				if mutate == nil {
					mutate = conductMutants(o)[name]
				}
				if mutate == nil {
					mutate = httpsMutants()[name]
				}
				if mutate == nil {
					mutate = loginMutants()[name]
				}
				if mutate == nil {
					mutate = serveMutants()[name]
				}
				if mutate == nil {
					tb.Fatalf("clause %q has no broken gateway", name)
				}
				c := config(o)
				b := mutate(&c)
				real := newGateway(tb, c)
				b.Gateway = real
				tb.Cleanup(func() {
					for _, name := range []string{"job-1-step-0", "job-1-step-1", "job-1", "job-2", "job-3", "job-1-s0", "job-1-s1"} {
						if err := real.Close(context.Background(), name); err != nil {
							tb.Logf("Close(%s): %v", name, err)
						}
					}
				})
				return b
			}}
			err := egresstest.Check(t, s, name)
			if err == nil {
				t.Errorf("clause %q holds for a gateway that breaks it", name)
			}
			t.Logf("found: %v", err)
		})
	}
}
