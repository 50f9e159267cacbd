package native

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/kernel"
)

// Destroy implements sandbox.Runtime. It works from the name alone, whichever
// process made the box and however far it came, and may be repeated. The
// directory goes last, since it is what List reads.
func (r *Runtime) Destroy(ctx context.Context, name string) error {
	release, err := r.names.Hold(ctx, name)
	if err != nil {
		return fmt.Errorf("native: %w", err)
	}
	defer release()
	if err := r.destroy(ctx, name); err != nil {
		return fmt.Errorf("native: destroy box %s: %w", name, err)
	}
	return nil
}

// Close removes the control groups above those of the boxes, if no box is left
// in them, and lets go of the guest program. Boxes are not touched.
func (r *Runtime) Close() error {
	err := r.guest.Close()
	if r.groups == nil {
		return err
	}
	for _, dir := range r.groups.dirs("") {
		for _, d := range []string{dir, filepath.Dir(dir)} { // ours, and the one that installations share
			rmdir := unix.Rmdir(d)
			if rmdir != nil && !errors.Is(rmdir, unix.EBUSY) && !errors.Is(rmdir, unix.ENOTEMPTY) && !errors.Is(rmdir, unix.ENOENT) {
				err = errors.Join(err, fmt.Errorf("native: remove cgroup %s: %w", d, rmdir))
			}
		}
	}
	return err
}

func (r *Runtime) destroy(ctx context.Context, name string) error {
	if _, err := os.Stat(r.dir(name)); errors.Is(err, fs.ErrNotExist) {
		return nil // the first thing made and the last removed
	}
	r.mu.Lock()
	b := r.boxes[name]
	r.mu.Unlock()
	loop := -1
	if b != nil {
		if err := b.end(ctx); err != nil {
			return err
		}
		if b.disk != nil {
			loop = b.disk.Loop
		}
		r.cfg.Trace("native.ended")
	}
	if err := r.clear(ctx, name); err != nil {
		return err
	}
	r.cfg.Trace("native.cleared")
	if !r.cfg.Unprivileged {
		if err := kernel.Gone(ctx, r.dir(name), loop); err != nil {
			return err
		}
	}
	if err := r.ids.Release(name); err != nil {
		return err
	}
	r.cfg.Trace("native.released")
	if err := os.RemoveAll(r.dir(name)); err != nil {
		return err
	}
	r.mu.Lock()
	delete(r.boxes, name)
	r.mu.Unlock()
	return nil
}

// clear kills what runs in the box and waits until it is gone.
func (r *Runtime) clear(ctx context.Context, name string) error {
	if r.groups == nil {
		return r.clearProcess(ctx, name)
	}
	for _, dir := range r.groups.dirs(name) {
		err := kernel.Poll(ctx, "cgroup "+dir+" is in use", func() (bool, error) {
			err := unix.Rmdir(dir)
			if err == nil || errors.Is(err, unix.ENOENT) {
				return true, nil
			}
			if !errors.Is(err, unix.EBUSY) {
				return false, fmt.Errorf("remove cgroup %s: %w", dir, err)
			}
			return false, killGroup(dir)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// killGroup kills the processes of a control group that run in another pid
// namespace than ours. The others are an agent whose thread passes through
// while it starts a box.
func killGroup(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("processes of %s: %w", dir, err)
	}
	own, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return fmt.Errorf("own pid namespace: %w", err)
	}
	var all error
	for _, word := range strings.Fields(string(b)) {
		ns, err := os.Readlink("/proc/" + word + "/ns/pid")
		if err != nil || ns == own {
			continue // dead, or an agent's
		}
		pid, err := strconv.Atoi(word)
		if err == nil {
			err = unix.Kill(pid, unix.SIGKILL)
		}
		if err != nil && !errors.Is(err, unix.ESRCH) {
			all = errors.Join(all, fmt.Errorf("kill process %s: %w", word, err))
		}
	}
	return all
}

// clearProcess is clear without control groups. Process 1 is the one that was
// recorded, if its start time still is; if the agent died before it wrote the
// record, the guest found its stream closed and is ending by itself.
func (r *Runtime) clearProcess(ctx context.Context, name string) error {
	b, err := os.ReadFile(filepath.Join(r.dir(name), "process"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	word, since, _ := strings.Cut(string(b), " ")
	if pid, err := strconv.Atoi(word); err == nil {
		err := kernel.Poll(ctx, "process 1 is alive", func() (bool, error) {
			if now, err := startTime(pid); err != nil || now != since {
				return true, nil
			}
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return false, err
			}
			return false, nil
		})
		if err != nil {
			return err
		}
	}
	life, err := os.OpenFile(filepath.Join(r.dir(name), "life"), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	err = kernel.Poll(ctx, "process 1 is alive", func() (bool, error) {
		err := unix.Flock(int(life.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			return false, nil
		}
		return err == nil, err
	})
	return errors.Join(err, life.Close())
}
