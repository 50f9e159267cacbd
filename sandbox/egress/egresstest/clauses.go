package egresstest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// clauses are the contract, sentence by sentence.
func clauses() []clause {
	return append(slices.Concat(serviceClauses(), httpsClauses(), loginClauses(), serveClauses()), []clause{
		{"empty rules allow nothing", emptyRules},
		{"an allowed name is reached, with two lines", allowed},
		{"a line names the process in the box, or says why not", named},
		{"nothing moves before its line is written", lineFirst},
		{"an attempt whose line fails is refused", ledgerFails},
		{"nothing flows before Attach", beforeAttach},
		{"a rule is for one port", otherPort},
		{"names have data of type A only", questions},
		{"a connection to no name is refused", noName},
		{"a refused packet has a line", refusedPacket},
		{"an unreachable destination is Failed and reset", unreachable},
		{"half-close passes both ways", halfClose},
		{"tls: the server name is the rule's", serverName},
		{"http: the host of each request is the rule's", hostName},
		{"a name resolves to public addresses only", publicOnly},
		{"the address that was judged is dialled", pinned},
		{"resolve: addresses are used without a lookup", resolveAddress},
		{"resolve: prefixes filter the lookup", resolvePrefix},
		{"metadata addresses are never dialled", metadata},
		{"the agent's listeners are never dialled", ownListener},
		{"rules that cannot be enforced are refused", badRules},
		{"a name is open once", openOnce},
		{"a parent's box is widened until Close", widened},
		{"Close ends connections after their last line", closeEnds},
		{"Close of an absent name succeeds", closeAbsent},
		{"boxes do not share names", apart},
	}...)
}

// rule is a rule with an ID of its own.
func rule(name string, port uint16, p egress.Protocol, resolve ...string) egress.Rule {
	r := egress.Rule{ID: fmt.Sprintf("policy:%s:%d", name, port), Name: name, Port: port, Protocol: p}
	for _, s := range resolve {
		r.Resolve = append(r.Resolve, netip.MustParsePrefix(s))
	}
	return r
}

// world makes one name with an echo server at port 7.
func (b *bench) world() (egress.Rule, error) {
	b.outside.name("echo.example", public)
	return rule("echo.example", 7, egress.TCP), b.serve(public+":7", echoServer)
}

func emptyRules(b *bench) error {
	b.outside.name("echo.example", public)
	j, err := b.start("job-1")
	if err != nil {
		return err
	}
	a, err := j.ask("echo.example", typeA)
	if err != nil {
		return err
	}
	if a.code != dnsmessage.RCodeNameError {
		return fmt.Errorf("DNS question: got %+v, want NXDOMAIN", a)
	}
	l, err := j.ledger.await("dns refused", on("dns", egress.Refused))
	if err != nil {
		return err
	}
	if l.Name != "echo.example" || l.Reason == "" || l.Gateway != "job-1" || l.Time.IsZero() {
		return fmt.Errorf("line of a refused question: got %+v, want name, reason, gateway and time", l)
	}
	if _, lookups := b.outside.seen(); len(lookups) > 0 {
		return fmt.Errorf("a job's question was passed on: %v", lookups)
	}
	return nil
}

func allowed(b *bench) error {
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
	if to := conn.RemoteAddr().(*net.TCPAddr).AddrPort(); !egress.Virtual.Contains(to.Addr()) {
		return fmt.Errorf("the name resolved to %v in the box, want an address in %v", to, egress.Virtual)
	}
	if err := echo(conn); err != nil {
		return err
	}
	conn.Close()
	end, err := j.ledger.await("ended", is(egress.Ended))
	if err != nil {
		return err
	}
	start, err := j.ledger.await("allowed", is(egress.Allowed))
	if err != nil {
		return err
	}
	want := egress.Line{
		Time: start.Time, Gateway: "job-1", Network: "tcp", Name: "echo.example", Port: 7,
		Protocol: egress.TCP, Verdict: egress.Allowed, Rule: r.ID, Dialled: start.Dialled, Process: start.Process,
	}
	if start != want || start.Dialled == "" || start.Time.IsZero() {
		return fmt.Errorf("line: got %+v, want %+v with time and Dialled", start, want)
	}
	if end.Sent != 4 || end.Received != 4 || end.Duration <= 0 || end.Rule != r.ID || end.Reason != "" {
		return fmt.Errorf("last line: got %+v, want 4 bytes each way, a duration and no reason", end)
	}
	if n := j.ledger.count(func(egress.Line) bool { return true }); n != 2 {
		return fmt.Errorf("got %d lines, want 2", n)
	}
	return nil
}

func named(b *bench) error {
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
	defer conn.Close()
	if err := echo(conn); err != nil {
		return err
	}
	start, err := j.ledger.await("allowed", is(egress.Allowed))
	if err != nil {
		return err
	}
	if p := start.Process; (p.PID <= 0 || p.Executable == "") && p.Unknown == "" {
		return fmt.Errorf("line: got process %+v, want one, or why it is not known", p)
	}
	return nil
}

