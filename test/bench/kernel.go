package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// fsyncs counts what the agent forces to the disk, with strace, around one job
// at a time, cold and warm.
func fsyncs(ctx context.Context, w *world, t *table) error {
	cold, err := w.start("traced", 1, "")
	if err != nil {
		return err
	}
	warm, err := w.startWarm("traced-warm", 1)
	if err != nil {
		return err
	}
	return errors.Join(cold.fsyncs(ctx, t, "cold"), warm.fsyncs(ctx, t, "warm"))
}

func (a *agent) fsyncs(ctx context.Context, t *table, kind string) error {
	if _, err := a.run(ctx, "lease.yml"); err != nil { // makes what is made once
		return err
	}
	var before, all []float64
	for n := range tracedJobs {
		if err := a.ready(ctx); err != nil {
			return err
		}
		file := a.world.path(kind + "-strace-" + strconv.Itoa(n))
		submitted := time.Now()
		var job timing
		err := traced(ctx, a.cmd.Process.Pid, file, func() (err error) {
			job, err = a.time(ctx, "lease.yml")
			return err
		})
		if err != nil {
			return err
		}
		calls, err := syncs(file)
		if err != nil {
			return err
		}
		early := 0
		for _, at := range calls {
			if at.After(submitted) && at.Before(job.first) {
				early++
			}
		}
		before, all = append(before, float64(early)), append(all, float64(len(calls)))
	}
	t.most(3, "fsyncs before the first byte, "+kind+", one lease released by name", "calls", before...)
	t.info("  fsyncs until the job is reported", "calls", all...)
	return a.stop()
}

// traced runs do while strace writes every call that forces something to the
// disk, of a process and of what it starts.
func traced(ctx context.Context, pid int, file string, do func() error) error {
	cmd := exec.CommandContext(ctx, "strace", "-f", "-ttt", "-y", "-e", "trace=fsync,fdatasync,syncfs,sync,sync_file_range",
		"-o", file, "-p", strconv.Itoa(pid))
	says, err := cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("strace: install it: %w", err)
	}
	lines := bufio.NewScanner(says)
	for lines.Scan() && !strings.Contains(lines.Text(), "attached") {
		err = errors.New(lines.Text())
	}
	if err == nil {
		done := make(chan struct{})
		go func() { // strace must not block on what it says
			defer close(done)
			for lines.Scan() {
			}
		}()
		err = errors.Join(do(), cmd.Process.Signal(syscall.SIGINT))
		<-done
	} else {
		err = errors.Join(err, cmd.Process.Kill())
	}
	_ = cmd.Wait() // ended by the signal, which is its exit status
	return err
}

// syncs are the times of the calls in a file of strace.
func syncs(file string) ([]time.Time, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var at []time.Time
	for line := range strings.Lines(string(b)) {
		w := strings.Fields(line)
		if len(w) < 3 || !regexp.MustCompile(`^(f|fdata)?sync(fs|_file_range)?\(`).MatchString(w[2]) {
			continue
		}
		t, err := epoch(w[1])
		if err != nil {
			return nil, err
		}
		at = append(at, t)
	}
	return at, nil
}

// masking runs the benchmark of the mask, one core.
func masking(ctx context.Context, _ *world, t *table) error {
	out, err := output(ctx, "go", "test", "-run=^$", "-bench=Writer100Secrets/log$", "-benchtime=1s", "-cpu=1",
		"-count="+strconv.Itoa(maskRounds), "./creds/mask")
	if err != nil {
		return err
	}
	var rates []float64
	for _, m := range regexp.MustCompile(`([0-9.]+) MB/s`).FindAllStringSubmatch(out, -1) {
		rate, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			return err
		}
		rates = append(rates, rate)
	}
	if len(rates) != maskRounds {
		return fmt.Errorf("%d figures, want %d: %s", len(rates), maskRounds, tail(out))
	}
	t.least(500, "masking a log, 100 secrets with their encodings, one core", "MB/s", rates...)
	return nil
}
