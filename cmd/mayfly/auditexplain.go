package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/mayfly-ci/mayfly/runner/audit"
)

// An explained is one lease, from mint to receipt, as the record has it.
type explained struct {
	Lease   string            `json:"lease"`
	Job     string            `json:"job"`
	Facts   map[string]string `json:"facts"`   // of job.admit: whose job, rule, policy
	Request audit.Event       `json:"request"` // issuer, step, scope, delivery
	Issued  *audit.Event      `json:"issued,omitempty"`
	Uses    []audit.Event     `json:"uses,omitempty"` // lines of the ledger with it
	Ends    []audit.Event     `json:"ends,omitempty"` // attempts to revoke, and receipts
}

// explainAudit is "mayfly audit explain": a lease by its name, or all of a job.
func (c *call) explainAudit(o *options, dir, expect, name string) error {
	s, err := verified(dir, expect)
	if err != nil {
		return err
	}
	job, _, _ := strings.Cut(name, "-l-")
	var facts map[string]string
	var all []*explained
	of := func(match func(*explained) bool) *explained {
		for _, x := range all {
			if match(x) {
				return x
			}
		}
		return &explained{} // of a lease that is not asked for
	}
	for e, err := range audit.Read(dir, audit.Filter{Job: job}) {
		if err != nil {
			return tampered(err)
		}
		x := of(func(x *explained) bool { return x.Lease == e.Object })
		switch {
		case e.Action == "job.admit":
			facts = e.Detail
		case e.Action == "lease.request" && (e.Object == name || name == job):
			all = append(all, &explained{Lease: e.Object, Job: job, Facts: facts, Request: e})
		case e.Action == "lease.issue":
			x.Issued = &e
		case strings.HasPrefix(e.Action, "lease."):
			x.Ends = append(x.Ends, e)
		case e.Action == "release.stuck": // of the job: whatever was not seen dead until then
			for _, x := range all {
				if !x.ended() {
					x.Ends = append(x.Ends, e)
				}
			}
		case strings.HasPrefix(e.Action, "egress.") && e.Detail["lease"] != "":
			used := of(func(x *explained) bool { return x.Lease == job+"-l-"+e.Detail["lease"] })
			used.Uses = append(used.Uses, e)
		}
	}
	if len(all) == 0 {
		return exitError{exitNo, fmt.Errorf("%s: the record has no lease of it: mayfly audit show --action lease. lists them", name)}
	}
	text := fmt.Sprintf("record: %d events in an unbroken chain\n", s.Events)
	for _, x := range all {
		text += x.text()
	}
	return c.print(o, all, text)
}

// text is a lease for people.
func (x *explained) text() string {
	var b strings.Builder
	line := func(key, value string) {
		if value != "" {
			fmt.Fprintf(&b, "  %-10s %s\n", key, value)
		}
	}
	at := func(e audit.Event) string { return e.Time.UTC().Format("2006-01-02T15:04:05.000Z") }
	fmt.Fprintf(&b, "\n%s\n", x.Lease)
	for _, key := range []string{"provider", "repository", "ref", "sha", "workflow", "event", "actor", "trust", "policy"} {
		line(key, x.Facts[key])
	}
	d := x.Request.Detail
	step := d["step"]
	if step == "" {
		step = "the whole job"
	}
	for _, kv := range [][2]string{{"rule", d["rule"]}, {"issuer", d["issuer"]}, {"held in", step}, {"delivery", d["delivery"]}, {"scope", d["scope"]}, {"intended", at(x.Request) + " until " + d["expires"]}} {
		line(kv[0], kv[1])
	}
	if x.Issued == nil {
		line("issued", "no answer is recorded")
	} else {
		line("issued", at(*x.Issued)+" "+x.Issued.Result)
		line("expires", x.Issued.Detail["expires"])
	}
	for _, e := range x.Uses {
		u := e.Detail
		text := fmt.Sprintf("%s %s %s:%s %s %s", at(e), u["verdict"], e.Object, u["port"], u["method"], u["path"])
		for _, key := range []string{"status", "sent", "received", "step", "executable"} {
			if u[key] != "" {
				text += "  " + key + " " + u[key]
			}
		}
		line("used", text)
	}
	if len(x.Uses) == 0 {
		line("used", "no use went through the gateway with it; what a job holds in clear is not seen there")
	}
	x.ends(line, at)
	return b.String()
}

// ended reports that the lease was seen dead, or that nobody can see it.
func (x *explained) ended() bool {
	return slices.ContainsFunc(x.Ends, func(e audit.Event) bool {
		return e.Action == "lease.revoke" && e.Result == "ok" || e.Action == "lease.unprovable"
	})
}

// ends says how sure it is that the lease is dead.
func (x *explained) ends(line func(key, value string), at func(audit.Event) string) {
	if len(x.Ends) == 0 {
		line("end", "none is recorded")
	}
	for _, e := range x.Ends {
		d := e.Detail
		switch {
		case e.Action == "lease.unprovable":
			line("unprovable", at(e)+" "+d["why"])
		case e.Action == "release.stuck":
			line("stuck", at(e)+" "+e.Result)
		default:
			line("revoked", at(e)+" "+e.Result)
			line("probe", d["probe"])
			line("refusal", strings.TrimSpace(d["refusal"]+" "+d["refused_at"]))
		}
	}
}
