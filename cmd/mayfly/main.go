// Command mayfly is a self-hosted, ephemeral CI runner with isolation and
// credential lifecycle built in.
//
// "mayfly help" lists the commands and the exit codes, "mayfly help COMMAND" its
// flags.
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os"

	"github.com/mayfly-ci/mayfly/sandbox/containerd"
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
		{"exec", "[FILE] [--job ID] [--event NAME] [--policy FILE] [--config FILE] [--state DIR] [--verbose]", "run a workflow file of this repository through the same life", runExec},
		{"doctor", "[--config FILE]", "say what this machine enforces, and what it does not", runDoctor},
		{"config", "check FILE", "read a configuration and all that it names", runConfig},
		{"policy", "explain --job FILE [--policy FILE] | test FILE [--policy FILE] | suggest JOB [--config FILE]", "say which rule grants what to a job, and why; try a file of cases; or make rules of what a job did", runPolicy},
		{"jobs", "[--config FILE]", "list the jobs that still owe something", runJobs},
		{"job", "ID [--config FILE]", "the life of one job, from the record: facts, leases and receipts, what it reached", runJob},
		{"logs", "ID [--config FILE]", "what a job printed, if this machine has it", runLogs},
		{"shell", "ID [--config FILE] [-- COMMAND...]", "look around in the box of a failed job that is kept", runShell},
		{"recover", "[--config FILE]", "release what a dead agent left", runRecover},
		{"reap", "[--dry-run] [--config FILE]", "destroy what carries our label and no journal knows", runReap},
		{"image", "pull NAME | import FILE [--name NAME] | list | prune | remove NAME [--runtime NAME] [--config FILE]", "the images that the agent keeps itself; an import needs no registry", runImage},
		{"oidc", "export DIR [--config FILE]", "write what verifies the agent's identity, for a web server", runOIDC},
		{"seal", "ISSUER FILE | --rotate | --forget [--config FILE]", "write a secret from the standard input so that only this installation can read it; or change the key for that", runSeal},
		{"audit", "show | verify | explain CREDENTIAL|JOB [--job ID] [--action NAME] [--expect HEAD] [--config FILE]", "read the record, check that nobody changed it, or follow credentials from mint to receipt", runAudit},
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
		if len(args) == 1 {
			usage(stdout)
			return 0
		}
		args = []string{args[1], "--help"}
	}
	if err := harden(); err != nil {
		fmt.Fprintln(stderr, "mayfly:", err)
		return exitOwed
	}
	if args[0] == containerd.AskArg { // a child of the agent's
		if err := containerd.Ask(os.Stdin, stdout); err != nil {
			fmt.Fprintln(stderr, "mayfly:", err)
			return exitOwed
		}
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
				fmt.Fprintln(stderr, "mayfly "+c.name+":", err) // with all that it was joined to
			}
			return code.code
		}
		fmt.Fprintln(stderr, "mayfly "+c.name+":", err)
		return exitOwed
	}
	fmt.Fprintf(stderr, "mayfly: unknown command %q: \"mayfly help\" lists the commands\n", args[0])
	return exitUsage
}

func usage(w io.Writer) {
	fmt.Fprint(w, "Mayfly runs CI jobs, each in a box of its own with credentials of its own, and leaves nothing.\n\n")
	for _, c := range commands() {
		fmt.Fprintf(w, "  mayfly %s %s\n      %s\n", c.name, c.args, c.what)
	}
	fmt.Fprint(w, `
Commands that read take --output text|json; "mayfly help COMMAND" lists all flags.
The configuration is `+defaultConfig+` unless --config names another.

Exit codes:
  0  done
  1  the answer is no: the job failed or cannot be run, no rule matches, the
     record was changed, the machine does not enforce something
  2  wrong usage, configuration or policy; the policy refuses the job
  3  something is still owed or could not be done
"mayfly exec" ends with the exit status of the step that failed, "mayfly shell"
with that of its command.
`)
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
// result. Positional arguments, at most so many as said, may stand before,
// between and behind flags.
func (c *call) flags(name string, most int, more func(*flag.FlagSet)) (*options, error) {
	o := &options{}
	fs := flag.NewFlagSet("mayfly "+name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&o.config, "config", defaultConfig, "configuration of the agent")
	fs.StringVar(&o.output, "output", "text", "text or json")
	if more != nil {
		more(fs)
	}
	for args := c.args; ; {
		if err := fs.Parse(args); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				c.help(name, fs)
				return nil, err
			}
			return nil, usageError("%w: \"mayfly help %s\" lists the flags", err, name)
		}
		if fs.NArg() == 0 {
			break
		}
		o.args = append(o.args, fs.Arg(0))
		args = fs.Args()[1:]
	}
	if len(o.args) > most {
		return nil, usageError("argument %q is one too many: \"mayfly help %s\" shows the usage", o.args[most], name)
	}
	if o.output != "text" && o.output != "json" {
		return nil, usageError("--output %q: want text or json", o.output)
	}
	return o, nil
}

// help prints the usage of one command.
func (c *call) help(name string, fs *flag.FlagSet) {
	for _, cmd := range commands() {
		if cmd.name == name {
			fmt.Fprintf(c.stdout, "mayfly %s %s\n    %s\n\n", cmd.name, cmd.args, cmd.what)
		}
	}
	fs.SetOutput(c.stdout)
	fs.PrintDefaults()
}

// options are the flags that commands share.
type options struct {
	config string
	output string
	args   []string
}

const defaultConfig = "/etc/mayfly/agent.yaml"

func runVersion(c *call) error {
	o, err := c.flags("version", 0, nil)
	if err != nil {
		return err
	}
	return c.print(o, map[string]string{"version": version}, "mayfly "+version+"\n")
}
