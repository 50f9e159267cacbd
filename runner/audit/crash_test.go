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
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/runner/audit"
)

// roleVariable makes the test binary a child with a part to play.
const roleVariable = "AUDIT_TEST_ROLE"

func TestMain(m *testing.M) {
	var err error
	switch role := os.Getenv(roleVariable); role {
	case "":
		os.Exit(m.Run())
	case "writer":
		err = writeForEver(os.Args[1], os.Args[2])
	case "full":
		err = fillTheDisk(os.Args[1])
	default:
		err = fmt.Errorf("unknown role %q", role)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func child(t *testing.T, role string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
	cmd.Env = append(os.Environ(), roleVariable+"="+role)
	return cmd
}

// A crash can cut the last line anywhere. Whatever is left stays in the file,
// is accounted for, and the chain goes on.
func TestTornLine(t *testing.T) {
	t.Parallel()
	whole := content(t, record(t, 3), month)
	last := bytes.LastIndexByte(whole[:len(whole)-1], '\n') + 1
	for cut := last + 1; cut < len(whole); cut++ {
		if cut > last+10 && cut < len(whole)-90 && cut%8 != 0 {
			continue // every place matters at both ends, some in the middle
		}
		dir := t.TempDir()
		write(t, dir, month, whole[:cut])
		if s := verify(t, dir); s.Events != 2 || s.Torn != cut-last {
			t.Fatalf("cut at %d: Verify: got %+v, want 2 events and %d torn bytes", cut, s, cut-last)
		}
		repaired := reopenAndAppend(t, dir)
		want := 4 // two, audit.repaired, and a new one
		if cut == len(whole)-1 {
			want = 5 // only the newline was missing: the third is whole
		}
		if s := verify(t, dir); s.Events != uint64(want) || s.Repairs != 1 || s.Torn != 0 {
			t.Fatalf("cut at %d: got %+v, want %d events, 1 repair", cut, s, want)
		}
		if !bytes.HasPrefix(repaired, whole[:cut]) {
			t.Fatalf("cut at %d: the torn bytes are gone", cut)
		}
	}
}

func reopenAndAppend(t *testing.T, dir string) []byte {
	t.Helper()
	f, err := audit.OpenFile(dir, audit.FileOptions{})
	if err != nil {
		t.Fatalf("OpenFile: %v", err)
	}
	add(t, f, audit.Event{Time: at(1), Action: "test.event", Object: "new"})
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	return content(t, dir, month)
}

// A crash can cut the repair as well, and the repair of that.
func TestTornRepair(t *testing.T) {
	t.Parallel()
	whole := content(t, record(t, 2), month)
	for cut := range 40 {
		dir := t.TempDir()
		torn := whole[:len(whole)-30]
		for round := range 3 {
			write(t, dir, month, torn)
			after := reopenAndAppend(t, dir)
			if s := verify(t, dir); s.Repairs != 1 || s.Events != 3 {
				t.Fatalf("cut %d, round %d: got %+v, want one repair of all of it", cut, round, s)
			}
			torn = after[:len(torn)+1+cut*8] // the newline, and a piece of audit.repaired
		}
	}
}

// The first line of all may be the torn one.
func TestTornFirstLine(t *testing.T) {
	t.Parallel()
	for _, torn := range []string{`{`, `{"seq":1,`, "\x00\x00\x00", strings.Repeat("x", 1<<19), "{}\n{", "\n"} {
		dir := t.TempDir()
		write(t, dir, month, []byte(torn))
		reopenAndAppend(t, dir)
		if s := verify(t, dir); s.Events != 2 || s.Repairs != 1 {
			t.Errorf("%.10q: got %+v, want the repair and one event", torn, s)
		}
	}
}

// Two sinks on one record: each continues what the other appended.
func TestTwoWriters(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	a, b := open(t, dir), open(t, dir)
	for i := range 50 {
		add(t, a, audit.Event{Time: at(1 + i), Action: "test.event"})
		add(t, b, audit.Event{Time: at(1 + i), Action: "test.event"})
	}
	if s := verify(t, dir); s.Events != 100+uint64(s.Files-1) || s.Files != 2 {
		t.Errorf("Verify: got %+v, want 100 events and an audit.continue", s)
	}
	// One of them dies in the middle of a line; the other closes it.
	last := content(t, dir, "2026-12.jsonl")
	write(t, dir, "2026-12.jsonl", append(last, `{"seq":102,"prev"`...))
	add(t, a, audit.Event{Time: at(1), Action: "test.event"})
	add(t, b, audit.Event{Time: at(1), Action: "test.event"})
	add(t, a, audit.Event{Time: at(1), Action: "test.event"})
	if s := verify(t, dir); s.Repairs != 1 || s.Events != 105 {
		t.Errorf("Verify: got %+v, want 105 events, one of them the repair", s)
	}
}

// writeForEver appends and says after each event that it is stored.
func writeForEver(dir, name string) error {
	f, err := audit.OpenFile(dir, audit.FileOptions{})
	if err != nil {
		return err
	}
	for i := 0; ; i++ {
		e := audit.Event{Time: at(1), Job: name, Action: "test.event", Object: fmt.Sprint(i)}
		if i%50 == 49 {
			e.Action = "job.complete"
		}
		if err := f.Append(context.Background(), e); err != nil {
			return err
		}
		if _, err := fmt.Fprintln(os.Stdout, i); err != nil {
			return err
		}
	}
}

// Processes append at once and are killed: every event that was reported as
// stored is there, and the chain holds.
func TestKilledWriters(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for round := range 3 {
		var wg sync.WaitGroup
		for w := range 3 {
			name := fmt.Sprintf("%d-%d", round, w)
			cmd := child(t, "writer", dir, name)
			var said bytes.Buffer
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			wg.Go(func() {
				for buf := make([]byte, 512); said.Len() < 2000; {
					n, err := out.Read(buf)
					said.Write(buf[:n])
					if err != nil {
						t.Errorf("writer %s: ended by itself: %v", name, err)
						return
					}
				}
				if err := cmd.Process.Kill(); err != nil {
					t.Error(err)
				}
				if _, err := said.ReadFrom(out); err != nil {
					t.Error(err)
				}
				if err := cmd.Wait(); err == nil || cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
					t.Errorf("writer %s: got %v, want killed", name, err)
				}
				checkStored(t, dir, name, strings.Count(said.String(), "\n"))
			})
		}
		wg.Wait()
		verify(t, dir)
	}
	reopenAndAppend(t, dir)
	if s := verify(t, dir); s.Torn != 0 {
		t.Errorf("Verify: got %+v, want no torn bytes", s)
	}
}

func checkStored(t *testing.T, dir, job string, said int) {
	t.Helper()
	n := 0
	for e, err := range audit.Read(dir, audit.Filter{Job: job}) {
		if err != nil {
			t.Errorf("Read: %v", err)
			return
		}
		if e.Object != fmt.Sprint(n) {
			t.Errorf("writer %s: got event %s, want %d", job, e.Object, n)
			return
		}
		n++
	}
	if n < said {
		t.Errorf("writer %s: %d events were reported stored, got %d", job, said, n)
	}
}

// A full disk is an error, leaves a record that holds, and is no end: when
// there is room again, appending goes on. The disk is a tmpfs of the child's
// own mount namespace, so that nothing can be left of it.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	cmd := child(t, "full", t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("user namespaces must be allowed (kernel.unprivileged_userns_clone): %v\n%s", err, out)
	}
}

