package runner

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/workflow"
	"github.com/mayfly-ci/mayfly/sandbox"
)

// statusNotFound is the exit status of a program that is not there.
const statusNotFound = 127

// A shell is how a script is run.
type shell struct {
	name     string     // "" if the step does not say
	commands [][]string // the first whose program the box has; {0} is the script
	file     string     // of the script, below sandbox.Run
	wrap     string     // around the script, which is %s
}

// shellOf knows the shells of a step as GitHub documents them under
// "jobs.<job_id>.steps[*].shell".
func shellOf(name string) (shell, error) {
	s := shell{name: name, file: "step", wrap: "%s"}
	switch name {
	case "":
		s.commands = [][]string{{"bash", "-e", "{0}"}, {"sh", "-e", "{0}"}}
	case "bash":
		s.commands = [][]string{{"bash", "--noprofile", "--norc", "-eo", "pipefail", "{0}"}}
	case "sh":
		s.commands = [][]string{{"sh", "-e", "{0}"}}
	case "python":
		s.commands = [][]string{{"python3", "{0}"}, {"python", "{0}"}}
	case "pwsh":
		// It runs files of this name only, and stops at an error only if told to.
		s.file = "step.ps1"
		s.wrap = "$ErrorActionPreference = 'stop'\n%s\nif ((Test-Path -LiteralPath variable:\\LASTEXITCODE)) { exit $LASTEXITCODE }"
		s.commands = [][]string{{"pwsh", "-command", ". '{0}'"}}
	case "cmd", "powershell":
		return s, fmt.Errorf("shell %q: it is there on Windows only", name)
	default:
		args := splitArgs(name)
		if !strings.Contains(name, "{0}") || args[0] == "" {
			return s, fmt.Errorf("shell %q: a custom shell needs {0} where the script goes", name)
		}
		s.commands = [][]string{args}
	}
	for _, args := range s.commands {
		for i := range args {
			args[i] = strings.ReplaceAll(args[i], "{0}", sandbox.Run+"/"+s.file)
		}
	}
	return s, nil
}

// splitArgs cuts a command at white space outside of double quotes, as the
// runner of GitHub does.
func splitArgs(command string) []string {
	var args []string
	var arg strings.Builder
	begun, quoted := false, false
	for _, r := range command {
		switch {
		case r == '"':
			begun, quoted = true, !quoted
		case !quoted && (r == ' ' || r == '\t' || r == '\n'):
			if begun {
				args = append(args, arg.String())
			}
			arg.Reset()
			begun = false
		default:
			begun = true
			arg.WriteRune(r)
		}
	}
	if begun {
		args = append(args, arg.String())
	}
	return args
}

// script runs a step that is a script.
func (s *steps) script(ctx context.Context, step *current) ending {
	p, sh, script, err := s.process(step)
	if err != nil {
		return failed(fmt.Errorf("%s: %w", step.Position, err))
	}
	if err := s.putCommandFiles(ctx, sh.file, script, step); err != nil {
		return failed(err)
	}
	l := s.listen(step)
	exit, err := s.start(ctx, p, sh, l)
	err = errors.Join(err, l.finish())
	end := ending{conclusion: providers.Success, exit: exit.Code}
	switch {
	case errors.Is(err, sandbox.ErrDied):
		return ending{conclusion: providers.Failure, exit: exit.Code, reason: err}
	case errors.Is(err, providers.ErrCancelled):
		end.conclusion, end.reason = providers.Cancelled, err
	case errors.Is(err, errStepTimeout):
		end.conclusion, end.reason = providers.Failure, err
	case err != nil:
		return ending{conclusion: providers.Failure, exit: exit.Code, reason: err}
	case exit.OOM:
		end.conclusion, end.reason = providers.Failure, errors.New("killed: out of memory: the plan's limit was reached; raise limits.memory in the policy")
	case exit.Code != 0:
		end.conclusion, end.reason = providers.Failure, fmt.Errorf("exit status %d", exit.Code)
	}
	end.outputs = l.outputs
	err = s.readCommandFiles(ctx, step, end.outputs)
	if err = errors.Join(err, l.refused); err != nil && end.conclusion == providers.Success {
		end.conclusion, end.reason = providers.Failure, err
	}
	return end
}

// process is the command of a step and the script that it runs.
func (s *steps) process(step *current) (p sandbox.Process, sh shell, script string, err error) {
	if script, err = workflow.Interpolate(step.Run, step.scope); err != nil {
		return p, sh, "", fmt.Errorf("run: %w", err)
	}
	dir, err := workflow.Interpolate(step.Dir, step.scope)
	if err != nil {
		return p, sh, "", fmt.Errorf("working-directory: %w", err)
	}
	if !path.IsAbs(dir) {
		dir = path.Join(sandbox.Workspace, dir)
	}
	name, err := workflow.Interpolate(step.Shell, step.scope)
	if err == nil {
		sh, err = shellOf(strings.TrimSpace(name))
	}
	if err != nil {
		return p, sh, "", err
	}
	return sandbox.Process{Env: s.environment(step), Dir: dir}, sh, strings.Replace(sh.wrap, "%s", script, 1), nil
}

// start runs the first of a shell's commands whose program is in the box. What
// is not there may be installed by a step, so nothing is remembered.
func (s *steps) start(ctx context.Context, p sandbox.Process, sh shell, l *listener) (sandbox.Exit, error) {
	p.Stdout = l.output()
	stderr := l.output()
	for _, args := range sh.commands {
		w := &wary{text: "mayfly: " + args[0] + ": command not found\n", next: stderr}
		p.Args, p.Stderr = args, w.write
		exit, err := s.box.Run(ctx, p)
		if err == nil && exit.Code == statusNotFound && w.held {
			continue
		}
		return exit, errors.Join(err, w.release())
	}
	names := make([]string, len(sh.commands))
	for i, args := range sh.commands {
		names[i] = args[0]
	}
	name := strings.Join(names, " nor ")
	err := fmt.Errorf("shell %q: the box has no %s: name another shell, or use an image that has it", sh.name, name)
	return sandbox.Exit{Code: statusNotFound}, err
}

// A wary output holds back what a box says of a program that it does not have,
// as long as nothing else is said: it may be asked for another one.
type wary struct {
	text string
	next sandbox.Output
	at   time.Time
	held bool
	over bool // something else was said
}

func (w *wary) write(at time.Time, b []byte) error {
	if !w.over && !w.held && string(b) == w.text {
		w.held, w.at = true, at
		return nil
	}
	if err := w.release(); err != nil {
		return err
	}
	return w.next(at, b)
}

func (w *wary) release() error {
	held := w.held
	w.held, w.over = false, true
	if !held {
		return nil
	}
	return w.next(w.at, []byte(w.text))
}
