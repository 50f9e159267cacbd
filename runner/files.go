package runner

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// commandFiles are what a step writes to tell the runner something, as GitHub
// documents them: variable → file below sandbox.Run.
func commandFiles() map[string]string {
	return map[string]string{
		"GITHUB_ENV": "env", "GITHUB_OUTPUT": "output", "GITHUB_PATH": "path",
		"GITHUB_STATE": "state", "GITHUB_STEP_SUMMARY": "summary",
	}
}

// commandFileMax bounds what a step may hand back in one file, in bytes;
// GitHub's limit for a step summary is the same.
const commandFileMax = 1 << 20

// eventFile is what caused the job, as JSON: GITHUB_EVENT_PATH.
const eventFile = "event.json"

// putCommandFiles gives the step its script and empty files to write to. What
// the step before did not write to is empty still. The event is put once.
func (s *steps) putCommandFiles(ctx context.Context, file, script string, step *current) error {
	files := map[string]string{file: script}
	if !s.event {
		github, _ := step.scope.Contexts["github"].(map[string]any)
		event, err := eventJSON(github["event"])
		if err != nil {
			return err
		}
		files[eventFile], s.event = event, true
	}
	for _, file := range commandFiles() {
		if !s.blank[file] {
			files[file] = ""
		}
	}
	s.blank = map[string]bool{}
	return s.put(ctx, files)
}

// put writes files below sandbox.Run, readable by root in the box only.
func (s *steps) put(ctx context.Context, files map[string]string) error {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		h := &tar.Header{Name: name, Mode: 0o600, Size: int64(len(files[name])), Typeflag: tar.TypeReg}
		if err := w.WriteHeader(h); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if _, err := w.Write([]byte(files[name])); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("step files: %w", err)
	}
	if err := s.box.Put(ctx, sandbox.Run, &b); err != nil {
		return fmt.Errorf("step files: %w", err)
	}
	return nil
}

func eventJSON(event any) (string, error) {
	if event == nil {
		event = map[string]any{}
	}
	b, err := json.Marshal(event)
	if err != nil {
		return "", fmt.Errorf("%s: %w", eventFile, err)
	}
	return string(b), nil
}

// readCommandFiles takes what the step wrote for later steps, and adds its
// outputs to those that it printed: also those of a step whose time is over.
func (s *steps) readCommandFiles(ctx context.Context, step *current, outputs map[string]string) error {
	ctx, cancel := s.detached(ctx)
	defer cancel()
	// Before what can be wrong with the rest: a summary says why a step failed.
	if err := s.readSummary(ctx, step); err != nil {
		return err
	}
	env, err := s.pairs(ctx, "env")
	if err != nil {
		return err
	}
	for k := range env {
		if strings.HasPrefix(k, "GITHUB_") || strings.HasPrefix(k, "RUNNER_") {
			return fmt.Errorf("GITHUB_ENV: %s cannot be set by a step", k)
		}
	}
	maps.Copy(s.env, env)
	b, err := s.commandFile(ctx, "path")
	if err != nil {
		return err
	}
	s.path = append(parsePath(string(b)), s.path...)
	// State is for a later part of the same action. A composite action has
	// none; what a step writes is checked as it would be elsewhere.
	if _, err := s.pairs(ctx, "state"); err != nil {
		return err
	}
	written, err := s.pairs(ctx, "output")
	maps.Copy(outputs, written)
	return err
}

// readSummary hands on what the step says of itself. One that is too long, or
// no file, is dropped, and the step does not fail for it: as on GitHub.
func (s *steps) readSummary(ctx context.Context, step *current) error {
	b, err := s.commandFile(ctx, "summary")
	switch {
	case errors.Is(err, sandbox.ErrDied), ctx.Err() != nil:
		return err
	case err != nil:
		s.out.notice(step.index, fmt.Sprintf("the summary is dropped, it may have at most 1 MiB: %v", err))
	case len(b) > 0:
		return s.out.summary(step.index, string(b))
	}
	return nil
}

func (s *steps) pairs(ctx context.Context, file string) (map[string]string, error) {
	b, err := s.commandFile(ctx, file)
	if err != nil {
		return nil, err
	}
	m, err := parsePairs(string(b))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", variable(file), err)
	}
	return m, nil
}

// variable is the name that a step knows a command file by.
func variable(file string) string {
	for v, f := range commandFiles() {
		if f == file {
			return v
		}
	}
	return file
}

func (s *steps) commandFile(ctx context.Context, file string) ([]byte, error) {
	b, err := s.box.Get(ctx, sandbox.Run+"/"+file, commandFileMax)
	s.blank[file] = err == nil && len(b) == 0
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // the step removed it: it says nothing
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", variable(file), err)
	}
	return b, nil
}

// parsePath reads the format of GITHUB_PATH: a directory a line, the last of
// which is searched first.
func parsePath(text string) []string {
	var dirs []string
	for line := range strings.Lines(text) {
		if dir := strings.TrimRight(line, "\r\n"); dir != "" {
			dirs = append(dirs, dir)
		}
	}
	slices.Reverse(dirs)
	return dirs
}

// parsePairs reads the format of GITHUB_ENV and GITHUB_OUTPUT: NAME=VALUE
// lines, and NAME<<DELIMITER blocks (docs.github.com, "Workflow commands").
func parsePairs(text string) (map[string]string, error) {
	m := map[string]string{}
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	for i := 0; i < len(lines); i++ {
		line := strings.TrimSuffix(lines[i], "\r")
		if line == "" {
			continue
		}
		eq, heredoc := strings.Index(line, "="), strings.Index(line, "<<")
		switch {
		case heredoc > 0 && (eq < 0 || heredoc < eq):
			name, end := line[:heredoc], line[heredoc+2:]
			from := i + 1
			for i++; i < len(lines) && strings.TrimSuffix(lines[i], "\r") != end; i++ {
			}
			if i == len(lines) || end == "" {
				return nil, fmt.Errorf("line %d: no end %q of %q", from, end, name)
			}
			m[name] = strings.Join(lines[from:i], "\n")
		case eq > 0:
			m[line[:eq]] = line[eq+1:]
		default:
			return nil, fmt.Errorf("line %d: want NAME=VALUE or NAME<<DELIMITER", i+1)
		}
	}
	return m, nil
}