func lineFirst(b *bench) error {
	got := make(chan struct{}, 1)
	b.outside.name("sink.example", public)
	err := b.serve(public+":9", func(conn net.Conn) {
		if n, _ := conn.Read(make([]byte, 1)); n > 0 {
			got <- struct{}{}
		}
	})
	if err != nil {
		return err
	}
	j, err := b.start("job-1", rule("sink.example", 9, egress.TCP))
	if err != nil {
		return err
	}
	gate := make(chan struct{})
	j.ledger.mu.Lock()
	j.ledger.gate = gate
	j.ledger.mu.Unlock()
	conn, err := j.connect("sink.example", 9)
	if err == nil {
		_, err = conn.Write([]byte("x"))
	}
	select {
	case <-got:
		err = errors.Join(err, errors.New("a byte reached the destination while the ledger had not taken the line"))
	case <-time.After(200 * time.Millisecond): // long for loopback
	}
	close(gate)
	if err != nil {
		return err
	}
	select {
	case <-got:
		return nil
	case <-time.After(b.patience):
		return errors.New("the byte did not arrive after the ledger took the line")
	}
}

func ledgerFails(b *bench) error {
	r, err := b.world()
	if err != nil {
		return err
	}
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	j.ledger.mu.Lock()
	j.ledger.fail = errors.New("disk full")
	j.ledger.mu.Unlock()
	return isReset(j.connect("echo.example", 7))
}

func beforeAttach(b *bench) error {
	r, err := b.world()
	if err != nil {
		return err
	}
	j := &job{bench: b, name: "job-1", net: b.subject.Net(b.tb), ledger: b.newLedger()}
	if err := j.open("job-1", "", r); err != nil {
		return err
	}
	conn, err := j.dial(netip.AddrPortFrom(egress.Virtual.Addr().Next(), 7))
	if err != nil {
		return fmt.Errorf("connect before Attach, which the kernel takes: %w", err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		return err
	}
	if n, err := conn.Read(make([]byte, 1)); n > 0 || err == io.EOF {
		return fmt.Errorf("read before Attach: got %d bytes and %v, want nothing", n, err)
	}
	if dialled, _ := b.outside.seen(); len(dialled) > 0 {
		return fmt.Errorf("dialled %v before Attach", dialled)
	}
	return j.attach()
}

func otherPort(b *bench) error {
	r, err := b.world()
	if err != nil {
		return err
	}
	if err := b.serve(public+":8", echoServer); err != nil {
		return err
	}
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	if err := isReset(j.connect("echo.example", 8)); err != nil {
		return err
	}
	l, err := j.ledger.await("tcp refused", on("tcp", egress.Refused))
	if err != nil {
		return err
	}
	if l.Name != "echo.example" || l.Port != 8 || l.Rule != "" || l.Suggest() == "" {
		return fmt.Errorf("line: got %+v, want name, port, no rule and a suggestion", l)
	}
	return nil
}

func questions(b *bench) error {
	r, err := b.world()
	if err != nil {
		return err
	}
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	for _, kind := range []dnsmessage.Type{typeAAAA, typeHTTPS, typeTXT} {
		if a, err := j.ask("echo.example", kind); err != nil || a.code != dnsmessage.RCodeSuccess || len(a.addrs) > 0 {
			return fmt.Errorf("question %v for an allowed name: got %+v %v, want no data", kind, a, err)
		}
	}
	for _, name := range []string{"other.example", "sub.echo.example", "example", "echo.example.evil", "under_score.example"} {
		if a, err := j.ask(name, typeA); err != nil || a.code != dnsmessage.RCodeNameError {
			return fmt.Errorf("question for %s: got %+v %v, want NXDOMAIN", name, a, err)
		}
	}
	if a, err := j.ask("eChO.eXample", typeA); err != nil || len(a.addrs) != 1 {
		return fmt.Errorf("question in mixed case: got %+v %v, want an address", a, err)
	}
	if n := j.ledger.count(on("dns", egress.Refused)); n != 5 {
		return fmt.Errorf("got %d lines about questions, want one for each of 5 names", n)
	}
	return nil
}

func noName(b *bench) error {
	r, err := b.world()
	if err != nil {
		return err
	}
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	if err := isReset(j.dial(netip.MustParseAddrPort("198.19.200.200:7"))); err != nil {
		return err
	}
	_, err = j.ledger.await("about the address", func(l egress.Line) bool {
		return l.Verdict == egress.Refused && l.Address == "198.19.200.200" && l.Port == 7 && l.Reason != ""
	})
	return err
}

func refusedPacket(b *bench) error {
	j, err := b.start("job-1")
	if err != nil {
		return err
	}
	if conn, err := j.dial(netip.MustParseAddrPort("192.168.7.7:443")); err == nil {
		return fmt.Errorf("connect to an address: got %v, want a refusal", conn.RemoteAddr())
	}
	udp, err := j.net.Dial("udp", "192.168.7.8:123")
	if err != nil {
		return err
	}
	defer udp.Close()
	if _, err := udp.Write([]byte("x")); err != nil {
		return err
	}
	for _, want := range []egress.Line{
		{Network: "tcp", Address: "192.168.7.7", Port: 443}, {Network: "udp", Address: "192.168.7.8", Port: 123},
	} {
		_, err := j.ledger.await("about "+want.Address, func(l egress.Line) bool {
			return l.Network == want.Network && l.Address == want.Address && l.Port == want.Port && l.Verdict == egress.Refused && l.Reason != ""
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func openOnce(b *bench) error {
	j, err := b.start("job-1")
	if err != nil {
		return err
	}
	o := egress.Opening{Ledger: j.ledger.write}
	if err := b.gateway.Open(context.Background(), "job-1", o); err == nil {
		return errors.New("an Open of a name in use succeeded")
	}
	if err := j.close("job-1"); err != nil {
		return err
	}
	return j.open("job-1", "")
}
