package egresstest

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

func httpsClauses() []clause {
	return []clause{
		{"https: requests pass under the job's authority, each with two lines", terminated},
		{"https: server name and host are the rule's, of each request", oneName},
		{"https: the destination owns its name", ownsName},
		{"an authority is one job's, for its names and its time", oneAuthority},
		{"a child terminates only what the authority was made for", childTerminates},
		{"requests: what none of them allows does not arrive", narrowed},
		{"requests: a child's rules are for its requests alone", childRequests},
		{"requests: bounds hold", bounded},
		{"an upgrade passes only where the rule says", upgraded},
		{"no line holds a path that may be secret, or a query", discreet},
		{"a wildcard spans one label", oneLabel},
		{"inject: the destination gets the credential, and the box never has it", injects},
		{"inject: a placeholder elsewhere is refused, also when its rule is gone", tripwires},
	}
}

func terminated(b *bench) error {
	r, _, err := b.secured()
	if err != nil {
		return err
	}
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	for _, h2 := range []bool{false, true} {
		c, err := j.client("web.example", "web.example", h2)
		if err != nil {
			return err
		}
		status, text, err := c.do("POST", "https://web.example/a", "", strings.NewReader("body"))
		want := map[bool]string{false: "HTTP/1.1", true: "HTTP/2.0"}[h2]
		if err != nil || status != 200 || !strings.HasPrefix(text, "host web.example HTTP/") || !strings.HasSuffix(text, "/a 4") {
			return fmt.Errorf("request over %s: got %d %q %v", want, status, text, err)
		}
		for range 2 {
			if status, text, err = c.do("POST", "https://web.example"+once, "", strings.NewReader("body")); err != nil || status != 200 {
				return fmt.Errorf("request over %s to a server that hangs up after each: got %d %q %v", want, status, text, err)
			}
		}
	}
	end, err := j.ledger.await("ended", is(egress.Ended))
	if err != nil {
		return err
	}
	start, err := j.ledger.await("allowed", is(egress.Allowed))
	if err != nil {
		return err
	}
	want := egress.Line{
		Time: start.Time, Gateway: "job-1", Network: "tcp", Name: "web.example", Port: 443, Protocol: egress.HTTPS, Verdict: egress.Allowed,
		Rule: r.ID, Dialled: start.Dialled, Process: start.Process, Request: egress.Exchange{Method: "POST", Path: "/a"},
	}
	if start != want || start.Dialled == "" {
		return fmt.Errorf("line: got %+v, want %+v with Dialled", start, want)
	}
	if end.Sent != 4 || end.Received == 0 || end.Request.Status != 200 || end.Reason != "" {
		return fmt.Errorf("last line: got %+v, want 4 bytes sent, some received, status 200 and no reason", end)
	}
	return nil
}

func oneName(b *bench) error {
	r, _, err := b.secured()
	if err != nil {
		return err
	}
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	for _, h2 := range []bool{false, true} {
		front, err := j.client("web.example", "other.example", h2)
		if err != nil {
			return err
		}
		if status, text, err := front.do("GET", "https://web.example/", "", nil); err == nil {
			return fmt.Errorf("a ClientHello for another name: got %d %q", status, text)
		}
		c, err := j.client("web.example", "web.example", h2)
		if err != nil {
			return err
		}
		if status, text, err := c.do("GET", "https://web.example/", "", nil); err != nil || status != 200 {
			return fmt.Errorf("a request for the rule's name: got %d %q %v", status, text, err)
		}
		for _, host := range []string{"other.example", "web.example.", "web.example:444", "web.example.other.example", "x@web.example"} {
			// On the same connection, where the client kept it.
			if status, text, err := c.do("GET", "https://web.example/", host, nil); err == nil && strings.HasPrefix(text, "host ") {
				return fmt.Errorf("a request for host %s (HTTP/2: %v): got %d %q", host, h2, status, text)
			}
		}
	}
	if err := j.close("job-1"); err != nil {
		return err
	}
	if n := j.ledger.count(is(egress.Allowed)); n != 2 {
		return fmt.Errorf("got %d lines of allowed requests, want 2", n)
	}
	if n := j.ledger.count(on("tcp", egress.Refused)); n != 12 {
		return fmt.Errorf("got %d lines of refused ones, want 12", n)
	}
	return nil
}

