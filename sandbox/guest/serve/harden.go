package serve

import (
	"fmt"
	"math"
	"runtime"
	"runtime/debug"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// gcPercent keeps the heap near what is in use: the guest allocates
	// little, so collecting often costs nothing, and memory of an idle box is
	// paid once per box.
	gcPercent = 20

	// memoryLimit makes the collector return memory rather than hold it. It
	// is far above what the protocol lets the agent make the guest keep.
	memoryLimit = 24 << 20

	// processors: one to read the stream and one to copy output.
	processors = 2
)

// Harden makes the calling process fit to be process 1 of a box. It must be
// called before anything that is not trusted runs there, and before Serve.
//
// Nobody may trace the guest or read its memory, environment or descriptors
// through /proc, and it leaves no core (PR_SET_DUMPABLE, prctl(2)). What it
// inherited above descriptor 2 is not passed on to processes. Signals have
// their default action, which the kernel does not apply to process 1 of a pid
// namespace (pid_namespaces(7)): none can end the guest, or make the Go runtime
// print its stacks. They are not ignored, since processes would inherit that.
func Harden() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("dumpable: %w", err)
	}
	debug.SetTraceback("none")
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("inherited descriptors: %w", err)
	}
	if err := defaultSignals(); err != nil {
		return fmt.Errorf("signals: %w", err)
	}
	runtime.GOMAXPROCS(processors)
	debug.SetGCPercent(gcPercent)
	debug.SetMemoryLimit(memoryLimit)
	return nil
}

// lastSignal is the last real-time signal of the kernel. Those of libc, 32 and
// 33, may have been ignored by whoever started the agent, and a process inherits
// that.
const lastSignal = 64

// defaultSignals takes the handlers of the Go runtime away from all signals but
// SIGURG, by which it preempts its goroutines, SIGPROF, and SIGPIPE, which it
// turns into an error of the write.
func defaultSignals() error {
	// struct sigaction of the kernel, not of libc: handler, flags, restorer,
	// mask; the order of the zeros does not matter.
	var deflt [4]uint64
	for s := syscall.Signal(1); s <= lastSignal; s++ {
		switch s {
		case syscall.SIGKILL, syscall.SIGSTOP, syscall.SIGURG, syscall.SIGPROF, syscall.SIGPIPE:
			continue
		}
		_, _, errno := syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(&deflt)), 0, 8, 0, 0)
		if errno != 0 {
			return fmt.Errorf("%d: %w", int(s), errno)
		}
	}
	return nil
}
