package main

import (
	"bufio"
	"errors"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/runner"
)

// resident is a line of /proc/self/status, in KiB.
func resident(t *testing.T, name string) int {
	t.Helper()
	f, err := os.Open("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if words := strings.Fields(s.Text()); len(words) == 3 && words[0] == name {
			n, err := strconv.Atoi(words[1])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("/proc/self/status has no %s", name)
	return 0
}

func TestAnIdleAgentGivesItsMemoryBack(t *testing.T) {
	const size = 64 << 20
	used := make([]byte, size)
	for i := range used {
		used[i] = 1
	}
	runtime.KeepAlive(used)
	// However much of the program has run so far.
	if err := adviseProgram(unix.MADV_POPULATE_READ); err != nil {
		t.Fatal(err)
	}
	heap, program := resident(t, "RssAnon:"), resident(t, "RssFile:")

	var r rest
	for _, busy := range []int{0, 1, 0} { // never idle twice in a row
		if err := r.look(runner.Status{Busy: busy}); err != nil {
			t.Fatal(err)
		}
	}
	if r.rested {
		t.Fatal("an agent that worked a moment ago has rested")
	}
	if err := r.look(runner.Status{}); err != nil {
		t.Fatal(err)
	}
	if got := resident(t, "RssAnon:"); got > heap-size/1024/2 {
		t.Errorf("heap: %d KiB resident before the rest and %d after it, want %d less", heap, got, size/1024)
	}
	if got := resident(t, "RssFile:"); got > program/2 {
		t.Errorf("program: %d KiB resident before the rest and %d after it, want less than half", program, got)
	}

	// Without another collection there is nothing to give back.
	cycles, before := r.cycles, forced()
	if err := r.look(runner.Status{}); err != nil || forced() != before && collections() == cycles {
		t.Errorf("rested again: %v", err)
	}
}

// TestUnmapKeepsWhatWasWritten: of the program's own file, what was written and
// then closed to that is as it was.
func TestUnmapKeepsWhatWasWritten(t *testing.T) {
	t.Parallel()
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	b, err := unix.Mmap(int(f.Fd()), 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Munmap(b) }()
	b[0] = 'x' // ELF begins with 0x7f
	if err := errors.Join(unix.Mprotect(b, unix.PROT_READ), adviseProgram(unix.MADV_DONTNEED)); err != nil {
		t.Fatal(err)
	}
	if b[0] != 'x' {
		t.Errorf("got %#x, want what was written", b[0])
	}
}

// forced is how many collections somebody asked for, as a rest does.
func forced() uint32 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.NumForcedGC
}
