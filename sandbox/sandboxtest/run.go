package sandboxtest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
)

func runClauses() []clause {
	return []clause{
		{"the exit status is that of the process", "", checkStatus},
		{"the end by a signal is 128 and the signal", "", checkSignal},
		{"a missing program is 127 with a reason", "", checkMissing},
		{"a program that cannot be run is 126 with a reason", "", checkUnrunnable},
		{"the environment is what was given", "", checkEnv},
		{"the directory is the workspace or what was given", "", checkDir},
		{"output is complete and in order", "", checkOutput},
		{"output is stamped when it is read", "", checkStamps},
		{"an output that blocks blocks the process", "", checkPressure},
		{"an output that is nil discards", "", checkNil},
		{"a process starts with three descriptors", "", checkDescriptors},
	}
}

func checkStatus(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		for _, code := range []int{0, 1, 42, 255} {
			r := b.script(ctx, "exit "+strconv.Itoa(code))
			if r.err != nil || r.exit != (sandbox.Exit{Code: code}) {
				return fmt.Errorf("exit %d: got %v", code, r)
			}
		}
		return nil
	})
}

func checkSignal(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		for _, s := range []int{1, 9, 15} {
			r := b.script(ctx, fmt.Sprintf("kill -%d $$; sleep 100", s))
			if r.err != nil || r.exit != (sandbox.Exit{Code: 128 + s, Signal: s}) {
				return fmt.Errorf("signal %d: got %v", s, r)
			}
		}
		return nil
	})
}

func (b *box) notStarted(ctx context.Context, p sandbox.Process, code int) error {
	r := b.run(ctx, p)
	if r.err != nil || r.exit != (sandbox.Exit{Code: code}) || strings.TrimSpace(r.errs) == "" || r.out != "" {
		return fmt.Errorf("%q in %q: got %v, want code %d and a reason on stderr", p.Args, p.Dir, r, code)
	}
	return nil
}

func checkMissing(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		return errors.Join(
			b.notStarted(ctx, sandbox.Process{Args: []string{"/no/such/program"}}, 127),
			b.notStarted(ctx, sandbox.Process{Args: []string{"no-such-program"}}, 127))
	})
}

func checkUnrunnable(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		return errors.Join(
			b.notStarted(ctx, sandbox.Process{Args: []string{"/etc/passwd"}}, 126),
			b.notStarted(ctx, sandbox.Process{Args: []string{"/tmp"}}, 126),
			b.notStarted(ctx, sandbox.Process{Args: []string{"/bin/true"}, Dir: "/no/such/directory"}, 126))
	})
}

func checkEnv(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		none := b.run(ctx, sandbox.Process{Args: []string{"/usr/bin/env"}})
		if err := none.printed(""); err != nil {
			return fmt.Errorf("no environment: %w", err)
		}
		env := []string{"B=two words", "A=1", "EMPTY=", "LINES=a\nb"}
		return b.run(ctx, sandbox.Process{Args: []string{"/usr/bin/env"}, Env: env}).printed(strings.Join(env, "\n") + "\n")
	})
}

func checkDir(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		tmp := sandbox.Process{Args: []string{"/bin/pwd"}, Dir: "/tmp"}
		return errors.Join(
			b.run(ctx, sandbox.Process{Args: []string{"/bin/pwd"}}).printed(sandbox.Workspace+"\n"),
			b.run(ctx, tmp).printed("/tmp\n"))
	})
}

func checkOutput(ctx context.Context, h Harness) error {
	const lines = 100_000
	var want strings.Builder
	for i := range lines {
		fmt.Fprintln(&want, i+1)
	}
	return h.within(ctx, func(b *box) error {
		r := b.script(ctx, fmt.Sprintf("seq %d & seq %d >&2; wait", lines, lines))
		if err := r.succeeded(); err != nil {
			return err
		}
		if r.out != want.String() || r.errs != want.String() {
			return fmt.Errorf("got %d bytes on stdout and %d on stderr, want %d lines in order on both (%d bytes)", len(r.out), len(r.errs), lines, want.Len())
		}
		// What is written last, without a newline, by a process that is killed.
		r = b.script(ctx, "printf last; kill -9 $$")
		if r.out != "last" {
			return fmt.Errorf("before a kill: got %v, want %q", r, "last")
		}
		return nil
	})
}

func checkStamps(ctx context.Context, h Harness) error {
	const apart = 500 * time.Millisecond
	return h.within(ctx, func(b *box) error {
		var stamps []time.Time
		in := make(chan []byte, 1)
		p := shell("echo a; read -r line; echo b")
		p.Stdin = in
		p.Stdout = func(at time.Time, _ []byte) error {
			if stamps = append(stamps, at); len(stamps) == 1 {
				select {
				case <-time.After(apart):
				case <-ctx.Done():
				}
				in <- []byte("\n")
				close(in)
			}
			return nil
		}
		began := time.Now()
		if _, err := b.Run(ctx, p); err != nil {
			return err
		}
		ended := time.Now()
		last := began.Add(-time.Second) // of another clock
		for _, at := range stamps {
			if at.Before(last) || at.After(ended.Add(time.Second)) {
				return fmt.Errorf("stamps %v of a process that ran from %v to %v", stamps, began, ended)
			}
			last = at
		}
		if len(stamps) != 2 || stamps[1].Sub(stamps[0]) < apart*4/5 {
			return fmt.Errorf("stamps %v of two lines %v apart", stamps, apart)
		}
		return nil
	})
}

