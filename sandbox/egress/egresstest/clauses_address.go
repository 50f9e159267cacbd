package egresstest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// refusedBecause expects that a connection is refused under the rule, with no
// dial, and that the reason names the address.
func (j *job) refusedBecause(name string, port uint16, address string) error {
	if err := isReset(j.connect(name, port)); err != nil {
		return fmt.Errorf("%s at %s: %w", name, address, err)
	}
	_, err := j.ledger.await(name+" refused", func(l egress.Line) bool {
		return l.Verdict == egress.Refused && l.Name == name && l.Rule != "" && strings.Contains(l.Reason, address)
	})
	if err != nil {
		return err
	}
	if dialled, _ := j.outside.seen(); len(dialled) > 0 {
		return fmt.Errorf("%s at %s: dialled %v", name, address, dialled)
	}
	return nil
}

func publicOnly(b *bench) error {
	private := map[string]string{
		"loopback.example": "127.0.0.1", "loopback6.example": "::1", "private.example": "10.1.2.3",
		"private6.example": "fd12::1", "link.example": "169.254.1.1", "link6.example": "fe80::1",
		"cgnat.example": "100.64.0.1", "mapped.example": "::ffff:192.168.0.1", "nat64.example": "64:ff9b::a00:1",
		"none.example": "0.0.0.0", "many.example": "224.0.0.1",
	}
	var rules []egress.Rule
	for name, address := range private {
		b.outside.name(name, address)
		if err := b.serve(netip.AddrPortFrom(netip.MustParseAddr(address).Unmap(), 7).String(), echoServer); err != nil {
			return err
		}
		rules = append(rules, rule(name, 7, egress.TCP))
	}
	j, err := b.start("job-1", rules...)
	if err != nil {
		return err
	}
	for name, address := range private {
		if err := j.refusedBecause(name, 7, netip.MustParseAddr(address).Unmap().String()); err != nil {
			return err
		}
	}
	return nil
}

func pinned(b *bench) error {
	r, err := b.world()
	if err != nil {
		return err
	}
	b.outside.name("echo.example", "10.0.0.1", public) // one of them will do
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	conn, err := j.connect("echo.example", 7)
	if err != nil {
		return err
	}
	if err := echo(conn); err != nil {
		return err
	}
	dialled, lookups := b.outside.seen()
	if !slices.Equal(dialled, []string{public + ":7"}) || len(lookups) != 1 {
		return fmt.Errorf("looked up %v, dialled %v; want one lookup and %s:7", lookups, dialled, public)
	}
	return nil
}

func resolveAddress(b *bench) error {
	if err := b.serve("10.9.8.7:7", echoServer); err != nil {
		return err
	}
	j, err := b.start("job-1", rule("intern.example", 7, egress.TCP, "10.9.8.7/32"))
	if err != nil {
		return err
	}
	conn, err := j.connect("intern.example", 7)
	if err != nil {
		return err
	}
	if err := echo(conn); err != nil {
		return err
	}
	if dialled, lookups := b.outside.seen(); !slices.Equal(dialled, []string{"10.9.8.7:7"}) || len(lookups) > 0 {
		return fmt.Errorf("looked up %v, dialled %v; want no lookup and 10.9.8.7:7", lookups, dialled)
	}
	return nil
}

func resolvePrefix(b *bench) error {
	b.outside.name("intern.example", "10.1.0.1", "10.9.0.1")
	b.outside.name("moved.example", public)
	if err := b.serve("10.9.0.1:7", echoServer); err != nil {
		return err
	}
	if err := b.serve("10.1.0.1:7", echoServer); err != nil {
		return err
	}
	if err := b.serve(public+":7", echoServer); err != nil {
		return err
	}
	j, err := b.start("job-1", rule("intern.example", 7, egress.TCP, "10.9.0.0/16"), rule("moved.example", 7, egress.TCP, "10.9.0.0/16"))
	if err != nil {
		return err
	}
	if err := j.refusedBecause("moved.example", 7, public); err != nil {
		return err
	}
	conn, err := j.connect("intern.example", 7)
	if err != nil {
		return err
	}
	if err := echo(conn); err != nil {
		return err
	}
	if dialled, _ := b.outside.seen(); !slices.Equal(dialled, []string{"10.9.0.1:7"}) {
		return fmt.Errorf("dialled %v, want 10.9.0.1:7", dialled)
	}
	return nil
}

