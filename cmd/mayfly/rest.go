package main

import (
	"bytes"
	"fmt"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/runner"
)

// restAfter is how long nobody has worked when an agent gives its memory back.
// Jobs that follow one another closer than this find it as the last one left it.
const restAfter = time.Second

// A rest gives back to the kernel what an agent does not need while it waits:
// what its start and its last jobs left on the heap, which the collector by
// itself returns slowly, and the pages of the program that they ran through and
// waiting does not. Those stay in the page cache and are mapped again when they
// are run.
type rest struct {
	idle   int    // looks in a row at which nobody worked
	cycles uint64 // collections that had been made at the last rest
	rested bool
}

// look is called every restAfter.
func (r *rest) look(s runner.Status) error {
	if r.idle++; s.Busy > 0 {
		r.idle = 0
	}
	// The first look may come at any moment after a job.
	if r.idle < 2 || r.rested && collections() == r.cycles {
		return nil
	}
	debug.FreeOSMemory()
	r.rested, r.cycles = true, collections()
	// The kernel forgets which pages of the program are mapped.
	return adviseProgram(unix.MADV_DONTNEED)
}

// collections counts those that the need for memory made.
func collections() uint64 {
	s := []metrics.Sample{{Name: "/gc/cycles/automatic:gc-cycles"}}
	metrics.Read(s)
	if s[0].Value.Kind() != metrics.KindUint64 {
		return 0
	}
	return s[0].Value.Uint64()
}

// adviseProgram tells the kernel what to do about the pages of our own file, those
// that cannot be written to (madvise(2)). A part that was written before it was
// closed to that has pages of its own, which are nowhere else, and is left: a
// loader leaves such tables of addresses (RELRO) in a program that is not static,
// and it ends without them.
func adviseProgram(advice uintptr) error {
	maps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		return err
	}
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	var from, to uintptr
	ours := false // the part that the lines are about, and not written to
	for line := range bytes.Lines(maps) {
		var first, last uintptr
		var mode string
		text := string(line)
		if n, err := fmt.Sscanf(text, "%x-%x %s", &first, &last, &mode); n == 3 && err == nil {
			from, to = first, last
			ours = strings.HasPrefix(mode, "r") && !strings.Contains(mode, "w") && strings.HasSuffix(text, " "+self+"\n")
			continue
		}
		if own, found := strings.CutPrefix(text, "Anonymous:"); !ours || !found || strings.TrimSpace(own) != "0 kB" {
			continue
		}
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, from, to-from, advice); errno != 0 {
			return fmt.Errorf("madvise: %w", errno)
		}
	}
	return nil
}
