package sandboxtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
)

// What is judged otherwise where a box has a kernel of its own in user space
// (Harness.Kernel), because the host's kernel sees that one only:
//
//   - processes are looked for inside of a box that lives, and a box that is
//     dead must have left no process of its kernel;
//   - memory over the limit ends the box and not one process of it: Run returns
//     ErrDied, and Exit.OOM;
//   - processes over the limit are refused, or end the box, whose kernel may be
//     the one that needs one more;
//   - a thread of the box need not be one of the host, so that the limit is one
//     of what the box takes from the host;
//   - a device has a meaning of its own there: it must not be one of the host;
//   - computing is counted by the host, because the kernel of the box counts the
//     time in which it stood still.

// running is how many processes of the box have mark among their arguments, as
// the host sees them. Of a box with a kernel of its own it is what the box
// itself sees, and none if the host has no process of that kernel any more.
func (b *box) running(ctx context.Context, mark string) int {
	kernel := b.harness.Kernel
	if kernel == nil {
		return len(hostPids(mark))
	}
	if len(kernel(b.name)) == 0 {
		return 0
	}
	in := make(chan []byte, 1)
	in <- []byte(mark)
	close(in)
	p := shell("grep -lsFf - /proc/[0-9]*/cmdline | wc -l") // not among its own arguments
	p.Stdin = in
	r := b.run(ctx, p)
	n, err := strconv.Atoi(strings.TrimSpace(r.out))
	if r.err != nil || err != nil {
		return len(kernel(b.name)) // it is dying
	}
	return n
}

// killKernel ends a kernel as a crash of it would.
func killKernel(pids []int) error {
	if len(pids) == 0 {
		return errors.New("the host does not see the kernel of the box")
	}
	return syscall.Kill(pids[0], syscall.SIGKILL)
}

func diedOfMemory(r result) error {
	if !errors.Is(r.err, sandbox.ErrDied) || !r.exit.OOM {
		return fmt.Errorf("256 MiB of 64: got %v, want ErrDied and OOM", r)
	}
	return nil
}

// kernelThreads has more threads in the box than the host gives it.
func (b *box) kernelThreads(ctx context.Context, limit int) error {
	if err := b.install(ctx); err != nil {
		return err
	}
	most := 0
	p := sandbox.Process{Args: []string{probePath, "threads", strconv.Itoa(3 * limit)}}
	p.Stdout = func(time.Time, []byte) error {
		most = max(most, threads(b.harness.Kernel(b.name)))
		return nil
	}
	if _, err := b.Run(ctx, p); err != nil {
		return fmt.Errorf("%d threads of %d: got error %w, want them in the box, or refused", 3*limit, limit, err)
	}
	if most == 0 || most > limit {
		return fmt.Errorf("%d threads of %d: got %d on the host, want at most that", 3*limit, limit, most)
	}
	return wrap("the next process", b.script(ctx, "echo fine").printed("fine\n"))
}

// threads are those of processes of the host.
func threads(pids []int) int {
	n := 0
	for _, pid := range pids {
		all, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid)) // the pattern is well formed
		n += len(all)
	}
	return n
}

// kernelTime computes in the box, and asks the host how much.
func (b *box) kernelTime(ctx context.Context) error {
	if err := b.install(ctx); err != nil {
		return err
	}
	began, before := time.Now(), computed(b.harness.Kernel(b.name))
	if err := b.probe(ctx, "spin", "3000").succeeded(); err != nil {
		return err
	}
	took, used := time.Since(began), computed(b.harness.Kernel(b.name))-before
	// A process that has ended takes its time with it, which makes this less.
	if used < 50*time.Millisecond || used > took/5 {
		return fmt.Errorf("a tenth of a processor for %v: got %v of it, want about %v", took, used, took/10)
	}
	return nil
}

// computed is the time of processors that processes of the host have used
// (proc_pid_stat(5), fields 14 and 15, in hundredths of a second).
func computed(pids []int) time.Duration {
	var sum time.Duration
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue // it has ended
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		for i, word := range strings.Fields(rest) {
			if n, err := strconv.Atoi(word); err == nil && (i == 14-3 || i == 15-3) {
				sum += time.Duration(n) * 10 * time.Millisecond
			}
		}
	}
	return sum
}