func fillTheDisk(dir string) error {
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	record := filepath.Join(dir, "audit")
	f, err := audit.OpenFile(record, audit.FileOptions{})
	if err != nil {
		return err
	}
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 32<<10), 0o600); err != nil {
		return err
	}
	e := audit.Event{Time: at(1), Action: "test.event", Result: strings.Repeat("x", 999)}
	stored := uint64(0)
	for err == nil && stored < 1000 {
		if err = f.Append(context.Background(), e); err == nil {
			stored++
		}
	}
	if !errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("append to a full disk: got %v after %d events, want ENOSPC", err, stored)
	}
	for range 3 {
		if err := f.Append(context.Background(), e); !errors.Is(err, syscall.ENOSPC) {
			return fmt.Errorf("append again: got %v, want ENOSPC", err)
		}
	}
	if s, err := audit.Verify(record); err != nil || s.Events != stored || s.Torn != 0 {
		return fmt.Errorf("verify the full disk: got %+v, %w, want %d events and nothing torn", s, err, stored)
	}
	if err := tornOnFullDisk(record, ballast); err != nil {
		return err
	}
	if err := f.Append(context.Background(), e); err != nil {
		return fmt.Errorf("append when there is room again: %w", err)
	}
	s, err := audit.Verify(record)
	if err != nil || s.Events != stored+2 || s.Repairs != 1 {
		return fmt.Errorf("verify: got %+v, %w, want %d events, one repair", s, err, stored+2)
	}
	return nil
}

// tornOnFullDisk leaves a torn line on a disk that has no room for its repair,
// and then makes room.
func tornOnFullDisk(record, ballast string) error {
	path := filepath.Join(record, month)
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	piece := bytes.Repeat([]byte("x"), 1<<10)
	for err == nil {
		_, err = f.Write(piece)
	}
	if err := f.Close(); err != nil {
		return err
	}
	before, err := os.Stat(path)
	if err != nil {
		return err
	}
	if _, err := audit.OpenFile(record, audit.FileOptions{}); !errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("open a torn record on a full disk: got %v, want ENOSPC", err)
	}
	if after, err := os.Stat(path); err != nil || after.Size() != before.Size() {
		return fmt.Errorf("the torn bytes were touched: %w", err)
	}
	return os.Remove(ballast)
}

// A process that was stopped while it held the lock is waited for, but not
// longer than the caller wants.
func TestLockHonoursContext(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := open(t, dir)
	lock, err := os.Open(filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := f.Append(ctx, audit.Event{Action: "test.event"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Append while the lock is held: got %v, want DeadlineExceeded", err)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	add(t, f, audit.Event{Time: at(1), Action: "test.event"})
	if s := verify(t, dir); s.Events != 1 {
		t.Errorf("Verify: got %+v, want the one event that was stored", s)
	}
}
