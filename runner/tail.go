package runner

import (
	"bytes"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/creds/mask"
)

const (
	// tailBytes is how much of what a service prints is kept, the end of it:
	// what says why it does not work. The rest is in nobody's way.
	tailBytes = 256 << 10

	// excerptBytes is how much of a failed health check an error shows.
	excerptBytes = 1 << 10
)

// A tail keeps the end of what a service prints until it is shown in the job's
// log. It is masked when it comes in, since what is cut off at its front could
// be half of a secret.
type tail struct {
	stream *stream

	mu   sync.Mutex
	out  *mask.Writer
	kept []byte
	cut  bool // something is gone from the front
}

func newTail(s *stream) *tail {
	t := &tail{stream: s}
	t.out = mask.NewWriter(t.keep, mask.New(nil))
	return t
}

// write implements sandbox.Output.
func (t *tail) write(_ time.Time, b []byte) error {
	set, err := t.stream.current()
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.out.Use(set); err != nil {
		return err
	}
	_, err = t.out.Write(b)
	return err
}

// keep takes what has been masked. It forgets in large pieces and whole lines.
func (t *tail) keep(b []byte) error {
	t.kept = append(t.kept, b...)
	if over := len(t.kept) - tailBytes; over > tailBytes/4 {
		if end := bytes.IndexByte(t.kept[over:], '\n'); end >= 0 {
			over += end + 1
		}
		t.kept, t.cut = append([]byte(nil), t.kept[over:]...), true
	}
	return nil
}

// show writes what was kept into the job's log, in a group of its own.
func (t *tail) show(step int, title string) error {
	t.mu.Lock()
	err := t.out.Flush()
	text, cut := t.kept, t.cut
	t.kept = nil
	t.mu.Unlock()
	if err != nil || len(text) == 0 {
		return err
	}
	head := "::group::" + title + "\n"
	if cut {
		head += noticeMark + "what it said before is left out\n"
	}
	if text[len(text)-1] != '\n' {
		text = append(text, '\n')
	}
	return t.stream.write(time.Now(), step, []byte(head+string(text)+"::endgroup::\n"))
}

// excerpt is the end of what was said, in one line.
func (t *tail) excerpt() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	_ = t.out.Flush() // keep returns no error
	text := t.kept[max(len(t.kept)-excerptBytes, 0):]
	return strings.Join(strings.Fields(strings.ToValidUTF8(string(text), "")), " ")
}
