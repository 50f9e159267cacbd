package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// An explained is one lease, from mint to receipt, as the record has it.
type explained struct {
	Lease   string            `json:"lease"`
	Job     string            `json:"job"`
	Facts   map[string]string `json:"facts"`             // of job.admit: whose job, rule, policy
	Require *audit.Event      `json:"require,omitempty"` // what had to be so before, and who approved
	Request audit.Event       `json:"request"`           // issuer, step, scope, delivery; none if it was not met
	Issued  *audit.Event      `json:"issued,omitempty"`
	Asked   []audit.Event     `json:"asked,omitempty"`   // what the job asked for under it
	Uses    []audit.Event     `json:"uses,omitempty"`    // lines of the ledger with it
	Refused []audit.Event     `json:"refused,omitempty"` // its placeholder, where it is not for
	Ends    []audit.Event     `json:"ends,omitempty"`    // renewal, attempts to revoke, and receipts
}

// jobOf is the job that a lease is of: everything before the second hyphen.
func jobOf(name string) string {
	prefix, rest, _ := strings.Cut(name, "-")
	id, _, more := strings.Cut(rest, "-")
	if !more {
		return name
	}
	return prefix + "-" + id
}

// useName is what the ledger calls a lease: "db", and after its first renewal
// "db#1". In the name of a lease that count is in base 36.
func useName(lease string) string {
	turn, name, _ := strings.Cut(strings.TrimPrefix(lease, jobOf(lease)+"-l"), "-")
	n, err := strconv.ParseInt(turn, 36, 32)
	if err != nil {
		return name
	}
	return name + "#" + strconv.FormatInt(n, 10)
}

// explainAudit is "mayfly audit explain": a lease by its name, or all of a job.
func (c *call) explainAudit(o *options, dir, expect, name string) error {
	s, err := verified(dir, expect)
	if err != nil {
		return err
	}
	job := jobOf(name)
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
		case (e.Action == "lease.request" || e.Action == "lease.require") && (e.Object == name || name == job):
			if x.Lease == "" {
				x = &explained{Lease: e.Object, Job: job, Facts: facts}
				all = append(all, x)
			}
			if x.Request = e; e.Action == "lease.require" {
				x.Require, x.Request = &e, audit.Event{}
			}
		case e.Action == "lease.issue":
			x.Issued = &e
		case e.Action == "lease.ask":
			x.Asked = append(x.Asked, e)
		case strings.HasPrefix(e.Action, "lease."):
			x.Ends = append(x.Ends, e)
		case e.Action == "release.stuck": // of the job: whatever was not seen dead until then
			for _, x := range all {
				if !x.ended() {
					x.Ends = append(x.Ends, e)
				}
			}
		case strings.HasPrefix(e.Action, "egress.") && e.Detail["lease"] != "":
			used := of(func(x *explained) bool { return useName(x.Lease) == e.Detail["lease"] })
			if e.Detail["verdict"] == string(egress.Refused) {
				used.Refused = append(used.Refused, e)
			} else {
				used.Uses = append(used.Uses, e)
			}
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
	x.required(line, at)
	if x.Request.Action == "" {
		line("issued", "it was not asked for")
		return b.String()
	}
	d := x.Request.Detail
	step := d["step"]
	if step == "" {
		step = "the whole job"
	}
	for _, kv := range [][2]string{{"rule", d["rule"]}, {"issuer", d["issuer"]}, {"held in", step}, {"delivery", d["delivery"]}, {"reach", d["reach"]}, {"scope", d["scope"]}, {"renews", d["renews"]}, {"intended", at(x.Request) + " until " + d["expires"]}} {
		line(kv[0], kv[1])
	}
	if x.Issued == nil {
		line("issued", "no answer is recorded")
	} else {
		line("issued", at(*x.Issued)+" "+x.Issued.Result)
		line("expires", x.Issued.Detail["expires"])
	}
	for _, e := range x.Asked {
		text := at(e) + " " + e.Detail["tool"]
		for _, key := range []string{"audience", "jti", "expires"} {
			if v := e.Detail[key]; v != "" {
				text += "  " + key + " " + v
			}
		}
		line("asked for", text+"  "+e.Result)
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
	for _, e := range x.Refused {
		line("refused", strings.TrimSpace(at(e)+" "+e.Object+":"+e.Detail["port"]+" "+e.Detail["method"]+" "+e.Detail["path"])+"  step "+e.Detail["step"]+": "+e.Result)
	}
	x.ends(line, at)
	return b.String()
}

// required is what had to be so before the lease was asked for, and whether it was.
func (x *explained) required(line func(key, value string), at func(audit.Event) string) {
	if x.Require == nil {
		return
	}
	line("required", at(*x.Require)+" "+x.Require.Result)
	for _, key := range []string{"rule", "issuer", "step", "requires", "approval", "approval_digest", "approved_by", "artifact", "artifact_digest"} {
		if v := x.Require.Detail[key]; v != "" {
			line("", key+" "+v)
		}
	}
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
			line("unprovable", strings.TrimSuffix(at(e)+" until "+d["until"], " until ")+" "+d["why"])
		case e.Action == "lease.renew":
			line("renewed", at(e)+" by "+d["by"])
		case e.Action == "release.stuck":
			line("stuck", at(e)+" "+e.Result)
		default:
			line("revoked", at(e)+" "+e.Result)
			line("probe", d["probe"])
			line("refusal", strings.TrimSpace(d["refusal"]+" "+d["refused_at"]))
		}
	}
}
