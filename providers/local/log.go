package local

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"slices"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
)

// A stepState is a providers.StepState as it stands in steps.jsonl.
type stepState struct {
	Index      int                  `json:"index"`
	Name       string               `json:"name"`
	Started    time.Time            `json:"started,omitzero"`
	Ended      time.Time            `json:"ended,omitzero"`
	Conclusion providers.Conclusion `json:"conclusion,omitempty"`
	ExitCode   int                  `json:"exit_code"`
}

type jobLog struct {
	p        *Provider
	name, id string
	f, steps *os.File
	notes    map[string]*os.File // files that few jobs have
}

// Log opens done/ID/log to be appended to. Without a standing claim, or with
// one that was cut short before its record, it returns ErrGone.
func (p *Provider) Log(_ context.Context, name string, _ []byte) (providers.Log, error) {
	id, err := p.find(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("log of %s: %w", name, providers.ErrGone)
	}
	if err != nil {
		return nil, err
	}
	rec, err := p.recorded(id)
	if err != nil {
		return nil, err
	}
	if rec.Name != name {
		return nil, fmt.Errorf("log of %s: the claim has no record: %w", name, providers.ErrGone)
	}
	l := &jobLog{p: p, name: name, id: id}
	if l.f, err = l.open("log"); err != nil {
		return nil, err
	}
	if l.steps, err = l.open("steps.jsonl"); err != nil {
		return nil, errors.Join(err, l.f.Close())
	}
	return l, nil
}

func (l *jobLog) open(file string) (*os.File, error) {
	f, err := l.p.root.OpenFile(path.Join(dirDone, l.id, file), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, fmt.Errorf("log of %s: %w", l.name, err)
	}
	return f, nil
}

// readSteps returns the last state that was told of each step. An empty line,
// and one that was torn, tell nothing.
func readSteps(root *os.Root, id string) ([]stepState, error) {
	b, err := root.ReadFile(path.Join(dirDone, id, "steps.jsonl"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("steps of %s: %w", id, err)
	}
	var steps []stepState
	for line := range bytes.Lines(b) {
		var s stepState
		if json.Unmarshal(line, &s) != nil {
			continue
		}
		known := slices.IndexFunc(steps, func(o stepState) bool { return o.Index == s.Index })
		if known < 0 {
			steps = append(steps, s)
		} else {
			steps[known] = s
		}
	}
	return steps, nil
}

func (l *jobLog) Write(_ time.Time, _ int, b []byte) error {
	if _, err := l.f.Write(b); err != nil {
		return fmt.Errorf("log of %s: %w", l.name, err)
	}
	return nil
}

// Step appends to steps.jsonl: one system call, where a file that is replaced
// costs a new one for each state. The newline before it ends a line that a loss
// of power or a full disk has torn.
func (l *jobLog) Step(s providers.StepState) error {
	b, err := json.Marshal(stepState(s))
	if err == nil {
		_, err = fmt.Fprintf(l.steps, "\n%s\n", b)
	}
	if err != nil {
		return fmt.Errorf("steps of %s: %w", l.id, err)
	}
	return nil
}

func (l *jobLog) Close(context.Context) error {
	err := errors.Join(l.f.Sync(), l.f.Close(), l.steps.Close())
	for _, f := range l.notes {
		err = errors.Join(err, f.Sync(), f.Close())
	}
	if err != nil {
		return fmt.Errorf("log of %s: %w", l.name, err)
	}
	return l.p.sync(path.Join(dirDone, l.id))
}