func metadata(b *bench) error {
	for i, address := range []string{
		"169.254.169.254", "169.254.170.2", "169.254.170.23", "100.100.100.200", "168.63.129.16", "fd00:ec2::254",
		"64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::1",
	} {
		a := netip.MustParseAddr(address)
		if err := b.serve(netip.AddrPortFrom(a, 80).String(), echoServer); err != nil {
			return err
		}
		name := fmt.Sprintf("metadata-%d.example", i)
		b.outside.name("wide-"+name, address)
		j, err := b.start(fmt.Sprintf("job-%d", i),
			rule(name, 80, egress.TCP, netip.PrefixFrom(a, a.BitLen()).String()),
			rule("wide-"+name, 80, egress.TCP, "0.0.0.0/0", "::/0"))
		if errors.Is(err, egress.ErrBadRules) {
			continue // refused even earlier
		}
		if err != nil {
			return err
		}
		for _, name := range []string{name, "wide-" + name} {
			if err := j.refusedBecause(name, 80, address); err != nil {
				return err
			}
		}
	}
	return nil
}

func ownListener(b *bench) error {
	own := Own()
	if err := b.serve(own.String(), echoServer); err != nil {
		return err
	}
	j, err := b.start("job-1", rule("agent.example", own.Port(), egress.TCP, "127.0.0.0/8", own.Addr().String()+"/32"))
	if err != nil {
		return err
	}
	return j.refusedBecause("agent.example", own.Port(), own.Addr().String())
}

func badRules(b *bench) error {
	for what, r := range map[string]egress.Rule{
		"no name":          rule("", 443, egress.TLS),
		"a pattern":        rule("*.example", 443, egress.TLS),
		"upper case":       rule("Echo.example", 443, egress.TLS),
		"a final dot":      rule("echo.example.", 443, egress.TLS),
		"a space":          rule("echo .example", 443, egress.TLS),
		"NUL":              rule("echo\x00.example", 443, egress.TLS),
		"no port":          rule("echo.example", 0, egress.TLS),
		"no protocol":      rule("echo.example", 443, ""),
		"unknown protocol": rule("echo.example", 443, "quic"),
		"an empty prefix":  {Name: "echo.example", Port: 443, Protocol: egress.TLS, Resolve: []netip.Prefix{{}}},
	} {
		o := egress.Opening{Rules: egress.Rules{Allow: []egress.Rule{rule("good.example", 443, egress.TLS), r}}, Ledger: b.newLedger().write}
		if err := b.gateway.Open(context.Background(), "job-1", o); !errors.Is(err, egress.ErrBadRules) {
			return fmt.Errorf("rules with %s: got %v, want ErrBadRules", what, err)
		}
	}
	two := []egress.Rule{rule("echo.example", 443, egress.TLS), rule("echo.example", 443, egress.TCP)}
	o := egress.Opening{Rules: egress.Rules{Allow: two}, Ledger: b.newLedger().write}
	if err := b.gateway.Open(context.Background(), "job-1", o); !errors.Is(err, egress.ErrBadRules) {
		return fmt.Errorf("rules that contradict each other: got %v, want ErrBadRules", err)
	}
	if err := b.gateway.Open(context.Background(), "job-1", egress.Opening{}); err == nil {
		return errors.New("an Open without a ledger succeeded")
	}
	return nil
}

