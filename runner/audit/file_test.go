package audit_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/runner/audit"
	"github.com/mayfly-ci/mayfly/runner/audit/audittest"
)

func TestConformance(t *testing.T) {
	t.Parallel()
	audittest.Run(t, func(t *testing.T) audittest.Store {
		dir := t.TempDir()
		return audittest.Store{
			Open:   func() (audit.Sink, error) { return audit.OpenFile(dir, audit.FileOptions{}) },
			Events: func() ([]audit.Event, error) { return read(dir) },
			Break: func(s audit.Sink) error {
				f, ok := s.(*audit.File)
				if !ok {
					return fmt.Errorf("got a %T", s)
				}
				return f.MakeReadOnly()
			},
		}
	})
}

func read(dir string) ([]audit.Event, error) {
	var events []audit.Event
	for e, err := range audit.Read(dir, audit.Filter{}) {
		if err != nil {
			return events, err
		}
		events = append(events, e)
	}
	return events, nil
}

const month = "2026-11.jsonl"

func at(day int) time.Time { return time.Date(2026, 11, day, 12, 0, 0, 0, time.UTC) }

func open(t *testing.T, dir string) *audit.File {
	t.Helper()
	f, err := audit.OpenFile(dir, audit.FileOptions{})
	if err != nil {
		t.Fatalf("OpenFile: %v", err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return f
}

func add(t *testing.T, s audit.Sink, e audit.Event) {
	t.Helper()
	if err := s.Append(t.Context(), e); err != nil {
		t.Fatalf("Append %s: %v", e.Object, err)
	}
}

// record makes a record of n events in one month.
func record(t *testing.T, n int) string {
	t.Helper()
	dir := t.TempDir()
	f := open(t, dir)
	for i := range n {
		add(t, f, audit.Event{Time: at(1), Job: fmt.Sprintf("job-%d", i%2), Action: "test.event", Object: fmt.Sprint(i), Result: "ok"})
	}
	return dir
}

func content(t *testing.T, dir, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func write(t *testing.T, dir, name string, b []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func verify(t *testing.T, dir string, expect ...audit.Head) audit.Summary {
	t.Helper()
	s, err := audit.Verify(dir, expect...)
	if err != nil {
		t.Fatalf("Verify: %v", err)
	}
	return s
}

// The package comment promises that a shell can check the chain.
func TestVerifiableByHand(t *testing.T) {
	t.Parallel()
	dir := record(t, 8)
	const script = `
line() { sed -n "${1}p" 2026-11.jsonl; }
line 7 | sed 's/,"hash":"[0-9a-f]*"}$/}/' | tr -d '\n' | sha256sum | cut -d' ' -f1
line 7 | sed 's/.*"hash":"\([0-9a-f]*\)"}$/\1/'
line 8 | sed 's/.*"prev":"\([0-9a-f]*\)".*/\1/'
`
	cmd := exec.CommandContext(t.Context(), "sh", "-euc", script)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("sed, tr, sha256sum and cut (coreutils) are needed: %v\n%s", err, out)
	}
	h := strings.Fields(string(out))
	if len(h) != 3 || len(h[0]) != 64 || h[0] != h[1] || h[1] != h[2] {
		t.Errorf("hash by hand, hash, next prev: got %v, want three times the same", h)
	}
}

func TestMonths(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := open(t, dir)
	for i, when := range []time.Time{
		at(30), at(30).AddDate(0, 1, 0), at(1), at(30).AddDate(0, 1, 1), at(30).AddDate(0, 5, 0), at(2),
	} {
		add(t, f, audit.Event{Time: when, Action: "test.event", Object: fmt.Sprint(i)})
	}
	s := verify(t, dir)
	if s.Files != 3 || s.Events != 8 || s.Head.Seq != 8 {
		t.Errorf("Verify: got %+v, want 6 events and 2 audit.continue in 3 files", s)
	}
	if n := bytes.Count(content(t, dir, "2026-12.jsonl"), []byte("\n")); n != 4 {
		t.Errorf("2026-12.jsonl: got %d lines, want 4: the clock's jump back opens no older file", n)
	}
	var objects []string
	for e, err := range audit.Read(dir, audit.Filter{Action: "test."}) {
		if err != nil {
			t.Fatal(err)
		}
		objects = append(objects, e.Object)
	}
	if got := strings.Join(objects, ""); got != "012345" {
		t.Errorf("Read: got %s, want the order of the calls", got)
	}
	if err := os.Remove(filepath.Join(dir, "2026-12.jsonl")); err != nil {
		t.Fatal(err)
	}
	if _, err := audit.Verify(dir); !errors.Is(err, audit.ErrTampered) {
		t.Errorf("Verify without the month in the middle: got %v, want ErrTampered", err)
	}
}

// A crash between the last line of a month and the next file is finished by
// the next writer, and so is one before the first line of the new file.
func TestCrashBetweenMonths(t *testing.T) {
	t.Parallel()
	dir, crashed := t.TempDir(), t.TempDir()
	f, err := audit.OpenFile(dir, audit.FileOptions{Trace: func(point string) {
		if point == "audit.continued" {
			write(t, crashed, month, content(t, dir, month))
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	add(t, f, audit.Event{Time: at(1), Action: "test.event"})
	add(t, f, audit.Event{Time: at(31), Action: "test.event"})
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for range 3 { // the second time the file is there and empty
		f, err := audit.OpenFile(crashed, audit.FileOptions{})
		if err != nil {
			t.Fatalf("OpenFile: %v", err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	write(t, crashed, "2026-12.jsonl", []byte(`{"seq":3,"pr`)) // the fourth, torn
	add(t, open(t, crashed), audit.Event{Time: at(1), Action: "test.event"})
	if s := verify(t, crashed); s.Files != 2 || s.Events != 4 || s.Repairs != 1 {
		t.Errorf("Verify: got %+v, want 2 files, 4 events, 1 repair", s)
	}
}

func TestOptionsAndClose(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f, err := audit.OpenFile(dir, audit.FileOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Close(), f.Close()); err != nil {
		t.Errorf("Close twice: %v", err)
	}
	for _, action := range []string{"test.event", "job.complete"} {
		if err := f.Append(t.Context(), audit.Event{Action: action}); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Append after Close: got %v, want os.ErrClosed", err)
		}
	}
	link := t.TempDir()
	if err := os.Symlink(filepath.Join(dir, "elsewhere"), filepath.Join(link, month)); err != nil {
		t.Fatal(err)
	}
	if _, err := audit.OpenFile(link, audit.FileOptions{}); err == nil {
		t.Error("OpenFile: followed a link")
	}
	big := audit.Event{Action: "test.event", Result: strings.Repeat("x", 1<<20)}
	if err := open(t, dir).Append(t.Context(), big); err == nil {
		t.Error("Append: took a line of 1 MiB, want an error")
	}
	if err := open(t, dir).Append(t.Context(), audit.Event{Time: time.Date(12026, 1, 1, 0, 0, 0, 0, time.UTC)}); err == nil {
		t.Error("Append: took the year 12026, want an error")
	}
	if s := verify(t, dir); s.Events != 0 {
		t.Errorf("Verify: got %+v, want no event", s)
	}
}

// While one fsync runs, the durable events of other jobs wait and then share
// the next one.
func TestGroupCommit(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := open(t, dir)
	add(t, f, audit.Event{Time: at(1), Action: "test.event"})
	var fsyncs atomic.Int32
	started, release := make(chan struct{}), make(chan struct{})
	f.SetFsync(func(file *os.File) error {
		if fsyncs.Add(1) == 1 {
			close(started)
			<-release
		}
		return file.Sync()
	})
	const jobs = 8
	done := make(chan error, jobs+1)
	complete := func() { done <- f.Append(context.Background(), audit.Event{Time: at(1), Action: "job.complete"}) }
	go complete()
	<-started
	for range jobs {
		go complete()
	}
	for tick := time.NewTicker(time.Millisecond); bytes.Count(content(t, dir, month), []byte("\n")) < jobs+2; {
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatal("appends wait for an fsync: want them written meanwhile")
		}
	}
	select {
	case err := <-done:
		t.Errorf("Append: returned %v before the fsync was over", err)
	default:
	}
	close(release)
	for range jobs + 1 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	if n := fsyncs.Load(); n != 2 {
		t.Errorf("fsyncs: got %d for %d durable events, want 2", n, jobs+1)
	}
}

func TestDurability(t *testing.T) {
	t.Parallel()
	f := open(t, t.TempDir())
	fsyncs := 0
	f.SetFsync(func(*os.File) error { fsyncs++; return nil })
	for _, c := range []struct {
		action string
		want   int
	}{
		{"egress.tcp", 0},
		{"lease.issue", 0},
		{"job.complete", 1},
		{"job.admit", 1},
		{"lease.unprovable", 2},
		{"release.stuck", 3},
		{"reap", 4},
		{"audit.anything", 5},
		{"auditor", 5},
	} {
		add(t, f, audit.Event{Time: at(1), Action: c.action})
		if fsyncs != c.want {
			t.Errorf("after %s: got %d fsyncs, want %d", c.action, fsyncs, c.want)
		}
	}
	// A page that was not written may be gone: nothing is believed after that.
	f.SetFsync(func(*os.File) error { return errors.New("EIO") })
	if err := f.Append(t.Context(), audit.Event{Time: at(1), Action: "job.complete"}); err == nil {
		t.Error("Append: got no error from a failed fsync")
	}
	f.SetFsync(func(*os.File) error { return nil })
	for _, action := range []string{"egress.tcp", "job.complete"} {
		if err := f.Append(t.Context(), audit.Event{Time: at(1), Action: action}); err == nil {
			t.Errorf("Append %s after a failed fsync: got no error", action)
		}
	}
}

func BenchmarkAppend(b *testing.B) {
	f, err := audit.OpenFile(b.TempDir(), audit.FileOptions{})
	if err != nil {
		b.Fatal(err)
	}
	e := audit.Event{
		Job: "mf-0123456789ab", Action: "egress.tcp", Object: "proxy.golang.org:443", Result: "ok",
		Detail: map[string]string{"rule": "policy.yaml:19", "dialled": "203.0.113.1:443", "sent": "517", "received": "4096"},
	}
	for b.Loop() {
		e.Time = time.Now()
		if err := f.Append(b.Context(), e); err != nil {
			b.Fatal(err)
		}
	}
	if err := f.Close(); err != nil {
		b.Fatal(err)
	}
}
