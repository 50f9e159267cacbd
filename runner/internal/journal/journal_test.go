package journal

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/runner/internal/seal"
)

func open(t testing.TB, dir string) *Journal {
	t.Helper()
	key, err := seal.Load(filepath.Join(dir, "seal.key"))
	if err != nil {
		t.Fatal(err)
	}
	j, err := Open(filepath.Join(dir, "jobs"), key, 7)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// begun is a log with a claim, a plan of three, one handle and an outcome.
func begun(t testing.TB, j *Journal, job string) *Log {
	t.Helper()
	l, err := j.Begin(job, Debt{Kind: "claim", Name: job, By: "local"})
	must(t, err)
	must(t, l.Intend(Debt{Kind: "gateway", Name: job + "-gw"}, Debt{Kind: "box", Name: job + "-box", By: "native"},
		Debt{Kind: "lease", Name: job + "-l-db", By: "pg", Scope: "migrate"}))
	must(t, l.Try(job+"-l-db"))
	must(t, l.Held(job+"-l-db", []byte("hunter2"), false))
	must(t, l.SetOutcome(json.RawMessage(`{"conclusion":"success"}`)))
	return l
}

func names(ds []Debt) string {
	var s []string
	for _, d := range ds {
		s = append(s, d.Name)
	}
	return strings.Join(s, " ")
}

func TestReopenOwesTheSame(t *testing.T) {
	t.Parallel()
	j := open(t, t.TempDir())
	l := begun(t, j, "a")
	must(t, l.Release("a-gw"))
	must(t, l.Close())
	logs, err := j.Unfinished()
	must(t, err)
	if len(logs) != 1 {
		t.Fatalf("got %d unfinished logs, want 1", len(logs))
	}
	r := logs[0]
	if got, want := names(r.Debts()), "a-l-db a-box a"; got != want {
		t.Errorf("debts after reopening: got %q, want %q (newest first)", got, want)
	}
	d := r.Debts()[0]
	if string(d.Handle) != "hunter2" || d.Scope != "migrate" || d.By != "pg" || !d.Tried {
		t.Errorf("lease after reopening: got %+v, want its handle, scope, issuer, and tried", d)
	}
	if string(r.Outcome()) != `{"conclusion":"success"}` || r.Generation != 7 {
		t.Errorf("got outcome %s of generation %d", r.Outcome(), r.Generation)
	}
}

func TestHandleIsSealed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	must(t, begun(t, open(t, dir), "a").Close())
	b, err := os.ReadFile(filepath.Join(dir, "jobs", "a.wal"))
	must(t, err)
	if bytes.Contains(b, []byte("hunter2")) || bytes.Contains(b, []byte("aHVudGVyMg")) {
		t.Errorf("the journal shows the handle: %s", b)
	}
	// Under another key the handle is lost and the debt is not.
	must(t, os.Remove(filepath.Join(dir, "seal.key")))
	logs, err := open(t, dir).Unfinished()
	must(t, err)
	if d := logs[0].Debts()[0]; d.Name != "a-l-db" || d.Handle != nil {
		t.Errorf("with another key: got %+v, want the debt without its handle", d)
	}
}

// Whatever prefix of a log survives, reopening it works, it owes what its whole
// records say, and appending to it goes on.
func TestEveryTornTail(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	j := open(t, dir)
	must(t, begun(t, j, "a").Close())
	path := filepath.Join(dir, "jobs", "a.wal")
	whole, err := os.ReadFile(path)
	must(t, err)
	for n := range len(whole) + 1 {
		must(t, os.WriteFile(path, whole[:n], 0o600))
		logs, err := j.Unfinished()
		if err != nil {
			t.Fatalf("torn at byte %d: %v", n, err)
		}
		l := logs[0]
		before := names(l.Debts())
		must(t, l.Intend(Debt{Kind: "box", Name: "late"}))
		must(t, l.Close())
		logs, err = j.Unfinished()
		must(t, err)
		if got, want := names(logs[0].Debts()), strings.TrimSpace("late "+before); got != want || logs[0].Damaged != 0 {
			t.Fatalf("torn at byte %d, then appended: got debts %q with %d damaged lines, want %q", n, got, logs[0].Damaged, want)
		}
	}
}

func TestDamageInTheMiddleHidesNothingElse(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	j := open(t, dir)
	must(t, begun(t, j, "a").Close())
	path := filepath.Join(dir, "jobs", "a.wal")
	b, err := os.ReadFile(path)
	must(t, err)
	lines := bytes.SplitAfter(b, []byte("\n"))
	copy(lines[2], "????")
	must(t, os.WriteFile(path, bytes.Join(lines, nil), 0o600))
	logs, err := j.Unfinished()
	must(t, err)
	if got := names(logs[0].Debts()); got != "a-l-db a-box a-gw a" || logs[0].Damaged != 1 {
		t.Errorf("got debts %q and %d damaged lines, want all four and 1", got, logs[0].Damaged)
	}
}

