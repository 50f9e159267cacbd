package local

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
)

// A stepState is a providers.StepState as it stands in steps.json.
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
	f        *os.File
	steps    []stepState
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
	l.steps, err = readSteps(p.root, id)
	if _, torn := errors.AsType[*json.SyntaxError](err); err != nil && !torn {
		return nil, err // steps that a loss of power has torn are told again
	}
	l.f, err = p.root.OpenFile(path.Join(dirDone, id, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, fmt.Errorf("log of %s: %w", name, err)
	}
	return l, nil
}

func readSteps(root *os.Root, id string) ([]stepState, error) {
	b, err := root.ReadFile(path.Join(dirDone, id, "steps.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var steps []stepState
	if err == nil {
		err = json.Unmarshal(b, &steps)
	}
	if err != nil {
		return nil, fmt.Errorf("steps of %s: %w", id, err)
	}
	return steps, nil
}

func (l *jobLog) Write(_ time.Time, _ int, b []byte) error {
	if _, err := l.f.Write(b); err != nil {
		return fmt.Errorf("log of %s: %w", l.name, err)
	}
	return nil
}

// Step rewrites steps.json, which readers see whole.
func (l *jobLog) Step(s providers.StepState) error {
	state := stepState(s)
	known := false
	for i := range l.steps {
		if l.steps[i].Index == s.Index {
			l.steps[i], known = state, true
		}
	}
	if !known {
		l.steps = append(l.steps, state)
	}
	draft := path.Join(dirClaimed, l.name, "steps")
	if err := l.p.write(draft, l.steps, false); err != nil {
		return err
	}
	if err := l.p.root.Rename(draft, path.Join(dirDone, l.id, "steps.json")); err != nil {
		return fmt.Errorf("steps of %s: %w", l.name, err)
	}
	return nil
}

func (l *jobLog) Close(context.Context) error {
	if err := errors.Join(l.f.Sync(), l.f.Close()); err != nil {
		return fmt.Errorf("log of %s: %w", l.name, err)
	}
	return l.p.sync(path.Join(dirDone, l.id))
}
