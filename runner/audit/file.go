package audit

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// tailWindow is how much of the end of a file is read to find the last line,
// in bytes: more than any line and the repairs of it that were cut short too.
const tailWindow = 4 * maxLine

// FileOptions are what OpenFile needs to know. The zero value is good.
type FileOptions struct {
	// Trace is called between two outside effects, for crash tests:
	// "audit.continued" between the last line of a month and the next file,
	// "audit.written" between a durable line and its fsync. nil is none.
	Trace func(point string)
}

// A File is a record on disk, as the package comment describes it. Several
// processes may have it open. It implements Sink.
type File struct {
	dir    string
	trace  func(string)
	fsync  func(*os.File) error
	lock   *os.File
	synced atomic.Uint64 // seq up to which everything is on disk

	syncing sync.Mutex    // held during an fsync; those who wait for it share the next one
	turn    chan struct{} // held by whoever uses the fields below

	file   *os.File // the newest month, nil if there is none yet
	size   int64    // of file, as far as chain has read it
	chain  chain
	broken error // why nothing can be appended any more
}

var _ Sink = (*File)(nil)

// OpenFile opens the record in dir, which is made if it is absent, and closes
// a line that a crash left torn. It returns ErrTampered if the end of the
// record is not what was appended to it; then move dir away, keep it for whoever
// asks, and begin a new one. It reads only the end: Verify reads everything.
func OpenFile(dir string, o FileOptions) (*File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("audit: %w", err)
	}
	lock, err := openFile(dir, "lock", os.O_RDWR|os.O_CREATE)
	if err != nil {
		return nil, err
	}
	f := &File{dir: dir, trace: o.Trace, fsync: (*os.File).Sync, lock: lock, turn: make(chan struct{}, 1)}
	if f.trace == nil {
		f.trace = func(string) {}
	}
	if err := f.open(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (f *File) open() error {
	if err := f.flock(context.Background()); err != nil {
		return err
	}
	defer f.unlock()
	return f.catchUp()
}

// findHead makes the newest file the current one, and finds the last line of
// the record, which is in the file before if a crash left the newest empty.
func (f *File) findHead() error {
	names, err := months(f.dir)
	if err != nil || len(names) == 0 {
		return err
	}
	newest := len(names) - 1
	for i := newest; i >= 0; i-- {
		c := chain{from: func(Head) bool { return true }}
		end, from, err := f.tail(names[i], &c)
		switch {
		case err != nil:
			return err
		case c.head == Head{} && from > 0:
			return fmt.Errorf("%s: %w: no line of the record in its last %d bytes", filepath.Join(f.dir, names[i]), ErrTampered, tailWindow)
		case c.head == Head{}:
			continue
		case i == newest:
			f.size = end
		}
		f.chain = c
		f.chain.junk = 0 // catchUp reads it again, and repairs it
		break
	}
	f.file, err = openFile(f.dir, names[newest], os.O_RDWR|os.O_APPEND)
	return err
}

// tail takes the last lines of a file. It returns where the last good one ends
// and from where it read.
func (f *File) tail(name string, c *chain) (end, from int64, err error) {
	file, err := openFile(f.dir, name, os.O_RDONLY)
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	info, err := file.Stat()
	if err != nil {
		return 0, 0, fmt.Errorf("audit: %w", err)
	}
	from = max(0, info.Size()-tailWindow)
	at, skipping := from, from > 0
	_, err = lines(io.NewSectionReader(file, from, info.Size()-from), func(_ int, line []byte) error {
		at += int64(len(line))
		if skipping {
			skipping = false // the window begins in the middle of it
			return nil
		}
		ok, err := c.take(file.Name(), 0, line)
		if ok {
			end = at
		}
		return err
	})
	if err != nil {
		return 0, 0, fmt.Errorf("audit: %w", err)
	}
	return end, from, nil
}

// Append implements Sink.
func (f *File) Append(ctx context.Context, e Event) error {
	seq, err := f.append(ctx, e)
	if err == nil && Durable(e.Action) {
		f.trace("audit.written")
		err = f.commit(seq)
	}
	if err != nil {
		return fmt.Errorf("audit %s: %w", e.Action, err)
	}
	return nil
}

func (f *File) append(ctx context.Context, e Event) (seq uint64, err error) {
	select {
	case f.turn <- struct{}{}:
		defer func() { <-f.turn }()
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
	if f.broken != nil {
		return 0, f.broken
	}
	if e.Action == actionContinue || e.Action == actionRepaired {
		return 0, errors.New("the record writes this event itself")
	}
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	if y := e.Time.UTC().Year(); y < 0 || y > 9999 {
		return 0, fmt.Errorf("time %v: year out of range", e.Time)
	}
	if err := f.flock(ctx); err != nil {
		return 0, err
	}
	defer f.unlock()
	if err := f.catchUp(); err != nil {
		return 0, err
	}
	if err := ctx.Err(); err != nil { // last chance: from here on it is written
		return 0, err
	}
	if err := f.turnPage(e.Time); err != nil {
		return 0, err
	}
	if err := f.write(nil, e); err != nil {
		return 0, err
	}
	return f.chain.head.Seq, nil
}

// write appends one event, behind a prefix that ends a torn line. What a full
// disk took of it is cut off again, since nobody was told that it is stored.
func (f *File) write(prefix []byte, e Event) error {
	line, head, err := encode(f.chain.head, e)
	if err != nil {
		return err
	}
	n, err := f.file.Write(append(prefix, line...))
	if err != nil {
		if n > 0 {
			if cut := f.file.Truncate(f.size); cut != nil {
				err = errors.Join(err, cut)
				f.broken = fmt.Errorf("record is broken until the agent is started again: %w", err)
			}
		}
		return err
	}
	f.size += int64(n)
	f.chain.before, f.chain.head, f.chain.last = f.chain.head, head, e
	f.chain.file = filepath.Base(f.file.Name())
	return nil
}

// catchUp reads what others appended since we last looked, checks that it
// follows, and closes a torn line at its end: whoever was writing it is dead,
// because we have the lock.
func (f *File) catchUp() error {
	if f.file == nil {
		if err := f.findHead(); err != nil {
			return err
		}
	}
	for f.file != nil {
		info, err := f.file.Stat()
		if err != nil {
			return err
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Nlink == 0 {
			return fmt.Errorf("%s: %w: the file was removed", f.file.Name(), ErrTampered)
		}
		if info.Size() < f.size {
			return fmt.Errorf("%s: %w: lines were cut off", f.file.Name(), ErrTampered)
		}
		if info.Size() > f.size {
			if err := f.takeNew(info.Size()); err != nil {
				return err
			}
		}
		if f.chain.last.Action != actionContinue || f.chain.last.Object == filepath.Base(f.file.Name()) {
			return nil
		}
		if err := f.next(f.chain.last.Object); err != nil {
			return err
		}
	}
	return nil
}

// takeNew reads the file from the last line we know up to size.
func (f *File) takeNew(size int64) error {
	known, end := f.chain, f.size // the last good line: what a failed repair is tried again from
	at := f.size
	rest, err := lines(io.NewSectionReader(f.file, f.size, size-f.size), func(_ int, line []byte) error {
		at += int64(len(line))
		ok, err := f.chain.take(f.file.Name(), 0, line)
		if ok {
			known, end = f.chain, at
		}
		return err
	})
	var prefix []byte
	if err == nil && len(rest) > 0 {
		// It may be whole but for its newline; then it is an event after all.
		prefix = []byte("\n")
		_, err = f.chain.take(f.file.Name(), 0, append(rest, '\n'))
	}
	torn := f.chain.junk > 0 || prefix != nil
	if err == nil && torn {
		err = f.repair(prefix, size)
	}
	if err != nil {
		f.chain, f.size = known, end
		return err
	}
	if !torn {
		f.size = end
	}
	return nil
}

// repair closes a torn line with a record of what was passed over.
func (f *File) repair(prefix []byte, size int64) error {
	f.size = size // what was torn stays, even if the disk is full
	err := f.write(prefix, Event{
		Time: time.Now(), Action: actionRepaired, Object: filepath.Base(f.file.Name()), Result: "ok", Detail: f.chain.skipped(),
	})
	if err != nil {
		return err
	}
	f.chain.junk = 0
	return f.syncTo()
}

// turnPage begins the file of a new month. It never goes back to an older one.
func (f *File) turnPage(now time.Time) error {
	name := now.UTC().Format("2006-01") + ".jsonl"
	if f.file == nil {
		return f.next(name)
	}
	if name <= filepath.Base(f.file.Name()) {
		return nil
	}
	if err := f.write(nil, Event{Time: now, Action: actionContinue, Object: name, Result: "ok"}); err != nil {
		return err
	}
	f.trace("audit.continued")
	return f.next(name)
}

// next leaves the current file, all of it on disk, for the one that follows.
func (f *File) next(name string) error {
	if f.file != nil {
		if err := f.syncTo(); err != nil {
			return err
		}
	}
	file, err := openFile(f.dir, name, os.O_RDWR|os.O_APPEND|os.O_CREATE)
	if err != nil {
		return err
	}
	if err := syncDir(f.dir); err != nil {
		return errors.Join(err, file.Close())
	}
	old := f.file
	f.file, f.size = file, 0
	if old != nil {
		return old.Close()
	}
	return nil
}
