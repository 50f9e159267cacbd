package audit

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
)

// commit returns when the line seq is on disk. Jobs run in parallel: while one
// fsync runs, the others wait, and the next one serves all of them.
func (f *File) commit(seq uint64) error {
	f.syncing.Lock()
	defer f.syncing.Unlock()
	if f.synced.Load() >= seq {
		return nil
	}
	f.turn <- struct{}{}
	file, upTo, broken := f.file, f.chain.head.Seq, f.broken
	<-f.turn
	if broken != nil {
		return broken
	}
	if file == nil {
		return os.ErrClosed
	}
	err := f.fsync(file)
	if errors.Is(err, os.ErrClosed) && f.synced.Load() >= seq {
		return nil // the month ended meanwhile, and was put on disk before it was closed
	}
	if err != nil {
		f.turn <- struct{}{}
		defer func() { <-f.turn }()
		return f.breakDown(err)
	}
	f.advance(upTo)
	return nil
}

// syncTo puts the current file on disk. The caller has the turn.
func (f *File) syncTo() error {
	upTo := f.chain.head.Seq
	if err := f.fsync(f.file); err != nil {
		return f.breakDown(err)
	}
	f.advance(upTo)
	return nil
}

// breakDown ends all appending. After a failed fsync the kernel may have thrown
// the pages away and call the next one a success (fsync(2), "EIO").
func (f *File) breakDown(err error) error {
	f.broken = fmt.Errorf("record is broken until the agent is started again: fsync: %w", err)
	return f.broken
}

func (f *File) advance(seq uint64) {
	for {
		old := f.synced.Load()
		if old >= seq || f.synced.CompareAndSwap(old, seq) {
			return
		}
	}
}

// Close closes the record. It writes nothing; what was appended and is not
// durable is left to the kernel.
func (f *File) Close() error {
	f.syncing.Lock()
	defer f.syncing.Unlock()
	f.turn <- struct{}{}
	defer func() { <-f.turn }()
	if errors.Is(f.broken, os.ErrClosed) {
		return nil
	}
	f.broken = os.ErrClosed
	err := f.lock.Close()
	if f.file != nil {
		err = errors.Join(err, f.file.Close())
		f.file = nil
	}
	return err
}

const (
	// lockPoll is how often a busy lock is tried again. Others hold it for one
	// write, some microseconds.
	lockPoll = 200 * time.Microsecond
	// lockWait bounds the wait for a process that was stopped while it had the
	// lock. It covers a repair with its fsync on a slow disk.
	lockWait = 10 * time.Second
)

// flock takes the lock that writers of all processes share. It is polled,
// because a blocking flock(2) does not hear ctx.
func (f *File) flock(ctx context.Context) error {
	if syscall.Flock(int(f.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) == nil {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, lockWait, errors.New("waited "+lockWait.String()))
	defer cancel()
	again := time.NewTicker(lockPoll)
	defer again.Stop()
	for {
		select {
		case <-again.C:
		case <-ctx.Done():
			return fmt.Errorf("lock %s: held by another process: %w", f.lock.Name(), context.Cause(ctx))
		}
		err := syscall.Flock(int(f.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			return fmt.Errorf("lock %s: %w", f.lock.Name(), err)
		}
	}
}

func (f *File) unlock() {
	// It fails only for a descriptor that is not open, and then nothing is held.
	_ = syscall.Flock(int(f.lock.Fd()), syscall.LOCK_UN)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
