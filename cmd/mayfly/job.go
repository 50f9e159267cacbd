package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/mayfly-ci/mayfly/configs"
	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/local"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// A past is what the record has of one job.
type past struct {
	ID     string            `json:"job"`
	Facts  map[string]string `json:"facts"` // of job.admit: whose it is, and which rule admitted it
	Result string            `json:"result"`
	Events []audit.Event     `json:"events"` // but those of the ledger
	Egress []reached         `json:"egress"`
	// Owes is what is left of it; empty when all is released.
	Owes []runner.DebtInfo `json:"owes,omitempty"`

	uses []policy.Use
}

// A reached is what a job did with one port of a name.
type reached struct {
	Name     string `json:"name"`
	Port     string `json:"port,omitempty"`
	Verdict  string `json:"verdict"`
	Rule     string `json:"rule,omitempty"`
	Why      string `json:"why,omitempty"`
	Service  string `json:"service,omitempty"` // that did so, "" for the job
	Times    int    `json:"times"`
	Sent     int64  `json:"sent,omitempty"` // bytes
	Received int64  `json:"received,omitempty"`
}

// pastOf reads the record of one job, checking its chain.
func pastOf(c *configs.Config, id string) (*past, error) {
	p := &past{ID: id, Result: "not ended"}
	at := map[reached]int{}
	for e, err := range audit.Read(filepath.Join(c.State, "audit"), audit.Filter{Job: id}) {
		if err != nil {
			return nil, tampered(err)
		}
		switch {
		case strings.HasPrefix(e.Action, "egress."):
			p.attempt(e, at)
			continue
		case e.Action == "job.admit":
			p.Facts = e.Detail
		case e.Action == "job.complete":
			p.Result = strings.TrimSuffix(e.Detail["conclusion"]+": "+e.Detail["reason"], ": ")
		}
		p.Events = append(p.Events, e)
	}
	if len(p.Events)+len(p.Egress) == 0 {
		return nil, exitError{exitNo, fmt.Errorf("job %s: the record has nothing of it: mayfly audit show lists the jobs, and a month that was put away is not read", id)}
	}
	state, err := runner.PeekState(c.State)
	if err != nil {
		return nil, neverRun(err, c.State)
	}
	jobs, err := state.Jobs()
	for _, j := range jobs {
		if j.Job == id {
			p.Owes = j.Owes
		}
	}
	return p, err
}

// attempt counts a line of the ledger. An attempt that passed has two.
func (p *past) attempt(e audit.Event, at map[reached]int) {
	d := e.Detail
	key := reached{Name: e.Object, Port: d["port"], Verdict: d["verdict"], Rule: d["rule"], Service: d["service"]}
	if key.Verdict == string(egress.Ended) {
		key.Verdict = string(egress.Learned)
		if key.Rule != "" {
			key.Verdict = string(egress.Allowed)
		}
	}
	if key.Verdict == string(egress.Refused) || key.Verdict == string(egress.Failed) {
		key.Why = e.Result
	}
	i, seen := at[key]
	if !seen {
		i = len(p.Egress)
		at[key], p.Egress = i, append(p.Egress, key)
	}
	r := &p.Egress[i]
	r.Sent, r.Received = r.Sent+number(d["sent"]), r.Received+number(d["received"])
	if d["verdict"] != string(egress.Ended) {
		r.Times++
	}
	p.uses = append(p.uses, use(e)...)
}

func number(text string) int64 {
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return 0 // the record leaves zeros out
	}
	return n
}

// use is a line of the ledger for a suggestion, if it is about the world outside:
// what leads to a service of the job is there without a rule.
func use(e audit.Event) []policy.Use {
	d := e.Detail
	host := e.Action == "egress.dns" || e.Action == "egress.tcp"
	if !host || e.Object == d["address"] || strings.Contains(d["dialled"], " ") {
		return nil
	}
	_, reason, _ := strings.Cut(e.Result, ": ")
	u := policy.Use{
		Name: e.Object, Port: uint16(number(d["port"])), Protocol: egress.Protocol(d["protocol"]),
		Verdict: egress.Verdict(d["verdict"]), Reason: reason, Rule: d["rule"], Step: d["step"], Service: d["service"],
		Dialled: d["dialled"], Executable: d["executable"], Method: d["method"], Path: d["path"], WebSocket: d["status"] == "101",
	}
	return []policy.Use{u}
}

// subject is the job as rules of a policy see it.
func (p *past) subject() providers.Job {
	f := p.Facts
	return providers.Job{
		Subject: creds.Subject{
			Provider: f["provider"], Repository: f["repository"], Ref: f["ref"], SHA: f["sha"], Workflow: f["workflow"], Event: f["event"],
			Origin: creds.Origin{Actor: f["actor"]},
		},
		Trust: providers.Trust(f["trust"]),
	}
}

