package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// Labels of every container.
const (
	labelOwner      = "ci.mayfly.owner"
	labelRuntime    = "ci.mayfly.runtime" // names the state directory
	labelJob        = "ci.mayfly.job"
	labelGeneration = "ci.mayfly.generation"
	labelExpires    = "ci.mayfly.expires" // RFC 3339, "" is never
)

// A record is box.json: what List says about a box whose container is not there
// (yet, or any more), and what Destroy needs to know.
type record struct {
	Labels  sandbox.Labels `json:"labels"`
	Expires time.Time      `json:"expires"`
	Image   string         `json:"image"`
}

// answered is a file beside the record: the engine has said whether it made the
// container. Without it the engine may still be about to.
const answered = "answered"

func (r *Runtime) dir(name string) string { return filepath.Join(r.cfg.StateDir, "boxes", name) }

// record claims the name and writes down what the box will be.
func (r *Runtime) record(name string, rec record) error {
	b, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("record: %w", err)
	}
	err = os.Mkdir(r.dir(name), 0o700)
	if errors.Is(err, fs.ErrExist) {
		return sandbox.ErrExists
	}
	if err != nil {
		return fmt.Errorf("record: %w", err)
	}
	r.cfg.Trace("docker.named")
	if err := os.WriteFile(filepath.Join(r.dir(name), "box.json"), b, 0o600); err != nil {
		return fmt.Errorf("record: %w", err)
	}
	r.cfg.Trace("docker.recorded")
	return nil
}

// recorded is what was written down of a box. A record that was not finished
// names this installation only.
func (r *Runtime) recorded(name string) record {
	var rec record
	b, err := os.ReadFile(filepath.Join(r.dir(name), "box.json"))
	if err != nil || json.Unmarshal(b, &rec) != nil {
		return record{Labels: sandbox.Labels{Owner: r.cfg.Owner}}
	}
	return rec
}

func (r *Runtime) labels(rec record) map[string]string {
	expires := ""
	if !rec.Expires.IsZero() {
		expires = rec.Expires.Format(time.RFC3339Nano)
	}
	return map[string]string{
		labelOwner: rec.Labels.Owner, labelRuntime: r.id, labelJob: rec.Labels.Job,
		labelGeneration: strconv.FormatInt(rec.Labels.Generation, 10), labelExpires: expires,
	}
}

// List implements sandbox.Runtime: the containers with our labels, and what has
// a directory and no container.
func (r *Runtime) List(ctx context.Context) ([]sandbox.Info, error) {
	var found []container.Summary
	err := r.patiently(ctx, func() (err error) {
		found, err = r.engine.ContainerList(ctx, container.ListOptions{
			All: true, Filters: filters.NewArgs(filters.Arg("label", labelRuntime+"="+r.id)),
		})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("docker: list: %w", err)
	}
	var out []sandbox.Info
	seen := map[string]bool{}
	for _, c := range found {
		if len(c.Names) == 0 {
			continue // on its way out
		}
		info := sandbox.Info{
			Name:   strings.TrimPrefix(c.Names[0], "/"),
			Labels: sandbox.Labels{Owner: c.Labels[labelOwner], Job: c.Labels[labelJob]},
		}
		// What somebody else wrote there is as good as nothing.
		info.Labels.Generation, _ = strconv.ParseInt(c.Labels[labelGeneration], 10, 64)
		info.Expires, _ = time.Parse(time.RFC3339Nano, c.Labels[labelExpires])
		seen[info.Name] = true
		out = append(out, info)
	}
	entries, err := os.ReadDir(filepath.Join(r.cfg.StateDir, "boxes"))
	if err != nil {
		return nil, fmt.Errorf("docker: list: %w", err)
	}
	for _, e := range entries {
		if seen[e.Name()] {
			continue
		}
		rec := r.recorded(e.Name())
		if _, err := os.Stat(r.dir(e.Name())); errors.Is(err, fs.ErrNotExist) {
			continue // destroyed meanwhile
		}
		out = append(out, sandbox.Info{Name: e.Name(), Labels: rec.Labels, Expires: rec.Expires})
	}
	return out, nil
}
