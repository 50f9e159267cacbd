package sandboxtest

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
)

func limitClauses() []clause {
	return []clause{
		{"memory over the limit is killed and said to be", "memory limit", checkMemory},
		{"shared memory counts as memory", "memory limit", checkShared},
		{"processes over the limit are refused", "process limit", checkPids},
		{"threads over the limit are refused", "process limit", checkThreads},
		{"bytes over the limit are refused", "disk limit", checkDisk},
		{"files over the limit are refused", "disk limit", checkInodes},
		{"computing over the limit is slowed down", "cpu limit", checkCPU},
	}
}

// beside runs attack in a box with those limits, while a neighbour prints a
// line every 20 ms, and wants both to be as they should: the neighbour is not
// stopped and not held up.
func (h Harness) beside(ctx context.Context, l sandbox.Limits, attack func(b *box) error) error {
	return h.within(ctx, func(calm *box) error {
		started, ended := make(chan struct{}), make(chan error, 1)
		ctx, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		over := errors.New("the attack is over")
		go func() {
			var last time.Time
			var longest time.Duration
			lines := 0
			p := shell(`while :; do echo tick; : > /workspace/f; rm /workspace/f; sleep 0.02; done`)
			p.Stdout = func(at time.Time, _ []byte) error {
				if lines++; lines == 1 {
					close(started)
				} else {
					longest = max(longest, at.Sub(last))
				}
				last = at
				return nil
			}
			_, err := calm.Run(ctx, p)
			switch {
			case !errors.Is(err, over):
				err = fmt.Errorf("the neighbour ended: %w", err)
			case lines < 2 || longest > patience:
				err = fmt.Errorf("the neighbour printed %d lines, and once none for %v", lines, longest)
			default:
				err = nil
			}
			ended <- err
		}()
		select {
		case <-started:
		case err := <-ended:
			return err
		}
		err := h.with(ctx, h.spec(l), attack)
		cancel(over)
		return errors.Join(err, <-ended)
	})
}

// patience is how long a neighbour may be held up on a busy machine.
const patience = 30 * time.Second

func checkMemory(ctx context.Context, h Harness) error {
	return h.beside(ctx, sandbox.Limits{Memory: 64 << 20}, func(b *box) error {
		r := b.probe(ctx, "memory", strconv.Itoa(256<<20))
		if h.Kernel != nil {
			return diedOfMemory(r)
		}
		if r.err != nil || r.exit != (sandbox.Exit{Code: 137, Signal: 9, OOM: true}) {
			return fmt.Errorf("256 MiB of 64: got %v, want killed, and OOM", r)
		}
		return wrap("the next process", b.probe(ctx, "memory", strconv.Itoa(8<<20)).printed(strconv.Itoa(8<<20)+"\n"))
	})
}

func checkShared(ctx context.Context, h Harness) error {
	return h.with(ctx, h.spec(sandbox.Limits{Memory: 48 << 20}), func(b *box) error {
		r := b.probe(ctx, "fill", "/dev/shm/f", strconv.Itoa(60<<20))
		if r.succeeded() == nil {
			return errors.New("60 MiB in /dev/shm of a box of 48: got success")
		}
		return nil
	})
}

// reached is the number that a probe printed last.
func (r result) reached() int {
	f := strings.Fields(r.out)
	for i := len(f) - 1; i >= 0; i-- {
		if n, err := strconv.Atoi(f[i]); err == nil {
			return n
		}
	}
	return 0
}

func checkPids(ctx context.Context, h Harness) error {
	return h.beside(ctx, sandbox.Limits{Pids: 60}, func(b *box) error {
		r := b.probe(ctx, "forks", "100")
		if h.Kernel != nil && errors.Is(r.err, sandbox.ErrDied) && r.reached() <= 60 {
			return nil
		}
		if err := r.refused(); err != nil {
			return fmt.Errorf("100 processes of 60: %w", err)
		}
		if n := r.reached(); n > 60 {
			return fmt.Errorf("got %d processes, want at most 60", n)
		}
		return wrap("the next process", b.script(ctx, "echo fine").printed("fine\n"))
	})
}

func checkThreads(ctx context.Context, h Harness) error {
	return h.beside(ctx, sandbox.Limits{Pids: 100}, func(b *box) error {
		if h.Kernel != nil {
			return b.kernelThreads(ctx, 100)
		}
		r := b.probe(ctx, "threads", "300")
		if n := r.reached(); r.err != nil || r.exit.Code == 0 || n > 100 {
			return fmt.Errorf("300 threads of 100: got %.200v after %d", r, n)
		}
		return wrap("the next process", b.script(ctx, "echo fine").printed("fine\n"))
	})
}

func checkDisk(ctx context.Context, h Harness) error {
	const size = 64 << 20
	return h.beside(ctx, sandbox.Limits{Disk: size}, func(b *box) error {
		for _, dir := range []string{sandbox.Workspace, "/tmp", "/var/tmp"} {
			r := b.probe(ctx, "fill", dir+"/big", strconv.Itoa(100<<20))
			if err := r.refused(); err != nil {
				return fmt.Errorf("100 MiB of 64 in %s: %w", dir, err)
			}
			if n := r.reached(); n > size || n < size/2 || !strings.Contains(r.out, "no space left") {
				return fmt.Errorf("in %s: got %v, want %d bytes or a little less, and ENOSPC", dir, r, size)
			}
			if err := b.script(ctx, "rm "+dir+"/big").succeeded(); err != nil {
				return err
			}
		}
		return nil
	})
}

func checkInodes(ctx context.Context, h Harness) error {
	return h.beside(ctx, sandbox.Limits{Inodes: 1000, Disk: 64 << 20}, func(b *box) error {
		r := b.probe(ctx, "inodes", sandbox.Workspace, "3000")
		if err := r.refused(); err != nil {
			return fmt.Errorf("3000 files of 1000: %w", err)
		}
		if n := r.reached(); n > 1000 || n < 500 || !strings.Contains(r.out, "no space left") {
			return fmt.Errorf("got %v, want 1000 files or a few less, and ENOSPC", r)
		}
		return nil
	})
}

func checkCPU(ctx context.Context, h Harness) error {
	return h.with(ctx, h.spec(sandbox.Limits{MilliCPU: 100}), func(b *box) error {
		if h.Kernel != nil {
			return b.kernelTime(ctx)
		}
		r := b.probe(ctx, "spin", "1000")
		if err := r.succeeded(); err != nil {
			return err
		}
		if n := r.reached(); n > 400 {
			return fmt.Errorf("a tenth of a processor for a second: got %d ms of it, want about 100", n)
		}
		return nil
	})
}
