package servertest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// freezeTimeout bounds how long a thread may go on in the kernel after the signal.
const freezeTimeout = time.Minute

// Freeze stops processes and waits until each of their threads stands: the signal
// alone has been sent, not heard, when kill returns, and a thread that runs on
// another processor meanwhile may still answer a request. A process that is gone is
// no error.
func Freeze(pids ...int) error {
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("freeze process %d: %w", pid, err)
		}
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(freezeTimeout); ; <-tick.C {
		left, err := running(pids)
		if err != nil || left == 0 {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("freeze: a thread of process %d still runs after %v", left, freezeTimeout)
		}
	}
}

// running is one of the processes that has a thread which does not stand; 0 is none.
func running(pids []int) (int, error) {
	for _, pid := range pids {
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil {
			return 0, err
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				continue // it is gone
			}
			// PID (NAME) STATE …, where the name may have anything in it: proc(5).
			_, rest, ok := bytes.Cut(text[max(0, bytes.LastIndexByte(text, ')')):], []byte(") "))
			if !ok || len(rest) == 0 {
				return 0, fmt.Errorf("%s: %q", file, text)
			}
			if !bytes.ContainsRune([]byte("TtZX"), rune(rest[0])) {
				return pid, nil
			}
		}
	}
	return 0, nil
}
