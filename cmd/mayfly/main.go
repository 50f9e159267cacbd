// Command mayfly is a self-hosted, ephemeral CI runner with isolation and
// credential lifecycle built in.
//
// Exit codes: 0 done; 1 the answer is no (the job failed, the chain is broken,
// the machine lacks something); 2 wrong usage or configuration; 3 something is
// still owed or could not be done. "mayfly exec" ends with the exit status of
// the step that failed.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
)

// version is set by the Makefile.
var version = "devel"

const (
	exitNo    = 1
	exitUsage = 2
	exitOwed  = 3
)

// A command is one subcommand.
type command struct {
	name, args, what string
	run              func(c *call) error
}

func commands() []command {
	return []command{
		{"agent", "--config FILE", "take jobs until the first SIGTERM, cancel them on the second", runAgent},
		{"exec", "[FILE] [--job ID] [--event NAME] [--policy FILE] [--state DIR]", "run a workflow file of this repository through the same life", runExec},
		{"doctor", "[--config FILE]", "say what this machine enforces, and what it does not", runDoctor},
		{"config", "check FILE", "read a configuration and all that it names", runConfig},
		{"policy", "explain --job FILE [--policy FILE]", "say which rule grants what to a job, and why", runPolicy},
		{"jobs", "[--config FILE]", "list the jobs that still owe something", runJobs},
		{"recover", "[--config FILE]", "release what a dead agent left", runRecover},
		{"reap", "[--dry-run] [--config FILE]", "destroy what carries our label and no journal knows", runReap},
		{"audit", "show | verify [--job ID] [--expect HEAD] [--config FILE]", "read the record, or check that nobody changed it", runAudit},
		{"version", "", "print the version", runVersion},
	}
}

// A call is one invocation: its arguments and where it prints.
type call struct {
	args   []string
	stdout io.Writer
	stderr io.Writer
}

func main() {
	os.Exit(mainExit(os.Args[1:], os.Stdout, os.Stderr))
}

func mainExit(args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		usage(stderr)
		return exitUsage
	}
	if args[0] == "help" || args[0] == "-h" || args[0] == "--help" {
		usage(stdout)
		return 0
	}
	for _, c := range commands() {
		if c.name != args[0] {
			continue
		}
		err := c.run(&call{args[1:], stdout, stderr})
		var code exitError
		switch {
		case err == nil || errors.Is(err, flag.ErrHelp):
			return 0
		case errors.As(err, &code):
			if code.err != nil {
				fmt.Fprintln(stderr, "mayfly "+c.name+":", code.err)
			}
			return code.code
		}
		fmt.Fprintln(stderr, "mayfly "+c.name+":", err)
		return exitOwed
	}
	fmt.Fprintf(stderr, "mayfly: unknown command %q\n\n", args[0])
	usage(stderr)
	return exitUsage
}

func usage(w io.Writer) {
	fmt.Fprint(w, "Mayfly runs CI jobs, each in a box of its own with credentials of its own, and leaves nothing.\n\n")
	for _, c := range commands() {
		fmt.Fprintf(w, "  mayfly %s %s\n      %s\n", c.name, c.args, c.what)
	}
	fmt.Fprint(w, "\nRead commands take --output text|json. The configuration is /etc/mayfly/agent.yaml unless --config names another.\n")
}

// An exitError ends the program with a code of its own.
type exitError struct {
	code int
	err  error // nil prints nothing
}

func (e exitError) Error() string { return fmt.Sprint(e.err) }
func (e exitError) Unwrap() error { return e.err }

func usageError(format string, args ...any) error {
	return exitError{exitUsage, fmt.Errorf(format, args...)}
}

// flags parses the flags of a command; the ones that many share are in the
// result. Positional arguments may stand before, between and behind flags.
func (c *call) flags(name string, more func(*flag.FlagSet)) (*options, error) {
	o := &options{}
	fs := flag.NewFlagSet("mayfly "+name, flag.ContinueOnError)
	fs.SetOutput(c.stderr)
	fs.StringVar(&o.config, "config", defaultConfig, "configuration of the agent")
	fs.StringVar(&o.output, "output", "text", "text or json")
	if more != nil {
		more(fs)
	}
	for args := c.args; ; {
		if err := fs.Parse(args); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				return nil, err
			}
			return nil, exitError{exitUsage, nil} // the flag set has said it
		}
		if fs.NArg() == 0 {
			break
		}
		o.args = append(o.args, fs.Arg(0))
		args = fs.Args()[1:]
	}
	if o.output != "text" && o.output != "json" {
		return nil, usageError("--output %q: want text or json", o.output)
	}
	return o, nil
}

// options are the flags that commands share.
type options struct {
	config string
	output string
	args   []string
}

const defaultConfig = "/etc/mayfly/agent.yaml"

func runVersion(c *call) error {
	o, err := c.flags("version", nil)
	if err != nil {
		return err
	}
	return c.print(o, map[string]string{"version": version}, "mayfly "+version+"\n")
}
