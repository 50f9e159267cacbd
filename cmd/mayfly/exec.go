package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rs/zerolog"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/local"
	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/policy"
)

// execSlots is how many "mayfly exec" of one user may run at once: each needs a
// state directory of its own.
const execSlots = 64

type execFlags struct {
	job, event, policy, state string
	verbose                   bool
}

func runExec(c *call) error {
	var f execFlags
	o, err := c.flags("exec", 1, func(fs *flag.FlagSet) {
		fs.StringVar(&f.job, "job", "", "job of the workflow; not needed if there is only one")
		fs.StringVar(&f.event, "event", "push", "event that the job is told")
		fs.StringVar(&f.policy, "policy", "", "policy file; without one the job gets nothing but its box")
		fs.StringVar(&f.state, "state", "", "state directory (default: a free one of yours)")
		fs.BoolVar(&f.verbose, "verbose", false, "show the agent's own log too")
	})
	if err != nil {
		return err
	}
	root, file, err := workflowFile(o.args)
	if err != nil {
		return exitError{exitUsage, err}
	}
	w, spool, err := c.wireExec(o, f)
	if err != nil {
		return err
	}
	defer w.close()
	agent, err := runner.New(w.agent, w.state)
	if err != nil {
		return err
	}
	job := local.Job{Repository: root, Workflow: file, Job: f.job, Event: f.event, Worktree: true}
	if job.SHA = git(root, "rev-parse", "-q", "--verify", "HEAD"); job.SHA != "" {
		job.Ref = git(root, "symbolic-ref", "-q", "HEAD")
	}
	id, err := local.Submit(spool, job)
	if err != nil {
		return err
	}
	first, _, stop := signals(context.Background())
	defer stop()
	// At a terminal the first signal cancels: there is no queue to drain.
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(first))
	defer context.AfterFunc(first, func() { cancel(runner.ErrStopping) })()
	if err := agent.Run(ctx, ctx); err != nil {
		return err // something is owed, and the result says nothing of it
	}
	err = execResult(spool, id)
	if gone := os.RemoveAll(spool); gone != nil { // the terminal had the log
		return fmt.Errorf("spool: %w", gone)
	}
	return err
}

// wireExec is an agent for one job of one spool.
func (c *call) wireExec(o *options, f execFlags) (w *wiring, spool string, err error) {
	rules := policy.Nothing()
	if f.policy != "" {
		if rules, err = readPolicy(f.policy); err != nil {
			return nil, "", exitError{exitUsage, err}
		}
	}
	log := zerolog.Nop()
	if f.verbose {
		log = consoleLog(c.stderr)
	}
	state, err := execState(f.state)
	if err != nil {
		return nil, "", err
	}
	if w, err = wireExec(o.config, state, rules, log); err != nil {
		return nil, "", err
	}
	spool = filepath.Join(state.Dir, "spool")
	// What an earlier run submitted and did not live to claim is not ours.
	err = os.RemoveAll(filepath.Join(spool, "new"))
	provider, perr := local.New(local.Config{Dir: spool})
	if err := errors.Join(err, perr); err != nil {
		w.close()
		return nil, "", err
	}
	w.agent.Providers = map[string]providers.Provider{local.Name: &echo{provider, c.stdout}}
	w.agent.Slots, w.agent.Once = 1, true
	if w.weak {
		fmt.Fprintln(c.stderr, "mayfly exec: not root: memory and CPU of the box are not limited, it runs as you outside, and /usr is read-only; see mayfly doctor")
	}
	return w, spool, nil
}

// execResult turns the job's result into the exit status of the program.
func execResult(spool, id string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	r, err := local.Wait(ctx, spool, id)
	if err != nil {
		return err
	}
	switch r.Conclusion {
	case providers.Success, providers.Skipped:
		return nil
	case providers.Refused:
		return exitError{exitUsage, nil}
	}
	code := exitNo
	steps, err := local.ReadSteps(spool, id)
	if err != nil {
		return err
	}
	for _, s := range steps {
		if s.Conclusion == providers.Failure && s.ExitCode != 0 {
			code = s.ExitCode
			break
		}
	}
	return exitError{code, nil}
}

// echo is the spool as a provider, with the job's log on a terminal too.
type echo struct {
	*local.Provider
	to io.Writer
}

