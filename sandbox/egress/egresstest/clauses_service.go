package egresstest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

func serviceClauses() []clause {
	return []clause{
		{"services of one port are told apart by name", serviceNames},
		{"a service is its own job's alone", serviceApart},
		{"a published port leads to its service", publishedPort},
		{"Probe says whether a port answers", probe},
		{"a rule for a service that is not there is refused", badService},
	}
}

// ofService is a rule for every port of a service.
func ofService(name, gateway string) egress.Rule {
	return egress.Rule{ID: "policy:" + name, Name: name, Protocol: egress.TCP, Service: gateway}
}

const servicePort = 5432

// server starts a service: a box in which somebody says its name and then what
// he is told.
func (b *bench) server(name string) (*job, error) {
	j, err := b.start(name)
	if err != nil {
		return nil, err
	}
	return j, j.listen(servicePort)
}

// listen serves a port of the box's own loopback.
func (j *job) listen(port uint16) error {
	l, err := j.net.Listen("tcp", netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port).String())
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(2 * j.patience))
				if _, err := fmt.Fprintln(conn, j.name); err == nil {
					echoServer(conn)
				}
			})
		}
	})
	j.tb.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return nil
}

// meets expects a service of that name at the other end.
func meets(conn net.Conn, name string) error {
	got := make([]byte, len(name)+1)
	if _, err := readFull(conn, got); err != nil {
		return fmt.Errorf("read of a service's name: %w", err)
	}
	if string(got) != name+"\n" {
		return fmt.Errorf("met the service %q, want %s", got, name)
	}
	return echo(conn)
}

func serviceNames(b *bench) error {
	for _, name := range []string{"job-1-s0", "job-1-s1"} {
		if _, err := b.server(name); err != nil {
			return err
		}
	}
	j, err := b.start("job-1", ofService("first", "job-1-s0"), ofService("the_second", "job-1-s1"))
	if err != nil {
		return err
	}
	for name, service := range map[string]string{"first": "job-1-s0", "the_second": "job-1-s1"} {
		conn, err := j.connect(name, servicePort)
		if err != nil {
			return err
		}
		if err := meets(conn, service); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		conn.Close()
		end, err := j.ledger.await("ended "+name, func(l egress.Line) bool { return l.Verdict == egress.Ended && l.Name == name })
		if err != nil {
			return err
		}
		if end.Port != servicePort || end.Rule != "policy:"+name || end.Sent == 0 || end.Received == 0 || end.Dialled == "" || end.Gateway != "job-1" {
			return fmt.Errorf("line of a connection to a service: got %+v", end)
		}
	}
	conn, err := j.connect("first", servicePort+1)
	if err := isReset(conn, err); err != nil {
		return fmt.Errorf("a port of a service on which nobody listens: %w", err)
	}
	if _, err := j.ledger.await("failed", is(egress.Failed)); err != nil {
		return err
	}
	if dialled, lookups := b.outside.seen(); len(dialled)+len(lookups) > 0 {
		return fmt.Errorf("a service was looked for outside: %v %v", dialled, lookups)
	}
	return nil
}

func serviceApart(b *bench) error {
	s, err := b.server("job-1-s0")
	if err != nil {
		return err
	}
	j, err := b.start("job-1", ofService("db", "job-1-s0"))
	if err != nil {
		return err
	}
	if err := j.listen(servicePort); err != nil {
		return err
	}
	conn, err := j.connect("db", servicePort)
	if err != nil {
		return err
	}
	if err := meets(conn, "job-1-s0"); err != nil { // the attack's control
		return err
	}
	addr := conn.RemoteAddr().(*net.TCPAddr).AddrPort()
	other, err := b.start("job-2")
	if err != nil {
		return err
	}
	for who, stranger := range map[string]*job{"another job": other, "the service": s} {
		a, err := stranger.ask("db", typeA)
		if err != nil {
			return err
		}
		if a.code != dnsmessage.RCodeNameError {
			return fmt.Errorf("%s asks for the name: got %+v, want NXDOMAIN", who, a)
		}
		conn, err := stranger.dial(addr)
		if err := isReset(conn, err); err != nil {
			return fmt.Errorf("%s connects to the job's virtual address: %w", who, err)
		}
	}
	if err := j.close("job-1-s0"); err != nil {
		return err
	}
	conn, err = j.connect("db", servicePort)
	if err := isReset(conn, err); err != nil {
		return fmt.Errorf("a service that is closed: %w", err)
	}
	return nil
}

