package audit

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
)

// ErrTampered reports that the record is not what was appended to it: a line
// was changed, removed, moved or put in. Nothing is appended to such a record.
var ErrTampered = errors.New("audit record was changed")

// A chain walks over lines and checks that each follows the one before. It is
// used by readers and, for what others appended meanwhile, by the writer.
type chain struct {
	// from says which heads the first line may follow, beside the beginning.
	from   func(Head) bool
	file   string // in which the line at head is
	before Head   // what the line at head follows
	head   Head
	last   Event     // of the line at head
	junk   int64     // bytes behind the last good line
	digest hash.Hash // of those bytes
	start  int       // number of the line at which they begin
}

// bad is a line that breaks the chain.
type bad struct {
	file string
	line int
	err  error
}

func (b *bad) Error() string {
	if b.line == 0 { // the writer knows only the end of the file
		return fmt.Sprintf("%s: %v: %v (verify the record to see where)", b.file, ErrTampered, b.err)
	}
	return fmt.Sprintf("%s:%d: %v: %v", b.file, b.line, ErrTampered, b.err)
}

func (b *bad) Unwrap() []error { return []error{ErrTampered, b.err} }

// take judges one line with its newline. ok says that it is the next event. A
// line that never was whole waits for the record of its repair; a line that was
// whole and is wrong ends the walk.
func (c *chain) take(path string, n int, line []byte) (ok bool, err error) {
	r, head, err := decode(bytes.TrimSuffix(line, []byte("\n")))
	if err == nil {
		err = c.follows(r, filepath.Base(path))
	}
	if errors.Is(err, errTorn) {
		return false, c.skip(n, line)
	}
	if err == nil {
		err = c.repaired(r)
	}
	if err != nil && c.junk > 0 {
		n = c.start // people look for the first bad line
		err = fmt.Errorf("%w; and the line behind it: %w", errTorn, err)
	}
	if err != nil {
		return false, &bad{path, n, err}
	}
	c.file, c.before, c.head, c.last = filepath.Base(path), Head{r.Seq - 1, r.Prev}, head, r.Event
	c.from, c.junk = nil, 0
	return true, nil
}

// follows reports whether next can be the name of the file behind file.
func follows(next, file string) bool { return monthFile(next) && next > file }

// follows checks the links of a line whose own hash is good.
func (c *chain) follows(r record, file string) error {
	if r.Action == actionContinue && !follows(r.Object, file) {
		return fmt.Errorf("names %q, which cannot follow", r.Object)
	}
	if c.from != nil && c.from(Head{r.Seq - 1, r.Prev}) {
		return nil
	}
	switch want := c.head.Seq + 1; {
	case r.Seq > want:
		return fmt.Errorf("seq is %d, want %d: lines before it were deleted or moved", r.Seq, want)
	case r.Seq < want:
		return fmt.Errorf("seq is %d, want %d: the line was moved or repeated", r.Seq, want)
	case r.Prev != c.head.prev():
		return errors.New("does not follow the line before it: that one was edited or replaced")
	case c.file != "" && c.file != file && (c.last.Action != actionContinue || c.last.Object != file):
		return fmt.Errorf("the last line of %s does not say that %s follows", c.file, file)
	case c.file == file && c.last.Action == actionContinue && r.Action != actionRepaired:
		return fmt.Errorf("the line before it says that %s follows", c.last.Object)
	}
	return nil
}

func (c *chain) skip(n int, line []byte) error {
	if c.junk == 0 {
		c.digest, c.start = sha256.New(), n
	}
	c.junk += int64(len(line))
	_, err := c.digest.Write(line)
	return err
}

// repaired compares what was skipped with what the next line says of it.
func (c *chain) repaired(r record) error {
	want := c.skipped()
	switch {
	case r.Action != actionRepaired && c.junk == 0:
		return nil
	case r.Action != actionRepaired:
		return errors.New("is no record of a repair")
	case c.from != nil && c.junk == 0:
		return nil // the walk began behind what was skipped
	case r.Detail["bytes"] != want["bytes"] || r.Detail["sha256"] != want["sha256"]:
		return errors.New("states a repair of other bytes than those before it")
	}
	return nil
}

// skipped is the detail of a repair of what was skipped so far.
func (c *chain) skipped() map[string]string {
	sum := sha256.New().Sum(nil)
	if c.junk > 0 {
		sum = c.digest.Sum(nil)
	}
	return map[string]string{"bytes": strconv.FormatInt(c.junk, 10), "sha256": hex.EncodeToString(sum)}
}

// lines calls each for every whole line of r, with its newline and its number
// from 1, and returns what is behind the last newline. A line that is longer
// than an event can be comes in pieces, which are no lines of a record.
func lines(r io.Reader, each func(n int, line []byte) error) (rest []byte, err error) {
	in := bufio.NewReaderSize(r, maxLine+1)
	for n := 1; ; {
		line, err := in.ReadSlice('\n')
		whole := err == nil
		switch {
		case errors.Is(err, io.EOF):
			return bytes.Clone(line), nil
		case !whole && !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
		if err := each(n, line); err != nil {
			return nil, err
		}
		if whole {
			n++
		}
	}
}

// months lists the files of a record in the order of the chain.
func months(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("audit: %w", err)
	}
	var names []string
	for _, e := range entries { // sorted by name
		if monthFile(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

func monthFile(name string) bool {
	ok, err := regexp.MatchString(`^\d{4}-\d{2}\.jsonl$`, name)
	return ok && err == nil
}

// openFile opens a file of the record. It follows no link: whoever can put one
// here would choose what the agent appends to.
func openFile(dir, name string, flag int) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, name), flag|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, fmt.Errorf("audit: %w", err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: f.Name(), Err: errors.New("not a regular file")}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("audit: %w", err), f.Close())
	}
	return f, nil
}
