package local

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
)

// Submit puts a job into the spool and returns its id. It makes the spool if
// there is none. Whether the job can be run is found out by the agent.
func Submit(dir string, j Job) (string, error) {
	root, err := openSpool(dir)
	if err != nil {
		return "", err
	}
	b, err := json.MarshalIndent(j, "", "  ")
	if err != nil {
		return "", errors.Join(fmt.Errorf("job: %w", err), root.Close())
	}
	id := time.Now().UTC().Format("20060102T150405Z-") + strings.ToLower(rand.Text())[:12]
	draft := path.Join(dirNew, "."+id)
	err = root.WriteFile(draft, append(b, '\n'), 0o644)
	if err == nil {
		err = root.Rename(draft, path.Join(dirNew, id+extension))
	}
	if err = errors.Join(err, root.Close()); err != nil {
		return "", fmt.Errorf("job: %w", err)
	}
	return id, nil
}

// Cancel asks for a job to be stopped, also if it is not claimed yet.
func Cancel(dir, id string) error {
	return withSpool(dir, id, func(root *os.Root) error {
		return root.WriteFile(path.Join(dirCancel, id), nil, 0o644)
	})
}

// Wait returns the result of a job when there is one, or ctx's error.
func Wait(ctx context.Context, dir, id string) (Result, error) {
	for {
		seen := newWatcher(filepath.Join(dir, dirDone, id))
		r, err := ReadResult(dir, id)
		if errors.Is(err, fs.ErrNotExist) {
			most := rescan
			if seen.f == nil {
				most = rescan / 100 // nobody has claimed it: there is no directory to watch
			}
			err = seen.wait(ctx, most)
			seen.close()
			if err != nil {
				return Result{}, fmt.Errorf("result of %s: %w", id, err)
			}
			continue
		}
		seen.close()
		return r, err
	}
}

// ReadResult returns the result of a job; fs.ErrNotExist if it has none yet.
func ReadResult(dir, id string) (Result, error) {
	var r Result
	err := withSpool(dir, id, func(root *os.Root) error {
		b, err := root.ReadFile(path.Join(dirDone, id, "result.json"))
		if err == nil {
			err = json.Unmarshal(b, &r)
		}
		return err
	})
	return r, err
}

// OpenLog opens what the job has printed so far, which may be very long. The
// error is fs.ErrNotExist if nothing has been printed.
func OpenLog(dir, id string) (io.ReadCloser, error) {
	var f *os.File
	err := withSpool(dir, id, func(root *os.Root) (err error) {
		f, err = root.Open(path.Join(dirDone, id, "log"))
		return err
	})
	if err != nil {
		return nil, err
	}
	return f, nil
}

// Find returns the id of the job that an agent claimed under name; fs.ErrNotExist
// if the spool has none.
func Find(dir, name string) (string, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", fmt.Errorf("spool: %w", err)
	}
	found := ""
	ids, err := fs.ReadDir(root.FS(), dirDone)
	for _, d := range ids {
		b, rerr := root.ReadFile(path.Join(dirDone, d.Name(), "claim.json"))
		var r record
		if rerr == nil && json.Unmarshal(b, &r) == nil && r.Name == name {
			found = d.Name()
		}
	}
	if err = errors.Join(err, root.Close()); err == nil && found == "" {
		err = fs.ErrNotExist
	}
	if err != nil {
		return "", fmt.Errorf("job %s: %w", name, err)
	}
	return found, nil
}

// ReadSteps returns the states of a job's steps, in the order in which they
// were first told.
func ReadSteps(dir, id string) ([]providers.StepState, error) {
	var states []providers.StepState
	err := withSpool(dir, id, func(root *os.Root) error {
		steps, err := readSteps(root, id)
		for _, s := range steps {
			states = append(states, providers.StepState(s))
		}
		return err
	})
	return states, err
}

func withSpool(dir, id string, do func(*os.Root) error) error {
	if !validID(id) {
		return fmt.Errorf("job %q: that is not the id of a job", id)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("spool: %w", err)
	}
	if err := errors.Join(do(root), root.Close()); err != nil {
		return fmt.Errorf("job %s: %w", id, err)
	}
	return nil
}
