package gitea

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/providers/gitea/fakegitea"
)

// However a text is cut into writes, it arrives whole; a line that is too long
// is cut between characters.
func TestRows(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("é", maxRow) // two bytes each
	for name, c := range map[string]struct{ text, want string }{
		"empty lines":   {"\n\na\n\n", "\n\na\n\n"},
		"no newline":    {"a\nb", "a\nb\n"},
		"returns":       {"a\rb\r\n", "a\rb\r\n"},
		"not UTF-8":     {"a\xff\xfeb\xc3\n", "a\ufffd\ufffdb\ufffd\n"},
		"just fits":     {strings.Repeat("x", maxRow) + "\ny\n", strings.Repeat("x", maxRow) + "\ny\n"},
		"one more":      {strings.Repeat("x", maxRow+1) + "\n", strings.Repeat("x", maxRow) + "\nx\n"},
		"characters":    {"a" + long + "\n", "a" + long[:maxRow-2] + "\n" + long[:maxRow] + "\n" + "éé"[:2] + "\n"},
		"bytes grow":    {strings.Repeat("\xff", maxRow) + "\n", strings.Repeat(strings.Repeat("\ufffd", maxRow/3)+"\n", 3) + "\ufffd\n"},
		"continuations": {strings.Repeat("\x80", 2*maxRow), ""},
	} {
		for _, size := range []int{1 << 20, maxRow, 1000, 1} {
			s := instance(t)
			p := open(t, config(s))
			job, id := claimed(t, s, p, "c", simple("x"))
			l := logOf(t, p, "c", job.Ref)
			for b := []byte(c.text); len(b) > 0; {
				n := min(size, len(b))
				if err := l.Write(time.Now(), 0, b[:n]); err != nil {
					t.Fatal(err)
				}
				b = b[n:]
			}
			if err := l.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
			got := text(s.Task(id).Rows)
			if c.want == "" { // of what is no text only the amount counts
				if n := strings.Count(got, "\ufffd"); n != len(c.text) {
					t.Errorf("%s in writes of %d: %d bytes arrived, want %d", name, size, n, len(c.text))
				}
			} else if got != c.want {
				t.Errorf("%s in writes of %d: %d bytes, want %d", name, size, len(got), len(c.want))
			}
		}
	}
}

// The server goes away in the middle of a log that is larger than what may wait,
// and comes back: the job waits meanwhile, and nothing is lost.
func TestServerRestarts(t *testing.T) {
	t.Parallel()
	s := instance(t)
	p := open(t, config(s))
	job, id := claimed(t, s, p, "c", simple("x"))
	l := logOf(t, p, "c", job.Ref)
	if err := s.Down(); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2)) // the same each time
	var want bytes.Buffer
	var written sync.WaitGroup
	for want.Len() < maxPending+maxPending/2 {
		want.Write(bytes.Repeat([]byte{byte('a' + r.IntN(26))}, r.IntN(3000)))
		want.WriteByte('\n')
	}
	wrote := make(chan error, 1)
	written.Go(func() {
		var err error
		for line := range bytes.Lines(want.Bytes()) {
			err = errors.Join(err, l.Write(time.Now(), 0, line))
		}
		wrote <- err
	})
	eventually(t, "the log is full", func() bool {
		p.claims["c"].log.mu.Lock()
		defer p.claims["c"].log.mu.Unlock()
		return p.claims["c"].log.size > maxPending
	})
	moment := time.NewTimer(200 * time.Millisecond) // for what must not happen
	defer moment.Stop()
	select {
	case err := <-wrote:
		t.Fatalf("Write = %v while the server is away and %d bytes wait; want it to wait too", err, maxPending)
	case <-moment.C:
	}
	// A Close that gives up keeps the rows, also if the log is opened again.
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := l.Close(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Close without a server = %v, want the end of ctx", err)
	}
	if err := s.Up(); err != nil {
		t.Fatal(err)
	}
	written.Wait()
	l = logOf(t, p, "c", job.Ref)
	if err := errors.Join(<-wrote, l.Close(t.Context())); err != nil {
		t.Fatal(err)
	}
	if got := text(s.Task(id).Rows); got != want.String() {
		t.Errorf("%d bytes arrived, want %d", len(got), want.Len())
	}
	if err := p.Complete(t.Context(), "c", job.Ref, providers.Result{Conclusion: providers.Success}); err != nil {
		t.Error(err)
	}
}

