package containerd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sys/unix"

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
		return fmt.Errorf("containerd: %w", err)
	}
	defer release()
	if err := r.destroy(r.within(ctx), name); err != nil {
		return fmt.Errorf("containerd: destroy box %s: %w", name, err)
	}
	return nil
}

func (r *Runtime) destroy(ctx context.Context, name string) error {
	if b := r.state.Box(name); b != nil {
		if err := b.End(ctx); err != nil {
			return err
		}
		r.cfg.Trace("containerd.ended")
	}
	if err := r.remove(ctx, name); err != nil {
		return err
	}
	r.cfg.Trace("containerd.removed")
	if err := r.ids.Release(name); err != nil {
		return err
	}
	return r.state.Forget(ctx, name)
}

const (
	// exitPatience is how long the daemon may take to notice that process 1 of a
	// container has ended. It takes milliseconds, if it has not lost the news.
	exitPatience = 10 * time.Second

	// shimPatience is how long a shim may take to end that the daemon has told to,
	// which takes it milliseconds, too; and then until it has heeded SIGTERM.
	shimPatience = 2 * time.Second
)

// remove removes the task, its shim, the container, the snapshot and the lease, and
// waits until they are gone.
func (r *Runtime) remove(ctx context.Context, name string) error {
	_, err := os.Stat(r.state.Dir(name))
	known := err == nil
	var last error
	settled := false
	hurry := time.Now().Add(exitPatience)
	var forgotten time.Time // when the daemon first knew no task
	err = kernel.Poll(ctx, "remove the container", func() (bool, error) {
		ok, busy := r.settled(name)
		if busy {
			last = errors.New("the daemon is still making the task")
			return false, nil
		}
		settled = settled || ok
		late := time.Now().After(hurry)
		var gone bool
		gone, last = r.endTask(ctx, name, late)
		if gone && !settled {
			gone = false
			settled, last = r.settle(ctx, name)
		}
		if gone || last != nil && late {
			gone, last = r.forgetTask(ctx, name)
		}
		if gone {
			if forgotten.IsZero() {
				forgotten = time.Now()
			}
			how := unix.Signal(0)
			if since := time.Since(forgotten); since > 5*shimPatience {
				how = unix.SIGKILL
			} else if since > shimPatience {
				how = unix.SIGTERM
			}
			gone, last = r.endShims(name, how)
			if !gone && last == nil {
				last = errors.New("a shim that the daemon has forgotten runs still")
			}
		}
		if gone {
			last = r.removeOnce(ctx, name)
			gone = last == nil
		}
		// Without a directory there is nothing of ours that List did not
		// show, and it shows nothing while the daemon is away.
		return gone || !known && away(last), nil
	})
	if err != nil {
		return errors.Join(err, last)
	}
	return nil
}

// endTask reports whether the daemon knows no task. An error is worth another try:
// the daemon is away or busy with the task. One that runs is killed by its
// process, and by the daemon if there is a hurry, and removed when the daemon
// knows that it has ended.
func (r *Runtime) endTask(ctx context.Context, name string, hurry bool) (gone bool, err error) {
	id, service := r.id(name), r.client.TaskService()
	t, err := service.Get(ctx, &tasks.GetRequest{ContainerID: id})
	if err := errgrpc.ToNative(err); err != nil {
		return errdefs.IsNotFound(err), ignore(err, errdefs.IsNotFound)
	}
	if t.Process.Status != task.Status_STOPPED {
		err := errors.New("the daemon has not seen its end yet")
		if p, _ := engine.FindProcess(int(t.Process.Pid), id); p != nil { // or it has ended
			err = errors.Join(err, p.Kill(), p.Close())
		}
		if hurry {
			_, killErr := service.Kill(ctx, &tasks.KillRequest{ContainerID: id, Signal: uint32(unix.SIGKILL), All: true})
			err = errors.Join(err, killErr)
		}
		return false, err
	}
	return r.forgetTask(ctx, name)
}

// forgetTask removes a task that has ended. The daemon says that there is none
// also of one whose removal a client did not wait for, and keeps its shim until
// it is removed once more. Of one that it is still making it removes half.
func (r *Runtime) forgetTask(ctx context.Context, name string) (gone bool, err error) {
	_, err = r.client.TaskService().Delete(ctx, &tasks.DeleteTaskRequest{ContainerID: r.id(name)})
	err = ignore(errgrpc.ToNative(err), errdefs.IsNotFound)
	return err == nil, err
}

// settle makes sure that the daemon is not about to make the task: it may be, if
// who asked for it ended before the answer. It refuses to make what it is making;
// a task that it gives to us, or fails to make for want of the ids that are
// another box's, is no other's.
func (r *Runtime) settle(ctx context.Context, name string) (bool, error) {
	_, err := r.ask(ctx, name, r.cfg.FirstID)
	if away(err) || inTheWay(err) || errors.Is(err, unix.EWOULDBLOCK) || ctx.Err() != nil {
		return false, err
	}
	return true, nil // endTask removes what we were given; or nothing can be made here
}

// inTheWay reports that the daemon has the task, or half of it.
func inTheWay(err error) bool {
	return is(err, errdefs.IsAlreadyExists) || err != nil && strings.Contains(err.Error(), "file exists")
}

// removeOnce removes what is not a process. It is done if there is no error.
func (r *Runtime) removeOnce(ctx context.Context, name string) error {
	id, snapshotter := r.id(name), r.cfg.Snapshotter
	c, err := r.client.ContainerService().Get(ctx, id)
	if err == nil {
		snapshotter = c.Snapshotter // of an earlier configuration
		err = r.client.ContainerService().Delete(ctx, id)
	}
	if err := ignore(err, errdefs.IsNotFound); err != nil {
		return err
	}
	r.cfg.Trace("containerd.deleted")
	if err := ignore(r.client.SnapshotService(snapshotter).Remove(ctx, id), errdefs.IsNotFound); err != nil {
		return err
	}
	r.cfg.Trace("containerd.freed")
	return ignore(r.client.LeasesService().Delete(ctx, leases.Lease{ID: id}), errdefs.IsNotFound)
}

// ignore is err, or nil if that is what is said of it.
func ignore(err error, is func(error) bool) error {
	if err != nil && is(err) {
		return nil
	}
	return err
}

// List implements sandbox.Runtime: the containers with our labels, and what has
// a directory and no container. A lease or a snapshot that has neither is
// containerd's to collect.
func (r *Runtime) List(ctx context.Context) ([]sandbox.Info, error) {
	ctx = r.within(ctx)
	var out []sandbox.Info
	err := r.patiently(ctx, func() error {
		found, err := r.client.ContainerService().List(ctx, fmt.Sprintf("labels.%q==%s", engine.LabelRuntime, r.state.ID))
		out = nil
		for _, c := range found {
			out = append(out, engine.Info(c.Labels[labelName], c.Labels))
		}
		return err
	})
	if err == nil {
		out, err = r.state.Others(out)
	}
	if err != nil {
		return nil, fmt.Errorf("containerd: list: %w", err)
	}
	return out, nil
}
