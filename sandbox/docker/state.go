package docker

import (
	"context"
	"fmt"
	"strings"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine"
)

// answered is a file beside the record: the engine has said whether it made the
// container. Without it the engine may still be about to.
const answered = "answered"

// List implements sandbox.Runtime: the containers with our labels, and what has
// a directory and no container.
func (r *Runtime) List(ctx context.Context) ([]sandbox.Info, error) {
	var found []container.Summary
	err := r.patiently(ctx, func() (err error) {
		found, err = r.engine.ContainerList(ctx, container.ListOptions{
			All: true, Filters: filters.NewArgs(filters.Arg("label", engine.LabelRuntime+"="+r.state.ID)),
		})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("docker: list: %w", err)
	}
	var out []sandbox.Info
	for _, c := range found {
		if len(c.Names) > 0 { // or it is on its way out
			out = append(out, engine.Info(strings.TrimPrefix(c.Names[0], "/"), c.Labels))
		}
	}
	if out, err = r.state.Others(out); err != nil {
		return nil, fmt.Errorf("docker: list: %w", err)
	}
	return out, nil
}
