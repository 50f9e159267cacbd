package native

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// A record is box.json: what List says about a box.
type record struct {
	Labels  sandbox.Labels `json:"labels"`
	Expires time.Time      `json:"expires"`
	Image   string         `json:"image,omitempty"` // digest, which keeps it from being pruned
}

func (r *Runtime) dir(name string) string { return filepath.Join(r.cfg.StateDir, "boxes", name) }

// record claims the name and writes down what the box will be.
func (r *Runtime) record(name string, s sandbox.Spec) error {
	b, err := json.Marshal(record{s.Labels, s.Expires, s.Image})
	if err != nil {
		return fmt.Errorf("native: box %s: record: %w", name, err)
	}
	err = os.Mkdir(r.dir(name), 0o700)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("native: box %s: %w", name, sandbox.ErrExists)
	}
	if err != nil {
		return fmt.Errorf("native: box %s: record: %w", name, err)
	}
	r.cfg.Trace("native.named")
	if err := os.WriteFile(filepath.Join(r.dir(name), "box.json"), b, 0o600); err != nil {
		return fmt.Errorf("native: box %s: record: %w", name, err)
	}
	r.cfg.Trace("native.recorded")
	return nil
}

// List implements sandbox.Runtime. A box whose record was not finished is
// listed with this installation's owner and nothing else.
func (r *Runtime) List(context.Context) ([]sandbox.Info, error) {
	entries, err := os.ReadDir(filepath.Join(r.cfg.StateDir, "boxes"))
	if err != nil {
		return nil, fmt.Errorf("native: list: %w", err)
	}
	var out []sandbox.Info
	for _, e := range entries {
		rec := record{}
		b, err := os.ReadFile(filepath.Join(r.dir(e.Name()), "box.json"))
		if err == nil {
			err = json.Unmarshal(b, &rec)
		}
		if err != nil {
			if _, err := os.Stat(r.dir(e.Name())); errors.Is(err, fs.ErrNotExist) {
				continue // destroyed meanwhile
			}
			rec = record{Labels: sandbox.Labels{Owner: r.cfg.Owner}}
		}
		out = append(out, sandbox.Info{Name: e.Name(), Labels: rec.Labels, Expires: rec.Expires})
	}
	return out, nil
}

// lockLife returns a locked file that the guest of an unprivileged box keeps
// open. Without control groups the lock is how a later agent learns that the
// box is over: it is free when nobody has the file open.
func (r *Runtime) lockLife(name string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(r.dir(name), "life"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("life lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("life lock: %w", err), f.Close())
	}
	return f, nil
}

// recordProcess writes down process 1 of an unprivileged box.
func (r *Runtime) recordProcess(name string, pid int) error {
	since, err := startTime(pid)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(r.dir(name), "process"), []byte(strconv.Itoa(pid)+" "+since), 0o600)
}
