package netns

import (
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// Of returns a descriptor of the network namespace that a socket was made in,
// close-on-exec; the caller owns it. A socket cannot be mistaken for another
// box's, as a process id can. It needs CAP_NET_ADMIN over the namespace (EPERM):
// an agent without privileges has no such right outside of its boxes.
func Of(socket int) (int, error) {
	fd, err := unix.IoctlRetInt(socket, unix.SIOCGSKNS)
	if err != nil {
		return -1, fmt.Errorf("network namespace of a socket: %w", err)
	}
	unix.CloseOnExec(fd)
	return fd, nil
}

// In calls f on a thread that lives in a network namespace and ends after it.
// Sockets that f makes stay in the namespace wherever they are used; what f
// starts on other goroutines does not. It needs CAP_SYS_ADMIN.
func In(ns int, f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends here
		if unix.Gettid() == unix.Getpid() {
			// The main thread would not end, but stay in the namespace.
			defer runtime.UnlockOSThread()
			done <- In(ns, f)
			return
		}
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter a network namespace: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}
