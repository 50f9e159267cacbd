package gitea

import (
	"bytes"
	"context"
	"fmt"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/mayfly-ci/mayfly/providers"
)

const (
	// maxRow is the longest row that Gitea stores, in bytes; it cuts the rest off.
	maxRow = 64 << 10

	// maxPending is how many bytes may wait for the server before the job has to
	// wait too. It is what an ordinary job prints in all, so that a server that
	// restarts holds up few.
	maxPending = 8 << 20

	// rowCost is what a row without content weighs in maxPending.
	rowCost = 64

	// stallPatience is how long a job waits in a Write for a server that takes
	// nothing. After that the job ends, since its credentials must not outlive an
	// outage.
	stallPatience = 2 * time.Minute
)

// A jobLog is the log of one task: rows with an index from the beginning of the
// job, and the states of its steps, which name ranges of rows. It belongs to the
// claim and survives that its user closes it, so that rows that the server did
// not take are not lost.
//
// A goroutine sends while there is something to be sent; Close waits for it.
type jobLog struct {
	mu     sync.Mutex
	known  bool // first is right: not after a restart, before the server was asked
	first  integer
	rows   []logRow // that the server has not acknowledged; rows[0] has the index first
	size   int      // of them, with what rows cost
	line   []byte   // a line that has not ended
	lineAt time.Time
	progress
	sending bool
	hurry   chan struct{} // closed when nobody wants to wait for more
	moved   chan struct{} // closed when the sender got on, or ended
	dropped bool          // nothing can be told any more
	start   func()        // runs the sender
	cancel  func()        // ends it
}

// progress is how far the steps are.
type progress struct {
	steps []*stepState
	begun bool    // a step has: what was printed before is the set-up
	end   integer // of the last step that ended
	news  bool    // the server has not heard of it
}

func newJobLog() *jobLog {
	return &jobLog{known: true, hurry: make(chan struct{}), moved: make(chan struct{})}
}

// restore says that the server has rows of an earlier life.
func (l *jobLog) restore() { l.known = false }

// Write takes what a step printed. It waits while too much is unsent.
func (l *jobLog) Write(at time.Time, _ int, b []byte) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(b) > 0 && !l.dropped {
		if len(l.line) == 0 {
			l.lineAt = at
		}
		end := bytes.IndexByte(b, '\n')
		n := min(len(b), maxRow)
		if end >= 0 && end < n {
			n = end
		}
		l.line = append(l.line, b[:n]...)
		b = b[n:]
		if len(b) > 0 && b[0] == '\n' {
			b = b[1:]
			l.endLine()
		} else if len(l.line) > maxRow {
			l.cutLine()
		}
		if err := l.room(); err != nil {
			return err
		}
	}
	l.wake()
	return nil
}

// endLine makes rows of the line.
func (l *jobLog) endLine() {
	text := clean(l.line)
	l.line = l.line[:0]
	for len(text) > maxRow {
		n := boundary(text, maxRow)
		l.add(text[:n])
		text = text[n:]
	}
	l.add(text)
}

// cutLine makes rows of a line that is too long for one, but for its end.
func (l *jobLog) cutLine() {
	for len(l.line) > maxRow {
		n := boundary(string(l.line), maxRow)
		rest := bytes.Clone(l.line[n:])
		l.line = l.line[:n]
		l.endLine()
		l.line = append(l.line, rest...)
	}
}

// boundary is the last place up to most where no character is cut.
func boundary(s string, most int) int {
	for n := most; n > most-utf8.UTFMax; n-- {
		if utf8.RuneStart(s[n]) {
			return n
		}
	}
	return most // this is no UTF-8
}

// clean replaces each byte that is not UTF-8.
func clean(b []byte) string {
	if utf8.Valid(b) {
		return string(b)
	}
	return string(bytes.Runes(b))
}

func (l *jobLog) add(text string) {
	l.rows = append(l.rows, logRow{Time: l.lineAt.UTC(), Content: text})
	l.size += len(text) + rowCost
}

// room waits until the rows fit. Others may use the log meanwhile.
func (l *jobLog) room() error {
	if l.size <= maxPending {
		return nil
	}
	stalled := time.NewTimer(stallPatience)
	defer stalled.Stop()
	for l.size > maxPending && !l.dropped {
		l.rush()
		moved := l.moved
		l.mu.Unlock()
		var err error
		select {
		case <-moved:
			stalled.Reset(stallPatience)
		case <-stalled.C:
			err = fmt.Errorf("gitea: the server takes no log since %s", stallPatience)
		}
		l.mu.Lock()
		if err != nil {
			return err
		}
	}
	return nil
}

