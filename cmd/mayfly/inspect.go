package main

import (
	"context"
	"flag"
	"fmt"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/runner"
)

func runJobs(c *call) error {
	o, err := c.flags("jobs", 0, nil)
	if err != nil {
		return err
	}
	state, err := peek(o.config)
	if err != nil {
		return err
	}
	jobs, err := state.Jobs()
	var b strings.Builder
	for _, j := range jobs {
		end := "not ended"
		if j.Outcome != nil {
			end = "ended: " + string(j.Outcome.Conclusion)
		} else if j.Generation != state.Generation {
			end = "left by generation " + fmt.Sprint(j.Generation)
		} else if j.Warm {
			end = "a warm box, which no job has"
		}
		fmt.Fprintf(&b, "%s  %s\n", j.Job, end)
		for _, d := range j.Owes {
			fmt.Fprintf(&b, "    owes %-8s %s", d.Kind, d.Name)
			if d.By != "" {
				fmt.Fprintf(&b, "  by %s", d.By)
			}
			if d.Scope != "" {
				fmt.Fprintf(&b, "  for step %s", d.Scope)
			}
			b.WriteString(leaseText(d.Lease))
			if !d.Until.IsZero() {
				fmt.Fprintf(&b, "  kept until %s: mayfly shell %s", d.Until.UTC().Format(time.RFC3339), j.Job)
			}
			b.WriteByte('\n')
		}
	}
	if len(jobs) == 0 {
		b.WriteString("nothing is owed\n")
	}
	if perr := c.print(o, jobs, b.String()); perr != nil {
		return perr
	}
	return err
}

func runRecover(c *call) error {
	o, err := c.flags("recover", 0, nil)
	if err != nil {
		return err
	}
	w, err := wire(o.config, c.stderr)
	if err != nil {
		return err
	}
	defer w.close()
	agent, err := runner.New(w.agent, w.state)
	if err != nil {
		return exitError{exitUsage, err}
	}
	jobs, err := w.state.Jobs()
	if err != nil {
		return err
	}
	// Both signals end the wait: what is left is left to the next start.
	drain, _, stop := signals(context.Background())
	defer stop()
	if err := agent.Recover(drain); err != nil {
		return err
	}
	warm := 0
	for _, j := range jobs {
		if j.Warm {
			warm++
		}
	}
	text := fmt.Sprintf("%d jobs of an earlier life released\n", len(jobs)-warm)
	if warm > 0 {
		text += fmt.Sprintf("%d boxes that no job had destroyed\n", warm)
	}
	return c.print(o, jobs, text)
}

func runReap(c *call) error {
	var dry bool
	o, err := c.flags("reap", 0, func(fs *flag.FlagSet) {
		fs.BoolVar(&dry, "dry-run", false, "list, and touch nothing; may run beside a living agent")
	})
	if err != nil {
		return err
	}
	open := wire
	if dry {
		open = wirePeek
	}
	w, err := open(o.config, c.stderr)
	if err != nil {
		return err
	}
	defer w.close()
	agent, err := runner.New(w.agent, w.state)
	if err != nil {
		return exitError{exitUsage, err}
	}
	act, verb := agent.Reap, "destroyed"
	if dry {
		act, verb = agent.Orphans, "would destroy"
	}
	orphans, err := act(context.Background())
	var b strings.Builder
	for _, r := range orphans {
		fmt.Fprintf(&b, "%s %s %s of %s\n", verb, r.Kind, r.Name, r.By)
	}
	if len(orphans) == 0 {
		orphans = []runner.Orphan{} // [] in JSON
		b.WriteString("no orphans\n")
	}
	if perr := c.print(o, orphans, b.String()); perr != nil {
		return perr
	}
	return err
}
