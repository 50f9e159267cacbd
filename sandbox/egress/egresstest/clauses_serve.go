package egresstest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

func serveClauses() []clause {
	return []clause{
		{"a served name is answered in its box, with two lines", served},
		{"a served name goes with what opened it", servedWithdrawn},
		{"a served name is opened by no rule", servedAlone},
	}
}

const servedName = "word." + egress.Reserved

// serving has a name that says a word, until job-1-step-1 is closed.
func (b *bench) serving() (*job, error) {
	j, err := b.start("job-1")
	if err != nil {
		return nil, err
	}
	o := egress.Opening{Ledger: j.ledger.write, Parent: "job-1", Serve: []egress.Served{{
		Rule: egress.Rule{ID: "policy:served", Name: servedName, Port: 80, Protocol: egress.HTTP},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusAccepted)
			_, _ = io.WriteString(w, "word of "+r.Host)
		}),
	}}}
	if err := j.gateway.Open(context.Background(), "job-1-step-1", o); err != nil {
		return nil, fmt.Errorf("a served name: %w", err)
	}
	b.tb.Cleanup(func() { j.close("job-1-step-1") })
	return j, nil
}

// word asks for it.
func (j *job) word() error {
	conn, err := j.connect(servedName, 80)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", servedName); err != nil {
		return err
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && (res.StatusCode != http.StatusAccepted || string(body) != "word of "+servedName) {
		err = fmt.Errorf("got %d %q", res.StatusCode, body)
	}
	return err
}

func served(b *bench) error {
	j, err := b.serving()
	if err != nil {
		return err
	}
	if err := j.word(); err != nil {
		return fmt.Errorf("a served name: %w", err)
	}
	if _, err := j.ledger.await("allowed", is(egress.Allowed)); err != nil {
		return err
	}
	end, err := j.ledger.await("ended", is(egress.Ended))
	if err != nil {
		return err
	}
	if end.Name != servedName || end.Rule != "policy:served" || end.Request.Status != http.StatusAccepted || end.Gateway != "job-1-step-1" || end.Dialled != "" {
		return fmt.Errorf("line of a served name: got %+v", end)
	}
	if dialled, lookups := b.outside.seen(); len(dialled)+len(lookups) > 0 {
		return fmt.Errorf("a served name was looked for outside: %v %v", dialled, lookups)
	}
	other, err := b.start("job-2")
	if err != nil {
		return err
	}
	return other.unknown(servedName)
}

// unknown wants a name not to be there.
func (j *job) unknown(name string) error {
	a, err := j.ask(name, typeA)
	if err == nil && a.code != dnsmessage.RCodeNameError {
		err = fmt.Errorf("%s asks for %s: got %+v, want NXDOMAIN", j.name, name, a)
	}
	return err
}

func servedWithdrawn(b *bench) error {
	j, err := b.serving()
	if err != nil {
		return err
	}
	if err := j.word(); err != nil { // the attack's control
		return err
	}
	if err := j.close("job-1-step-1"); err != nil {
		return err
	}
	if err := j.word(); err == nil {
		return errors.New("a served name answers after Close")
	}
	return j.unknown(servedName)
}

func servedAlone(b *bench) error {
	j, err := b.start("job-1")
	if err != nil {
		return err
	}
	for _, name := range []string{servedName, "*." + egress.Reserved, egress.Reserved} {
		r := egress.Rule{ID: "policy:rule", Name: name, Port: 80, Protocol: egress.HTTP}
		if err := j.open("job-1-step-1", "job-1", r); !errors.Is(err, egress.ErrBadRules) {
			return fmt.Errorf("a rule for %s: got %w, want ErrBadRules", name, err)
		}
	}
	return nil
}