// read takes a command with the id of one job.
func (c *call) read(command, usage string, words int) (*configs.Config, *options, string, error) {
	o, err := c.flags(command, words, nil)
	if err != nil {
		return nil, nil, "", err
	}
	if len(o.args) != words {
		return nil, nil, "", usageError("want: mayfly %s", usage)
	}
	cfg, err := load(o.config)
	if err != nil {
		return nil, nil, "", exitError{exitUsage, err}
	}
	return cfg, o, o.args[words-1], nil
}

func runJob(c *call) error {
	cfg, o, id, err := c.read("job", "job ID", 1)
	if err != nil {
		return err
	}
	p, err := pastOf(cfg, id)
	if err != nil {
		return err
	}
	return c.print(o, p, p.text())
}

// text is the life of a job for people.
func (p *past) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s  %s\n", p.ID, p.Result)
	for _, key := range []string{"provider", "repository", "ref", "sha", "workflow", "event", "actor", "trust", "rule", "policy", "runtime", "image", "isolation", "mode"} {
		if v := p.Facts[key]; v != "" {
			fmt.Fprintf(&b, "  %-10s %s\n", key, v)
		}
	}
	b.WriteString("\nits life\n")
	for _, e := range p.Events {
		fmt.Fprintf(&b, "  %s  %-16s  %s", e.Time.UTC().Format("2006-01-02T15:04:05.000Z"), e.Action, e.Object)
		if e.Result != "" && e.Result != "ok" {
			b.WriteString("  " + e.Result)
		}
		b.WriteByte('\n')
		for _, key := range []string{"issuer", "step", "tool", "audience", "jti", "expires", "probe", "refusal", "refused_at", "why", "until"} {
			if v := e.Detail[key]; v != "" && strings.HasPrefix(e.Action, "lease.") || v != "" && key == "until" {
				fmt.Fprintf(&b, "      %-10s %s\n", key, v)
			}
		}
	}
	b.WriteString("\nwhat it reached\n")
	for _, r := range p.Egress {
		whose := ""
		if r.Service != "" {
			whose = "  service " + r.Service
		}
		fmt.Fprintf(&b, "  %-8s %s%s  %d times%s", r.Verdict, r.Name, strings.TrimSuffix(":"+r.Port, ":"), r.Times, whose)
		if r.Sent+r.Received > 0 {
			fmt.Fprintf(&b, "  %d bytes sent, %d received", r.Sent, r.Received)
		}
		if text := strings.TrimSpace(r.Rule + " " + r.Why); text != "" {
			b.WriteString("  (" + text + ")")
		}
		b.WriteByte('\n')
	}
	if len(p.Egress) == 0 {
		b.WriteString("  nothing\n")
	}
	if len(p.Owes) > 0 {
		b.WriteString("\nwhat is left of it\n")
	}
	for _, d := range p.Owes {
		fmt.Fprintf(&b, "  %-8s %s\n", d.Kind, d.Name)
	}
	return b.String()
}

// suggest is "mayfly policy suggest JOB".
func (c *call) suggest() error {
	cfg, o, id, err := c.read("policy", "policy suggest JOB", 2)
	if err != nil {
		return err
	}
	p, err := pastOf(cfg, id)
	if err != nil {
		return err
	}
	if p.Facts == nil {
		return exitError{exitNo, fmt.Errorf("job %s: the record does not say whose it is: it was never admitted", id)}
	}
	text, err := policy.Suggest(p.subject(), p.uses)
	if err != nil {
		return err
	}
	return c.print(o, map[string]string{"job": id, "policy": text}, text)
}

// runLogs prints what the agent's machine has of a job's log: that of a spool. A
// service keeps its own, and the agent none.
func runLogs(c *call) error {
	cfg, o, id, err := c.read("logs", "logs ID", 1)
	if err != nil {
		return err
	}
	p, err := pastOf(cfg, id)
	if err != nil {
		return err
	}
	provider := p.Facts["provider"]
	for _, e := range p.Events {
		if e.Action == "job.complete" {
			provider = e.Detail["provider"] // as the configuration names it
		}
	}
	section, ok := cfg.Providers[provider]
	if !ok || section.Type != local.Name {
		return exitError{exitNo, fmt.Errorf("job %s: its log is at provider %q, which keeps it: this agent has sent it there and has no copy", id, provider)}
	}
	spool, err := localConfig(section)
	if err != nil {
		return exitError{exitUsage, err}
	}
	offer, err := local.Find(spool.Dir, id)
	if errors.Is(err, fs.ErrNotExist) {
		return exitError{exitNo, fmt.Errorf("job %s: the spool %s has nothing of it any more", id, spool.Dir)}
	}
	if err != nil {
		return err
	}
	log, err := local.OpenLog(spool.Dir, offer)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // it printed nothing
	}
	if err != nil {
		return err
	}
	if o.output == "json" {
		b, rerr := io.ReadAll(io.LimitReader(log, jsonLog))
		return errors.Join(rerr, log.Close(), c.print(o, map[string]string{"job": id, "log": string(b)}, ""))
	}
	_, err = io.Copy(c.stdout, log)
	return errors.Join(err, log.Close())
}

// jsonLog bounds what of a log is put into one JSON value, in bytes.
const jsonLog = 64 << 20
