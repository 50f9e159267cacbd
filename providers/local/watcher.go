package local

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A watcher waits for a name to appear in a directory. Without inotify (its
// instances are 128 a user by default) it only waits.
type watcher struct{ f *os.File }

func newWatcher(dir string) watcher {
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		return watcher{}
	}
	f := os.NewFile(uintptr(fd), "inotify")
	mask := uint32(unix.IN_MOVED_TO | unix.IN_CREATE | unix.IN_ONLYDIR | unix.IN_DONT_FOLLOW)
	if _, err := unix.InotifyAddWatch(fd, dir, mask); err != nil {
		_ = f.Close() // nothing was written to it
		return watcher{}
	}
	return watcher{f}
}

func (w watcher) close() {
	if w.f != nil {
		_ = w.f.Close() // nothing was written to it
	}
}

// wait returns nil after an event or after d, and ctx's error when ctx ends.
func (w watcher) wait(ctx context.Context, d time.Duration) error {
	if w.f == nil {
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
		}
		return ctx.Err()
	}
	if err := w.f.SetReadDeadline(time.Now().Add(d)); err != nil {
		return err
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		_ = w.f.SetReadDeadline(time.Unix(1, 0)) // the file is open until wait returns
	})
	var events [4096]byte // what happened does not matter: the directory is read again
	_, err := w.f.Read(events[:])
	if !stop() {
		<-interrupted
	}
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return ctx.Err()
}