func TestNewerVersionIsLeftAlone(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	j := open(t, dir)
	must(t, begun(t, j, "a").Close())
	path := filepath.Join(dir, "jobs", "b.wal")
	must(t, os.WriteFile(path, []byte(`{"op":"begin","version":2,"debts":[{"kind":"claim","name":"b"}]}`+"\n"), 0o600))
	logs, err := j.Unfinished()
	if err == nil || !strings.Contains(err.Error(), "b.wal") || !strings.Contains(err.Error(), "version 2") {
		t.Errorf("got error %v, want one that names b.wal and its version", err)
	}
	if len(logs) != 1 || logs[0].Job != "a" {
		t.Errorf("got %d logs, want the readable one all the same", len(logs))
	}
}

func TestClosedMeansNothingIsOwed(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	j := open(t, dir)
	l := begun(t, j, "a")
	for _, d := range l.Debts() {
		if d.Kind == kindLease {
			must(t, l.Turn(d.Name, Revoking, time.Time{}, ""))
		}
		must(t, l.Release(d.Name))
	}
	must(t, l.Close())
	if left, err := os.ReadDir(filepath.Join(dir, "jobs")); err != nil || len(left) != 0 {
		t.Errorf("got %v, %v, want an empty directory", left, err)
	}
}

func TestNothingIsTriedThatWasNotIntended(t *testing.T) {
	t.Parallel()
	l := begun(t, open(t, t.TempDir()), "a")
	if err := l.Try("a-l-other"); err == nil {
		t.Error("Try of a name that no record intends: got nil, want an error")
	}
	if _, err := open(t, t.TempDir()).Begin("a", Debt{}); err != nil {
		t.Fatal(err)
	}
}

func TestFirstOutcomeStands(t *testing.T) {
	t.Parallel()
	l := begun(t, open(t, t.TempDir()), "a")
	must(t, l.SetOutcome(json.RawMessage(`{"conclusion":"lost"}`)))
	if got := string(l.Outcome()); !strings.Contains(got, "success") {
		t.Errorf("got %s, want the first outcome", got)
	}
}

// On a disk that is full nothing new is begun, a broken log acquires nothing
// more, and what was reserved is enough to write the teardown down.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if os.Getuid() != 0 {
		t.Fatal("needs root, to mount a small tmpfs")
	}
	must(t, syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=512k"))
	defer func() { must(t, syscall.Unmount(dir, syscall.MNT_DETACH)) }()
	j := open(t, dir)
	l := begun(t, j, "a")
	fill, err := os.Create(filepath.Join(dir, "fill"))
	must(t, err)
	for err == nil {
		_, err = fill.Write(make([]byte, 4096))
	}
	must(t, fill.Close())
	if _, err := j.Begin("b", Debt{Kind: "claim", Name: "b"}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("Begin on a full disk: got %v, want ENOSPC", err)
	}
	if left, err := j.Peek(); err != nil || len(left) != 1 {
		t.Errorf("after a refused Begin: got %d logs, %v, want only the first", len(left), err)
	}
	if err := l.Release("a-gw"); err != nil {
		t.Errorf("Release within the reserve: %v", err)
	}
	for err = nil; err == nil; {
		err = l.Intend(Debt{Kind: "box", Name: strings.Repeat("x", 4000)})
	}
	if err := l.Try("a-box"); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("Try after a failed append: got %v, want the failure", err)
	}
	must(t, l.Close())
	logs, err := j.Unfinished()
	must(t, err)
	if logs[0].Damaged != 0 {
		t.Errorf("a failed append left %d damaged lines", logs[0].Damaged)
	}
}

// Any bytes reopen to an error or to a log that keeps its debts when it is
// closed and reopened.
func FuzzReopen(f *testing.F) {
	dir := f.TempDir()
	must(f, begun(f, open(f, dir), "a").Close())
	b, err := os.ReadFile(filepath.Join(dir, "jobs", "a.wal"))
	must(f, err)
	f.Add(b)
	f.Add(b[:len(b)/2])
	f.Add([]byte("{}\n\x00\x00\n{\"op\":\"release\"}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := t.TempDir()
		j := open(t, dir)
		must(t, os.WriteFile(filepath.Join(dir, "jobs", "a.wal"), b, 0o600))
		logs, err := j.Unfinished()
		if err != nil {
			return
		}
		before := logs[0].Debts()
		must(t, logs[0].Close())
		logs, err = j.Unfinished()
		must(t, err)
		if len(before) > 0 && (len(logs) != 1 || !reflect.DeepEqual(before, logs[0].Debts())) {
			t.Errorf("debts changed by closing and reopening: %+v", before)
		}
	})
}
