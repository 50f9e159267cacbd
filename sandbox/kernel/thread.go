package kernel

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// OnThread calls f on a thread that ends after it. The main thread is not
// used: it would stay, and the agent's memory is charged to its group.
func OnThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends here
		if syscall.Gettid() == syscall.Getpid() {
			defer runtime.UnlockOSThread()
			done <- OnThread(f) // it cannot be this one again
			return
		}
		done <- f()
	}()
	return <-done
}

// In calls f on a thread that lives in some of the namespaces of a process, named
// by its pidfd, and ends after it. The root of the thread is that of the mounts
// that it has entered. What f starts on other goroutines is not there.
func In(process, namespaces int, f func() error) error {
	return OnThread(func() error {
		// A thread that shares its root with others may not change namespaces.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("thread: %w", err)
		}
		if err := unix.Setns(process, namespaces); err != nil {
			return fmt.Errorf("enter the box: %w", err)
		}
		return f()
	})
}

// Counter reads a "key value" line of a file of a control group.
func Counter(file, key string) (int64, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, fmt.Errorf("cgroup: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, key+" "); ok {
			return strconv.ParseInt(strings.TrimSpace(rest), 10, 64)
		}
	}
	return 0, fmt.Errorf("cgroup: %s has no %s", file, key)
}

// Poll asks until done is true, an error, or the end of ctx.
func Poll(ctx context.Context, what string, done func() (bool, error)) error {
	for wait := 100 * time.Microsecond; ; wait = min(2*wait, 20*time.Millisecond) {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("%s: %w", what, context.Cause(ctx))
		case <-timer.C:
		}
	}
}