// checkPressure lets nothing through for a while. The last bytes of a process
// that was held up are read, and stamped, only after that.
func checkPressure(ctx context.Context, h Harness) error {
	const size, hold = 64 << 20, 500 * time.Millisecond
	return h.within(ctx, func(b *box) error {
		if err := b.install(ctx); err != nil {
			return err
		}
		var released, last time.Time
		total := 0
		p := sandbox.Process{Args: []string{probePath, "flood", strconv.Itoa(size)}}
		p.Stdout = func(at time.Time, b []byte) error {
			if total == 0 {
				select {
				case <-time.After(hold):
				case <-ctx.Done():
				}
				released = time.Now()
			}
			total += len(b)
			last = at
			return nil
		}
		exit, err := b.Run(ctx, p)
		if err != nil || exit.Code != 0 || total != size {
			return fmt.Errorf("got %d bytes, %+v, error %w, want %d", total, exit, err, size)
		}
		if last.Before(released) {
			return fmt.Errorf("all of %d bytes were read %v before the output took any", size, released.Sub(last))
		}
		return nil
	})
}

func checkNil(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		exit, err := b.Run(ctx, shell("seq 100000; seq 100000 >&2; exit 3"))
		if err != nil || exit.Code != 3 {
			return fmt.Errorf("got %+v, error %w, want code 3", exit, err)
		}
		return nil
	})
}

func checkDescriptors(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		return errors.Join(
			wrap("descriptors beside 0, 1 and 2", b.probe(ctx, "fds").refused()),
			wrap("standard input", b.script(ctx, "cat").printed("")))
	})
}

func stopClauses() []clause {
	return []clause{
		{"the end of the context interrupts", "", checkInterrupt},
		{"after a grace it terminates", "", checkTerminate},
		{"after another grace it kills", "", checkKill},
		{"an error of an output ends the process", "", checkOutputError},
	}
}

// stop runs a script, ends the context when it has printed something, and
// wants the cause back.
func (b *box) stop(ctx context.Context, text, mark string, grace time.Duration) (result, time.Duration) {
	cause := errors.New("stopped by the suite")
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var out strings.Builder
	var told time.Time
	p := shell(text, mark)
	p.Grace = grace
	p.Stdout = func(_ time.Time, b []byte) error {
		out.Write(b)
		if told.IsZero() {
			told = time.Now()
			cancel(cause)
		}
		return nil
	}
	exit, err := b.Run(ctx, p)
	r := result{out: out.String(), exit: exit}
	if !errors.Is(err, cause) {
		r.err = fmt.Errorf("got error %w, want the cause of the context", err)
	}
	return r, time.Since(told)
}

// grace is short for what is killed in the end; long is for a trap that has to
// run before the next signal comes, on a machine that is busy.
const (
	grace = 400 * time.Millisecond
	long  = 5 * grace
)

func checkInterrupt(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		r, _ := b.stop(ctx, `trap 'echo int; exit 7' INT; trap 'exit 8' TERM; echo up; while :; do sleep 0.05; done`, token(), time.Minute)
		if r.err != nil || r.exit != (sandbox.Exit{Code: 7}) || r.out != "up\nint\n" {
			return fmt.Errorf("got %v, want the trap of INT", r)
		}
		return wrap("the next process", b.script(ctx, "echo fine").printed("fine\n"))
	})
}

func checkTerminate(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		r, took := b.stop(ctx, `trap '' INT; trap 'exit 8' TERM; echo up; while :; do sleep 0.05; done`, token(), long)
		if r.err != nil || r.exit != (sandbox.Exit{Code: 8}) || took < long {
			return fmt.Errorf("got %v after %v, want the trap of TERM after %v", r, took, long)
		}
		return nil
	})
}

func checkKill(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		mark := token()
		r, took := b.stop(ctx, `trap '' INT TERM
			setsid sh -c 'while :; do sleep 0.05; done' sh "$1" & echo up; while :; do sleep 0.05; done`, mark, grace)
		if r.err != nil || r.exit != (sandbox.Exit{Code: 137, Signal: 9}) || took < 2*grace {
			return fmt.Errorf("got %v after %v, want killed after %v", r, took, 2*grace)
		}
		return eventually(ctx, time.Minute, "the end of a child in a session of its own", func() bool { return b.running(ctx, mark) == 0 })
	})
}

func checkOutputError(ctx context.Context, h Harness) error {
	return h.within(ctx, func(b *box) error {
		mark := token()
		p := shell("while :; do echo more; sleep 0.01; done", mark)
		p.Grace = grace
		p.Stdout = func(time.Time, []byte) error { return io.ErrShortWrite }
		if _, err := b.Run(ctx, p); !errors.Is(err, io.ErrShortWrite) {
			return fmt.Errorf("Run: got error %w, want that of the output", err)
		}
		return eventually(ctx, time.Minute, "the end of the process", func() bool { return b.running(ctx, mark) == 0 })
	})
}
