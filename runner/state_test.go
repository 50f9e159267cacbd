package runner

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What shares the lock of an agent that was killed ends a moment later: the next
// life waits for it. A living agent keeps the lock, and is left alone.
func TestStateIsTakenFromTheDead(t *testing.T) {
	t.Parallel()
	for _, dies := range []bool{true, false} {
		dir := t.TempDir()
		before, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
		if err == nil {
			err = unix.Flock(int(before.Fd()), unix.LOCK_EX)
		}
		if err != nil {
			t.Fatal(err)
		}
		closed := make(chan error, 1)
		if dies {
			time.AfterFunc(50*time.Millisecond, func() { closed <- before.Close() })
		}
		s, err := OpenState(dir)
		switch {
		case dies && err != nil:
			t.Errorf("OpenState while a dead agent's lock goes: %v, want the state", err)
		case !dies && !errors.Is(err, ErrInUse):
			t.Errorf("OpenState beside a living agent: %v, want ErrInUse", err)
		}
		if !dies {
			closed <- before.Close()
		}
		if err := <-closed; err != nil {
			t.Error(err)
		}
		if s != nil {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}