// wake starts the sender if there is work for it.
func (l *jobLog) wake() {
	if l.sending || l.start == nil || l.dropped || len(l.rows) == 0 && !l.news {
		return
	}
	l.sending = true
	l.start()
}

// rush makes the sender wait for nothing.
func (l *jobLog) rush() {
	select {
	case <-l.hurry:
	default:
		close(l.hurry)
	}
	l.wake()
}

// signal tells those who wait that something happened.
func (l *jobLog) signal() {
	close(l.moved)
	l.moved = make(chan struct{})
}

// total is the number of rows of the whole log.
func (l *jobLog) total() integer { return l.first + integer(len(l.rows)) }

// Step notes the state of a step. The rows from the end of the last step to the
// end of this one are its own: Gitea reckons with ranges that leave no gap.
func (l *jobLog) Step(s providers.StepState) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.Index < 0 || l.dropped {
		return nil
	}
	if len(l.line) > 0 {
		l.endLine()
	}
	st := l.step(integer(s.Index))
	if st.StartedAt.IsZero() {
		st.LogIndex = l.total()
		if l.begun {
			st.LogIndex = l.end
		}
	}
	st.StartedAt = s.Started.UTC()
	if s.Conclusion != providers.Skipped {
		l.begun = true
	}
	if s.Conclusion != "" {
		st.Result, st.StoppedAt = resultOf(s.Conclusion), s.Ended.UTC()
		if s.Conclusion != providers.Skipped {
			st.LogLength = l.total() - st.LogIndex
			l.end = l.total()
		}
	}
	l.news = true
	l.wake()
	return nil
}

func (l *jobLog) step(id integer) *stepState {
	for _, st := range l.steps {
		if st.ID == id {
			return st
		}
	}
	l.steps = append(l.steps, &stepState{ID: id})
	return l.steps[len(l.steps)-1]
}

// states are those of all steps, for an UpdateTask. Of one that runs the server
// shows the rows that it has.
func (l *jobLog) states() []stepState {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.news = false
	states := make([]stepState, 0, len(l.steps))
	for _, st := range l.steps {
		s := *st
		if s.Result == "" {
			s.LogLength = max(l.first-s.LogIndex, 0)
		}
		states = append(states, s)
	}
	return states
}

// say adds a line of the provider's own.
func (l *jobLog) say(line string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dropped {
		return
	}
	if len(l.line) > 0 {
		l.endLine()
	}
	l.lineAt = time.Now()
	l.line = append(l.line, line...)
	l.endLine()
}

// told notes whether the server took the states that it was sent.
func (l *jobLog) told(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.news = len(l.steps) > 0
		return
	}
	l.signal()
}

// drop gives up what is unsent: nobody will take it.
func (l *jobLog) drop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dropped, l.rows, l.line, l.size, l.news = true, nil, nil, 0, false
	l.signal()
}

// Close waits until the server has all rows and states. What it has not when ctx
// ends is kept for the next Close, or for Complete.
func (l *jobLog) Close(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.line) > 0 {
		l.endLine()
	}
	for !l.dropped && (len(l.rows) > 0 || l.news || l.sending) {
		l.rush()
		moved := l.moved
		l.mu.Unlock()
		var err error
		select {
		case <-moved:
		case <-ctx.Done():
			err = fmt.Errorf("gitea: log: %d rows unsent: %w", len(l.rows), ctx.Err())
		}
		l.mu.Lock()
		if err != nil {
			return err
		}
	}
	return nil
}

// stop ends the sender.
func (l *jobLog) stop() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cancel != nil {
		l.cancel()
	}
}

// acknowledge lets go of the rows that the server has. It returns false if it
// took none of those that were sent.
func (l *jobLog) acknowledge(sent updateLogRequest, ack integer) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := min(max(ack-sent.Index, 0), integer(len(sent.Rows)))
	for _, r := range l.rows[:n] {
		l.size -= len(r.Content) + rowCost
	}
	l.rows = l.rows[n:]
	l.first = sent.Index + n
	if ack < sent.Index || ack > sent.Index+n {
		// The server lost rows (an old backup), or has some of another life's:
		// go on behind what it has, as nothing else can be stored.
		l.shift(max(ack, 0) - l.first)
	}
	l.signal()
	return n > 0 || len(sent.Rows) == 0 || ack != sent.Index
}

// shift moves what is not stored yet by d rows.
func (l *jobLog) shift(d integer) {
	l.first += d
	l.end = max(l.end+d, 0)
	for _, st := range l.steps {
		if st.Result == "" {
			st.LogIndex = max(st.LogIndex+d, 0)
		}
	}
}