func (e *echo) Log(ctx context.Context, name string, ref []byte) (providers.Log, error) {
	log, err := e.Provider.Log(ctx, name, ref)
	if err != nil {
		return nil, err
	}
	return &echoLog{Log: log, to: e.to}, nil
}

// An echoLog shows at its end what the job wants to be seen first.
type echoLog struct {
	providers.Log
	to    io.Writer
	notes bytes.Buffer
}

// Annotate implements providers.Annotator, as the log below it does.
func (e *echoLog) Annotate(a providers.Annotation) error {
	place := a.File
	for _, n := range []int{a.Line, a.Column} {
		if place != "" && n > 0 {
			place += ":" + strconv.Itoa(n)
		}
	}
	parts := []string{string(a.Level), place, a.Title, strings.ReplaceAll(a.Message, "\n", "\n  ")}
	parts = slices.DeleteFunc(parts, func(p string) bool { return p == "" })
	fmt.Fprintf(&e.notes, "%s\n", strings.Join(parts, ": "))
	return e.below().Annotate(a)
}

// Summary implements providers.Annotator.
func (e *echoLog) Summary(step int, markdown []byte) error {
	fmt.Fprintf(&e.notes, "\n%s\n", bytes.TrimSpace(markdown))
	return e.below().Summary(step, markdown)
}

// below is the log of the spool, which is an Annotator.
func (e *echoLog) below() providers.Annotator { return e.Log.(providers.Annotator) }

func (e *echoLog) Close(ctx context.Context) error {
	var err error
	if e.notes.Len() > 0 {
		_, err = fmt.Fprintf(e.to, "\n== what the steps noted\n%s", e.notes.Bytes())
		e.notes.Reset()
	}
	if err != nil {
		err = fmt.Errorf("terminal: %w", err)
	}
	return errors.Join(err, e.Log.Close(ctx))
}

func (e *echoLog) Write(at time.Time, step int, b []byte) error {
	if _, err := e.to.Write(b); err != nil {
		return fmt.Errorf("terminal: %w", err)
	}
	return e.Log.Write(at, step, b)
}

// workflowFile finds the repository one stands in and the file in it.
func workflowFile(args []string) (root, file string, err error) {
	out, err := exec.Command("git", "rev-parse", "--show-toplevel").Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = errors.New(strings.TrimSpace(string(exit.Stderr)))
		}
		return "", "", fmt.Errorf("stand in a git repository, so that the job has a commit to be about: %w", err)
	}
	root = strings.TrimSpace(string(out))
	if len(args) == 1 {
		abs, err := filepath.Abs(args[0])
		if err != nil {
			return "", "", err
		}
		if file, err = filepath.Rel(root, abs); err != nil || strings.HasPrefix(file, "..") {
			return "", "", fmt.Errorf("%s is not in the repository %s", args[0], root)
		}
		return root, file, nil
	}
	found, err := filepath.Glob(filepath.Join(root, ".github", "workflows", "*.y*ml"))
	if err != nil || len(found) != 1 {
		return "", "", fmt.Errorf("%d workflow files in %s/.github/workflows: name one", len(found), root)
	}
	file, err = filepath.Rel(root, found[0])
	return root, file, err
}

// git asks the repository for a fact, "" if it has none: a repository without a
// commit can be tried out too.
func git(root string, args ...string) string {
	out, err := exec.Command("git", append([]string{"-C", root}, args...)...).Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

// execState takes the first state directory that no other exec holds.
func execState(dir string) (*runner.State, error) {
	if dir != "" {
		dir, err := filepath.Abs(dir)
		if err != nil {
			return nil, fmt.Errorf("state: %w", err)
		}
		return runner.OpenState(dir)
	}
	base := "/var/lib/mayfly-exec"
	if os.Geteuid() != 0 {
		home, err := os.UserHomeDir()
		if err != nil {
			return nil, usageError("%w: set it, or name a directory with --state", err)
		}
		base = filepath.Join(home, ".local", "state", "mayfly-exec")
	}
	for i := range execSlots {
		state, err := runner.OpenState(filepath.Join(base, fmt.Sprint(i)))
		if !errors.Is(err, runner.ErrInUse) {
			return state, err
		}
	}
	return nil, fmt.Errorf("%d jobs run already", execSlots)
}