// After a restart the log goes on at the server's count; what the server lost or
// has too much does not stop it.
func TestLogGoesOn(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		lose int
		want string
	}{
		"as it was": {4, "1 2 3 4 5 6 7"}, "rows are lost": {2, "1 2 5 6 7"},
	} {
		s := instance(t)
		p := open(t, config(s))
		job, id := claimed(t, s, p, "c", simple("x"))
		l := logOf(t, p, "c", job.Ref)
		if err := errors.Join(l.Write(time.Now(), 0, []byte("1\n2\n3\n4\n")), l.Close(t.Context())); err != nil {
			t.Fatal(err)
		}
		if name == "as it was" {
			p = open(t, p.config)
			l = logOf(t, p, "c", job.Ref)
		}
		s.LoseRows(id, c.lose)
		for _, line := range []string{"5\n", "6\n", "7\n"} {
			if err := errors.Join(l.Write(time.Now(), 0, []byte(line)), l.Close(t.Context())); err != nil {
				t.Fatal(err)
			}
		}
		if err := p.Complete(t.Context(), "c", job.Ref, providers.Result{Conclusion: providers.Failure}); err != nil {
			t.Error(err)
		}
		if got := strings.Join(s.Task(id).Rows, " "); got != c.want || !s.Task(id).Sealed {
			t.Errorf("%s: rows %q, want %q, sealed", name, got, c.want)
		}
	}
}

// Gitea shows of each step a range of rows: what a step printed is in its own,
// what the agent says between two is in the next one's, and none is in none.
func TestStepsAreRanges(t *testing.T) {
	t.Parallel()
	s := instance(t)
	p := open(t, config(s))
	job, id := claimed(t, s, p, "c", simple("a", "b", "c", "d"))
	l := logOf(t, p, "c", job.Ref)
	at := time.Now().Truncate(time.Second)
	write := func(text string) error { return l.Write(at, 0, []byte(text)) }
	state := func(i int, c providers.Conclusion) error {
		st := providers.StepState{Index: i, Started: at, Conclusion: c}
		if c != "" {
			st.Ended = at.Add(time.Second)
		}
		return l.Step(st)
	}
	err := errors.Join(
		write("set up\n"),
		state(0, ""), write("a1\na2"), state(0, providers.Success), // no newline
		write("between\n"),
		state(1, providers.Skipped),
		state(2, ""), write("c1\n"), l.Close(t.Context()),
	)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the page shows the rows of the step that runs", func() bool {
		st := s.Task(id).Steps[2]
		return st.Status == "running" && st.LogIndex == 3 && st.LogLength == 2
	})
	err = errors.Join(write("c2\n"), state(2, providers.Failure), write("the end\n"), l.Close(t.Context()),
		p.Complete(t.Context(), "c", job.Ref, providers.Result{Conclusion: providers.Failure}))
	if err != nil {
		t.Fatal(err)
	}
	task := s.Task(id)
	want := []struct {
		status string
		rows   string
	}{{fakegitea.Success, "a1 a2"}, {fakegitea.Skipped, ""}, {fakegitea.Failure, "between c1 c2"}, {fakegitea.Skipped, ""}}
	for i, w := range want {
		st := task.Steps[i]
		if rows := strings.Join(task.Rows[st.LogIndex:st.LogIndex+st.LogLength], " "); st.Status != w.status || rows != w.rows {
			t.Errorf("step %d is %s with %q (%+v), want %s with %q", i, st.Status, rows, st, w.status, w.rows)
		}
	}
	if !task.Times[1].Equal(at) || !task.Steps[0].Started.Equal(at) || !task.Steps[0].Stopped.Equal(at.Add(time.Second)) {
		t.Errorf("times: %v, %+v; want those of the guest", task.Times, task.Steps[0])
	}
}

func FuzzRows(f *testing.F) {
	f.Add([]byte("a\n\xffb\n"), 3)
	f.Fuzz(func(t *testing.T, b []byte, size int) {
		l := newJobLog()
		for rest := b; len(rest) > 0; {
			n := min(max(size, 1), len(rest))
			if err := l.Write(time.Time{}, 0, rest[:n]); err != nil {
				t.Fatal(err)
			}
			rest = rest[n:]
		}
		if len(l.line) > 0 {
			l.endLine()
		}
		var rows []string
		for _, r := range l.rows {
			if len(r.Content) > maxRow || !utf8.ValidString(r.Content) || strings.Contains(r.Content, "\n") {
				t.Fatalf("row of %d bytes: %.40q", len(r.Content), r.Content)
			}
			rows = append(rows, r.Content)
		}
		if got := text(rows); len(b) < maxRow/3 && got != string(shown(b)) {
			t.Errorf("%q in writes of %d is shown as %q", b, size, got)
		}
	})
}