func publishedPort(b *bench) error {
	if _, err := b.server("job-1-s0"); err != nil {
		return err
	}
	j := &job{bench: b, name: "job-1", net: b.subject.Net(b.tb), ledger: b.newLedger()}
	r := ofService("db", "job-1-s0")
	r.Port = servicePort
	err := b.gateway.Open(context.Background(), "job-1", egress.Opening{
		Ledger: j.ledger.write, Publish: []egress.Published{{Port: 15432, Rule: r}},
	})
	if err == nil {
		b.tb.Cleanup(func() { j.close("job-1") })
		err = j.attach()
	}
	if err != nil {
		return err
	}
	for _, host := range []string{"127.0.0.1", "::1"} {
		to := netip.AddrPortFrom(netip.MustParseAddr(host), 15432)
		conn, err := j.dial(to)
		if err == nil {
			err = meets(conn, "job-1-s0")
		}
		if err != nil {
			return fmt.Errorf("published port: %v: %w", to, err)
		}
		conn.Close()
	}
	end, err := j.ledger.await("ended", is(egress.Ended))
	if err != nil {
		return err
	}
	if end.Name != "db" || end.Port != servicePort || end.Rule != r.ID || end.Sent == 0 {
		return fmt.Errorf("line of a published port: got %+v", end)
	}
	for _, port := range []uint16{servicePort, 15433} {
		if _, err := j.dial(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)); !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("port %d of localhost, which is not published: got %v, want a refusal", port, err)
		}
	}
	if err := j.close("job-1"); err != nil {
		return err
	}
	if _, err := j.dial(netip.MustParseAddrPort("127.0.0.1:15432")); !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("a published port after Close: got %v, want a refusal", err)
	}
	return nil
}

func probe(b *bench) error {
	ctx, cancel := context.WithTimeout(context.Background(), b.patience)
	defer cancel()
	j, err := b.start("job-1-s0")
	if err != nil {
		return err
	}
	if err := b.gateway.Probe(ctx, "job-1-s0", servicePort); err == nil {
		return errors.New("a port on which nobody listens: Probe has no error")
	}
	if err := b.gateway.Probe(ctx, "never-open", servicePort); err == nil {
		return errors.New("an absent name: Probe has no error")
	}
	if err := j.listen(servicePort); err != nil {
		return err
	}
	if err := b.gateway.Probe(ctx, "job-1-s0", servicePort); err != nil {
		return fmt.Errorf("a port that answers: Probe: %w", err)
	}
	if n := j.ledger.count(func(egress.Line) bool { return true }); n > 0 {
		return fmt.Errorf("%d lines are about Probe, want only such about what a job does", n)
	}
	return nil
}

func badService(b *bench) error {
	j, err := b.server("job-1-s0")
	if err != nil {
		return err
	}
	if err := j.open("job-1-s1", ""); err != nil { // and not attached
		return err
	}
	good := ofService("db", "job-1-s0")
	good.Port = servicePort
	change := func(f func(*egress.Rule)) egress.Rule {
		r := good
		f(&r)
		return r
	}
	publish := func(r egress.Rule, port uint16, parent string) egress.Opening {
		return egress.Opening{Publish: []egress.Published{{Port: port, Rule: r}}, Parent: parent}
	}
	for what, o := range map[string]egress.Opening{
		"a service that is not open":     {Rules: egress.Rules{Allow: []egress.Rule{ofService("db", "job-9-s0")}}},
		"a service without a box":        {Rules: egress.Rules{Allow: []egress.Rule{ofService("db", "job-1-s1")}}},
		"a service by http":              {Rules: egress.Rules{Allow: []egress.Rule{change(func(r *egress.Rule) { r.Protocol = egress.HTTP })}}},
		"a service that is resolved":     {Rules: egress.Rules{Allow: []egress.Rule{change(func(r *egress.Rule) { r.Resolve = rule("x", 1, egress.TCP, "10.0.0.0/8").Resolve })}}},
		"a name inside and outside":      {Rules: egress.Rules{Allow: []egress.Rule{good, rule("db", 80, egress.TCP)}}},
		"a published port of no service": publish(rule("echo.example", 7, egress.TCP), 7, ""),
		"a published port of no number":  publish(good, 0, ""),
		"a published port of every port": publish(ofService("db", "job-1-s0"), 15432, ""),
		"a published port of a step":     publish(good, 15432, "job-1-s0"),
		"the gateway's own port":         publish(good, 65353, ""),
	} {
		o.Ledger = j.ledger.write
		if err := b.gateway.Open(context.Background(), "job-1", o); !errors.Is(err, egress.ErrBadRules) {
			return fmt.Errorf("%s: got %v, want ErrBadRules", what, errors.Join(err, j.close("job-1")))
		}
	}
	return nil
}
