package docker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/client"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/engine"
	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

// Destroy implements sandbox.Runtime. It works from the name alone, whichever
// process made the box and however far it came, and may be repeated. What runs
// is killed whether or not the daemon is there; for the rest a daemon that is
// away is waited for until ctx ends. The directory goes last: it was the first
// thing made.
func (r *Runtime) Destroy(ctx context.Context, name string) error {
	release, err := r.state.Names.Hold(ctx, name)
	if err != nil {
		return fmt.Errorf("docker: %w", err)
	}
	defer release()
	if err := r.destroy(ctx, name); err != nil {
		return fmt.Errorf("docker: destroy box %s: %w", name, err)
	}
	return nil
}

func (r *Runtime) destroy(ctx context.Context, name string) error {
	if b := r.state.Box(name); b != nil {
		if err := b.End(ctx); err != nil {
			return err
		}
		r.cfg.Trace("docker.ended")
	}
	if err := r.remove(ctx, name); err != nil {
		return err
	}
	r.cfg.Trace("docker.removed")
	return r.state.Forget(ctx, name)
}

// remove removes the container, with all that the engine made for it, and waits
// until it is gone.
func (r *Runtime) remove(ctx context.Context, name string) error {
	_, err := os.Stat(r.state.Dir(name))
	known := err == nil
	_, err = os.Stat(filepath.Join(r.state.Dir(name), answered))
	settled := !known || err == nil
	var last error
	hurry := time.Now().Add(exitPatience)
	err = kernel.Poll(ctx, "remove the container", func() (bool, error) {
		var gone bool
		gone, last = r.removeOnce(ctx, name, time.Now().After(hurry))
		if gone && !settled {
			settled, last = r.settle(ctx, name)
			gone = settled
		}
		// Without a directory there is nothing of ours that List did not
		// show, and it shows nothing while the daemon is away.
		return gone || !known && client.IsErrConnectionFailed(last), nil
	})
	if err != nil {
		return errors.Join(err, last)
	}
	return nil
}

// exitPatience is how long the daemon may take to notice that process 1 of a
// container has ended. It takes milliseconds, if it has not lost the news.
const exitPatience = 10 * time.Second

// removeOnce reports whether there is no container of ours with that name. An
// error is worth another try: the daemon is away or busy with the container.
//
// A container that runs is killed by its process and removed when the daemon
// knows that it has ended, unless there is a hurry. The daemon's own way to kill
// one may handle the end twice if it is on its way already, and then the parent
// process of the container and its control groups stay for as long as the daemon
// runs (Docker 20.10; often so with a stop timeout of zero).
func (r *Runtime) removeOnce(ctx context.Context, name string, hurry bool) (gone bool, err error) {
	c, err := r.engine.ContainerInspect(ctx, name)
	if errdefs.IsNotFound(err) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	if c.Config == nil || c.Config.Labels[engine.LabelRuntime] != r.state.ID {
		return true, nil // somebody else's: it was in the way of Create
	}
	if c.State != nil && c.State.Running && !hurry {
		err := errors.New("the daemon has not seen its end yet")
		if p, _ := engine.FindProcess(c.State.Pid, c.ID); p != nil { // or it has ended
			err = errors.Join(err, p.Kill(), p.Close())
		}
		return false, err
	}
	err = r.engine.ContainerRemove(ctx, c.ID, container.RemoveOptions{Force: true, RemoveVolumes: true})
	if errdefs.IsNotFound(err) {
		return true, nil
	}
	return err == nil, err
}

// settle makes sure that the engine is not about to make the container: it may
// be, if the agent ended while it asked for it. A name that it gives to us is no
// other's. A request that it has not begun to read by then makes a container
// that nobody starts and that List shows, which is what the reaper is for.
func (r *Runtime) settle(ctx context.Context, name string) (bool, error) {
	rec := r.state.Recorded(name)
	if rec.Image == "" {
		return true, nil // nothing was asked for before the record was finished
	}
	spec := sandbox.Spec{Labels: rec.Labels, Image: rec.Image, Limits: r.cfg.Limits, Expires: time.Unix(1, 0)}
	_, err := r.engine.ContainerCreate(ctx, r.config(spec), r.hostConfig(spec), nil, nil, name)
	switch {
	case err == nil:
		return r.removeOnce(ctx, name, true) // it has never run
	case errdefs.IsNotFound(err):
		return true, nil // no image, no container
	}
	return false, err // in the way is the container, half made
}