func ownsName(b *bench) error {
	r, n, err := b.secured()
	if err != nil {
		return err
	}
	stranger, err := newNotary()
	if err != nil {
		return err
	}
	other, unknown := r, r
	other.Name, unknown.Name = "other.example", "unknown.example"
	b.outside.name("other.example", "93.184.216.35")
	b.outside.name("unknown.example", "93.184.216.36")
	err = errors.Join(b.secure(n, "93.184.216.35:443", "web.example"), b.secure(stranger, "93.184.216.36:443", "unknown.example"))
	if err != nil {
		return err
	}
	j, err := b.start("job-1", r, other, unknown)
	if err != nil {
		return err
	}
	for _, name := range []string{"other.example", "unknown.example"} {
		c, err := j.client(name, name, true)
		if err != nil {
			return err
		}
		if status, text, err := c.do("GET", "https://"+name+"/", "", nil); err == nil {
			return fmt.Errorf("%s, whose certificate is not its own: got %d %q", name, status, text)
		}
		_, err = j.ledger.await("failed", func(l egress.Line) bool {
			return l.Name == name && l.Verdict == egress.Failed && l.Reason != ""
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func oneAuthority(b *bench) error {
	r, _, err := b.secured()
	if err != nil {
		return err
	}
	plain, err := b.start("job-2", rule("web.example", 443, egress.TLS))
	if err != nil {
		return err
	}
	if _, text, err := plain.authority(); err != nil || text != nil {
		return fmt.Errorf("authority of a job without https rules: got %q %v, want none", text, err)
	}
	j, err := b.start("job-1", r)
	if err != nil {
		return err
	}
	_, first, err := j.authority()
	if err != nil {
		return err
	}
	if _, again, err := j.authority(); err != nil || string(again) != string(first) || len(first) == 0 {
		return fmt.Errorf("authority: got %q and then %q %v, want the same", first, again, err)
	}
	expires := time.Now().Add(time.Hour)
	third := &job{bench: b, name: "job-3", net: b.subject.Net(b.tb), ledger: b.newLedger()}
	err = b.gateway.Open(context.Background(), "job-3", egress.Opening{
		Rules: egress.Rules{Allow: []egress.Rule{r}}, Ledger: third.ledger.write, Expires: expires,
	})
	if err != nil {
		return err
	}
	b.tb.Cleanup(func() { third.close("job-3") })
	if err := third.attach(); err != nil {
		return err
	}
	return errors.Join(chain(third, expires), apartFrom(third, j))
}

// chain looks at the certificates that the gateway shows to a job.
func chain(j *job, expires time.Time) error {
	pool, _, err := j.authority()
	if err != nil {
		return err
	}
	raw, err := j.connect("web.example", 443)
	if err != nil {
		return err
	}
	conn := tls.Client(raw, &tls.Config{RootCAs: pool, ServerName: "web.example"})
	if err := conn.Handshake(); err != nil {
		return err
	}
	for _, chain := range conn.ConnectionState().VerifiedChains {
		for _, c := range chain {
			switch {
			case c.NotAfter.After(expires):
				return fmt.Errorf("certificate %v is valid until %v, the box until %v", c.Subject, c.NotAfter, expires)
			case c.IsCA && (!c.PermittedDNSDomainsCritical || strings.Join(c.PermittedDNSDomains, " ") != "web.example" || len(c.ExcludedIPRanges) != 2):
				return fmt.Errorf("authority %v may sign for %q and addresses but %v", c.Subject, c.PermittedDNSDomains, c.ExcludedIPRanges)
			}
		}
	}
	return nil
}

// apartFrom expects that one job does not trust another's authority.
func apartFrom(j, other *job) error {
	pool, _, err := other.authority()
	if err != nil {
		return err
	}
	raw, err := j.connect("web.example", 443)
	if err != nil {
		return err
	}
	if err := tls.Client(raw, &tls.Config{RootCAs: pool, ServerName: "web.example"}).Handshake(); err == nil {
		return errors.New("the authority of one job signs for another job")
	}
	return nil
}

func childTerminates(b *bench) error {
	r, _, err := b.secured()
	if err != nil {
		return err
	}
	j := &job{bench: b, name: "job-1", net: b.subject.Net(b.tb), ledger: b.newLedger()}
	o := egress.Opening{Ledger: j.ledger.write, Terminate: []string{"web.example"}}
	if err := b.gateway.Open(context.Background(), "job-1", o); err != nil {
		return err
	}
	b.tb.Cleanup(func() { j.close("job-1") })
	if err := j.attach(); err != nil {
		return err
	}
	late := r
	late.Name = "late.example"
	o = egress.Opening{Ledger: j.ledger.write, Parent: "job-1", Rules: egress.Rules{Allow: []egress.Rule{late}}}
	if err := b.gateway.Open(context.Background(), "job-1-step-0", o); !errors.Is(err, egress.ErrBadRules) {
		return fmt.Errorf("a child's https rule for a name that was not announced: got %v, want ErrBadRules", err)
	}
	if err := j.open("job-1-step-1", "job-1", r); err != nil {
		return err
	}
	c, err := j.client("web.example", "web.example", true)
	if err != nil {
		return err
	}
	if status, text, err := c.do("GET", "https://web.example/", "", nil); err != nil || status != 200 {
		return fmt.Errorf("a child's request: got %d %q %v", status, text, err)
	}
	return nil
}
