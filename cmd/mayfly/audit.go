package main

import (
	"errors"
	"flag"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/mayfly-ci/mayfly/configs"
	"github.com/mayfly-ci/mayfly/runner/audit"
)

func runAudit(c *call) error {
	var job, action, expect string
	o, err := c.flags("audit", 2, func(fs *flag.FlagSet) {
		fs.StringVar(&job, "job", "", "only the events of this job")
		fs.StringVar(&action, "action", "", "only this action, or with a dot at its end all of its kind: lease.")
		fs.StringVar(&expect, "expect", "", "a head that was printed before: the record must still contain it")
	})
	if err != nil {
		return err
	}
	if words := len(o.args); words == 0 || (words == 2) != (o.args[0] == "explain") || o.args[words-1] == "" {
		return usageError("want: mayfly audit show | verify | explain CREDENTIAL|JOB")
	}
	cfg, err := configs.Load(o.config)
	if err != nil {
		return exitError{exitUsage, err}
	}
	dir := filepath.Join(cfg.State, "audit")
	switch o.args[0] {
	case "show":
		return c.showAudit(o, dir, audit.Filter{Job: job, Action: action})
	case "verify":
		return c.verifyAudit(o, dir, expect)
	case "explain":
		return c.explainAudit(o, dir, expect, o.args[1])
	}
	return usageError("mayfly audit %s: want show, verify or explain", o.args[0])
}

func (c *call) showAudit(o *options, dir string, only audit.Filter) error {
	for e, err := range audit.Read(dir, only) {
		if err != nil {
			return tampered(err)
		}
		var b strings.Builder
		fmt.Fprintf(&b, "%s  %-19s  %-16s  %s  %s\n", e.Time.UTC().Format("2006-01-02T15:04:05.000Z"), e.Job, e.Action, e.Object, e.Result)
		for _, k := range slices.Sorted(maps.Keys(e.Detail)) {
			fmt.Fprintf(&b, "    %s: %s\n", k, e.Detail[k])
		}
		if err := c.print(o, e, b.String()); err != nil {
			return err
		}
	}
	return nil
}

func (c *call) verifyAudit(o *options, dir, expect string) error {
	s, err := verified(dir, expect)
	if err != nil {
		return err
	}
	text := fmt.Sprintf("good: %d events in an unbroken chain\nhead %s (keep it elsewhere: --expect HEAD shows later that nothing was cut off)\n", s.Events, s.Head)
	return c.print(o, s, text)
}

// verified checks the whole chain.
func verified(dir, expect string) (audit.Summary, error) {
	var heads []audit.Head
	if expect != "" {
		h, err := audit.ParseHead(expect)
		if err != nil {
			return audit.Summary{}, exitError{exitUsage, err}
		}
		heads = append(heads, h)
	}
	s, err := audit.Verify(dir, heads...)
	if err != nil {
		return s, tampered(err)
	}
	return s, nil
}

// tampered makes the answer no of a record that was changed.
func tampered(err error) error {
	if errors.Is(err, audit.ErrTampered) {
		return exitError{exitNo, err}
	}
	return err
}