func widened(b *bench) error {
	r, err := b.world()
	if err != nil {
		return err
	}
	b.outside.name("step.example", public)
	if err := b.serve(public+":8", echoServer); err != nil {
		return err
	}
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	if err := j.open("orphan", "nobody"); err == nil {
		return errors.New("an Open with a parent that is not open succeeded")
	}
	of := func(v egress.Verdict) func(egress.Line) bool {
		return func(l egress.Line) bool { return l.Gateway == "job-1-step-1" && l.Verdict == v }
	}
	if err := j.open("job-1-step-1", "job-1", rule("step.example", 8, egress.TCP)); err != nil {
		return err
	}
	steps, err := j.connect("step.example", 8)
	if err != nil {
		return err
	}
	if err := echo(steps); err != nil {
		return fmt.Errorf("while the step's rules are open: %w", err)
	}
	if _, err := j.ledger.await("of the step", of(egress.Allowed)); err != nil {
		return err
	}
	jobs, err := j.connect("echo.example", 7)
	if err != nil {
		return err
	}
	if err := errors.Join(echo(jobs), j.close("job-1-step-1")); err != nil {
		return err
	}
	if n := j.ledger.count(of(egress.Ended)); n != 1 {
		return fmt.Errorf("when Close returned there were %d last lines of the step's connection, want 1", n)
	}
	if err := isReset(steps, nil); err != nil {
		return fmt.Errorf("the step's connection after Close: %w", err)
	}
	if err := echo(jobs); err != nil {
		return fmt.Errorf("the job's connection after Close of the step: %w", err)
	}
	if a, err := j.ask("step.example", typeA); err != nil || len(a.addrs) > 0 {
		return fmt.Errorf("the step's name after Close: got %+v %v, want NXDOMAIN", a, err)
	}
	if err := isReset(j.dial(steps.RemoteAddr().(*net.TCPAddr).AddrPort())); err != nil {
		return fmt.Errorf("the step's virtual address after Close: %w", err)
	}
	return nil
}

func closeEnds(b *bench) error {
	r, err := b.world()
	if err != nil {
		return err
	}
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	conn, err := j.connect("echo.example", 7)
	if err != nil {
		return err
	}
	if err := errors.Join(echo(conn), j.close("job-1")); err != nil {
		return err
	}
	if n := j.ledger.count(is(egress.Ended)); n != 1 {
		return fmt.Errorf("when Close returned there were %d last lines, want 1", n)
	}
	if err := isReset(conn, nil); err != nil {
		return err
	}
	if later, err := j.dial(conn.RemoteAddr().(*net.TCPAddr).AddrPort()); err == nil {
		if _, err := io.ReadAll(later); err == nil {
			return errors.New("a connection after Close was served")
		}
	}
	return nil
}

func closeAbsent(b *bench) error {
	j, err := b.start("job-1")
	if err != nil {
		return err
	}
	for _, name := range []string{"never-open", "job-1", "job-1"} {
		if err := j.close(name); err != nil {
			return err
		}
	}
	return nil
}

func apart(b *bench) error {
	r, err := b.world()
	if err != nil {
		return err
	}
	one, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	two, err := b.start("job-2", rule("other.example", 7, egress.TCP))
	if err != nil {
		return err
	}
	if a, err := two.ask("echo.example", typeA); err != nil || len(a.addrs) > 0 {
		return fmt.Errorf("a name of job-1 in the box of job-2: got %+v %v, want NXDOMAIN", a, err)
	}
	if n := one.ledger.count(func(egress.Line) bool { return true }); n != 0 {
		return fmt.Errorf("job-1 has %d lines of what job-2 did", n)
	}
	conn, err := one.connect("echo.example", 7)
	if err != nil {
		return err
	}
	if err := errors.Join(two.close("job-2"), echo(conn)); err != nil {
		return fmt.Errorf("job-1 after the end of job-2: %w", err)
	}
	return nil
}
