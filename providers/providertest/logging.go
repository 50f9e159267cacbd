package providertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
)

// logOf opens the log of the job that is claimed as c-1.
func logOf(ctx context.Context, p providers.Provider, ref []byte) (providers.Log, error) {
	l, ok := p.(providers.Logger)
	if !ok {
		return nil, errors.New("the provider is no Logger, though another of New's was")
	}
	log, err := l.Log(ctx, "c-1", ref)
	if err != nil {
		return nil, fmt.Errorf("Log = %w", err)
	}
	return log, nil
}

// noise is bytes of every kind, also none that are text.
func noise(n int) []byte {
	r := rand.New(rand.NewPCG(1, 2)) // the same bytes each time
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return append(b, "\r\n\x00\xff\n\n%s ::set-output::\n"...)
}

// writeChunks cuts b where it likes: a chunk may be empty, a byte, or large.
func writeChunks(log providers.Log, b []byte) error {
	for _, size := range []int{1, 0, 2, 3, 1, 4096, 7, 65536} {
		size = min(size, len(b))
		if err := log.Write(time.Now(), 0, b[:size]); err != nil {
			return fmt.Errorf("Write of %d bytes = %w", size, err)
		}
		b = b[size:]
	}
	if err := log.Write(time.Now(), 0, b); err != nil {
		return fmt.Errorf("Write of %d bytes = %w", len(b), err)
	}
	return nil
}

func holds(s Service, id string, want []byte) error {
	got, _, err := s.Log(id)
	if err != nil {
		return fmt.Errorf("reading the log: %w", err)
	}
	if s.Shown != nil {
		want = s.Shown(want)
	}
	if !bytes.Equal(got, want) {
		at := 0
		for at < min(len(got), len(want)) && got[at] == want[at] {
			at++
		}
		return fmt.Errorf("the log has %d bytes, want the %d that were written; they differ at byte %d", len(got), len(want), at)
	}
	return nil
}

func logBytes(ctx context.Context, s Service) error {
	p, job, id, err := claimed(ctx, s, "c-1")
	if err != nil {
		return err
	}
	log, err := logOf(ctx, p, job.Ref)
	if err != nil {
		return err
	}
	b := noise(200_000)
	if err := writeChunks(log, b); err != nil {
		return err
	}
	if err := log.Close(ctx); err != nil {
		return fmt.Errorf("Close = %w", err)
	}
	return holds(s, id, b)
}

func logReopened(ctx context.Context, s Service) error {
	p, job, id, err := claimed(ctx, s, "c-1")
	if err != nil {
		return err
	}
	var want []byte
	for i := range 3 {
		log, err := logOf(ctx, p, job.Ref)
		if err != nil {
			return fmt.Errorf("opened for the time %d: %w", i+1, err)
		}
		line := fmt.Appendf(nil, "life %d\n", i)
		if err := errors.Join(log.Write(time.Now(), 0, line), log.Close(ctx)); err != nil {
			return err
		}
		want = append(want, line...)
		if p, err = s.New(); err != nil {
			return err
		}
	}
	return holds(s, id, want)
}

// logClosed gives the log no other time than Close: a Complete that flushes
// would be too late for what a reader sees as the end.
func logClosed(ctx context.Context, s Service) error {
	p, job, id, err := claimed(ctx, s, "c-1")
	if err != nil {
		return err
	}
	log, err := logOf(ctx, p, job.Ref)
	if err != nil {
		return err
	}
	if err := errors.Join(log.Write(time.Now(), 0, []byte("last words")), log.Close(ctx)); err != nil {
		return err
	}
	if err := holds(s, id, []byte("last words")); err != nil {
		return fmt.Errorf("after Close: %w", err)
	}
	r := providers.Result{Conclusion: providers.Success}
	if err := p.Complete(ctx, "c-1", job.Ref, r); err != nil {
		return fmt.Errorf("Complete = %w", err)
	}
	return holds(s, id, []byte("last words"))
}

func logClosedLate(ctx context.Context, s Service) error {
	p, job, id, err := claimed(ctx, s, "c-1")
	if err != nil {
		return err
	}
	life, end := context.WithCancel(ctx)
	defer end()
	log, err := logOf(life, p, job.Ref)
	if err != nil {
		return err
	}
	first := log.Write(time.Now(), 0, []byte("in time, "))
	end()
	if err := errors.Join(first, log.Write(time.Now(), 0, []byte("late")), log.Close(ctx)); err != nil {
		return fmt.Errorf("after the ctx of Log was done: %w", err)
	}
	return holds(s, id, []byte("in time, late"))
}

func logSteps(ctx context.Context, s Service) error {
	p, job, id, err := claimed(ctx, s, "c-1")
	if err != nil {
		return err
	}
	log, err := logOf(ctx, p, job.Ref)
	if err != nil {
		return err
	}
	start := time.Now().UTC().Truncate(time.Second)
	states := []providers.StepState{
		{Index: 0, Name: "Build", Started: start},
		{Index: 0, Name: "Build", Started: start, Ended: start.Add(time.Second), Conclusion: providers.Success},
		{Index: 1, Name: "Test", Started: start.Add(time.Second)},
		{Index: 1, Name: "Test", Started: start.Add(time.Second), Ended: start.Add(3 * time.Second), Conclusion: providers.Failure, ExitCode: 3},
	}
	for _, state := range states {
		if err := log.Step(state); err != nil {
			return fmt.Errorf("Step = %w", err)
		}
	}
	if err := log.Close(ctx); err != nil {
		return fmt.Errorf("Close = %w", err)
	}
	_, got, err := s.Log(id)
	if err != nil {
		return fmt.Errorf("reading the steps: %w", err)
	}
	for _, want := range []providers.StepState{states[1], states[3]} {
		// Services differ in what else they keep, so only what a user looks at.
		if g := got[want.Index]; g.Conclusion != want.Conclusion || g.Ended.IsZero() {
			return fmt.Errorf("step %d is shown as %+v, want %+v", want.Index, g, want)
		}
	}
	return nil
}

func logGone(ctx context.Context, s Service) error {
	p, job, _, err := claimed(ctx, s, "c-1")
	if err != nil {
		return err
	}
	l, ok := p.(providers.Logger)
	if !ok {
		return errors.New("the provider is no Logger, though another of New's was")
	}
	if _, err := l.Log(ctx, "c-never", nil); !errors.Is(err, providers.ErrGone) {
		return fmt.Errorf("Log of a name never claimed = %w, want ErrGone", orNil(err))
	}
	if err := p.Complete(ctx, "c-1", job.Ref, providers.Result{Conclusion: providers.Success}); err != nil {
		return fmt.Errorf("Complete = %w", err)
	}
	if _, err := l.Log(ctx, "c-1", nil); !errors.Is(err, providers.ErrGone) {
		return fmt.Errorf("Log of a claim that was given up = %w, want ErrGone", orNil(err))
	}
	return nil
}
