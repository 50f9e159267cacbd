package providertest

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
)

// watching calls Watch and gives back how it ended.
func watching(ctx context.Context, p providers.Provider, name string, ref []byte) error {
	_, err := within(context.WithoutCancel(ctx), "Watch", func() (struct{}, error) { return struct{}{}, p.Watch(ctx, name, ref) })
	return err
}

func watchLasts(ctx context.Context, s Service) error {
	p, job, _, err := claimed(ctx, s, "c-1")
	if err != nil {
		return err
	}
	return lasts(ctx, p, job)
}

func lasts(ctx context.Context, p providers.Provider, job providers.Job) error {
	ctx, cancel := context.WithTimeout(ctx, moment)
	defer cancel()
	err := watching(ctx, p, "c-1", job.Ref)
	if err != nil {
		return fmt.Errorf("Watch = %w, want nil when ctx ends", err)
	}
	if ctx.Err() == nil {
		return errors.New("Watch = nil before ctx ended, want it to last")
	}
	return nil
}

func watchCancelled(ctx context.Context, s Service) error {
	p, job, id, err := claimed(ctx, s, "c-1")
	if err != nil {
		return err
	}
	if err := lasts(ctx, p, job); err != nil {
		return err
	}
	late := time.NewTimer(moment)
	defer late.Stop()
	cancelled := make(chan error, 1)
	go func() {
		<-late.C
		cancelled <- s.Cancel(id)
	}()
	ctx, cancel := context.WithTimeout(ctx, patience(ctx))
	defer cancel()
	werr := watching(ctx, p, "c-1", job.Ref)
	if err := <-cancelled; err != nil {
		return fmt.Errorf("Cancel: %w", err)
	}
	if !errors.Is(werr, providers.ErrCancelled) {
		return fmt.Errorf("Watch = %w, want ErrCancelled", orNil(werr))
	}
	return nil
}

func watchCancelledBefore(ctx context.Context, s Service) error {
	_, _, _, err := cancelledJob(ctx, s)
	return err
}

func cancelledJob(ctx context.Context, s Service) (p providers.Provider, job providers.Job, id string, err error) {
	p, job, id, err = claimed(ctx, s, "c-1")
	if err != nil {
		return nil, job, "", err
	}
	if err := s.Cancel(id); err != nil {
		return nil, job, "", fmt.Errorf("Cancel: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, patience(ctx))
	defer cancel()
	if err := watching(ctx, p, "c-1", job.Ref); !errors.Is(err, providers.ErrCancelled) {
		return nil, job, "", fmt.Errorf("Watch = %w, want ErrCancelled", orNil(err))
	}
	return p, job, id, nil
}

func watchGoesOn(ctx context.Context, s Service) error {
	p, job, id, err := cancelledJob(ctx, s)
	if err != nil {
		return err
	}
	if err := lasts(ctx, p, job); err != nil {
		return fmt.Errorf("after ErrCancelled: %w", err)
	}
	r := providers.Result{Conclusion: providers.Cancelled}
	if err := p.Complete(ctx, "c-1", job.Ref, r); err != nil {
		return fmt.Errorf("Complete = %w", err)
	}
	return reported(s, id, r)
}

func completeReports(ctx context.Context, s Service) error {
	p, job, id, err := claimed(ctx, s, "c-1")
	if err != nil {
		return err
	}
	r := providers.Result{Conclusion: providers.Failure, Reason: "step 1: exit code 3", Outputs: map[string]string{"digest": "abc"}}
	if err := p.Complete(ctx, "c-1", job.Ref, r); err != nil {
		return fmt.Errorf("Complete = %w", err)
	}
	return reported(s, id, r)
}

func completeTwice(ctx context.Context, s Service) error {
	p, job, id, err := claimed(ctx, s, "c-1")
	if err != nil {
		return err
	}
	first := providers.Result{Conclusion: providers.Success}
	for i, c := range []providers.Conclusion{providers.Success, providers.Lost} {
		if err := p.Complete(ctx, "c-1", job.Ref, providers.Result{Conclusion: c}); err != nil {
			return fmt.Errorf("Complete number %d = %w, want nil", i+1, err)
		}
	}
	if p, err = s.New(); err != nil {
		return err
	}
	if err := p.Complete(ctx, "c-1", job.Ref, providers.Result{Conclusion: providers.Lost}); err != nil {
		return fmt.Errorf("Complete by a restarted agent = %w, want nil", err)
	}
	return reported(s, id, first)
}

func completeWithoutRef(ctx context.Context, s Service) error {
	p, _, id, err := claimed(ctx, s, "c-1")
	if err != nil {
		return err
	}
	r := providers.Result{Conclusion: providers.Success}
	if err := p.Complete(ctx, "c-1", nil, r); err != nil {
		return fmt.Errorf("Complete with a nil ref = %w, want nil", err)
	}
	return reported(s, id, r)
}

func completeAfterRestart(ctx context.Context, s Service) error {
	_, job, id, err := claimed(ctx, s, "c-1")
	if err != nil {
		return err
	}
	p, err := s.New()
	if err != nil {
		return err
	}
	r := providers.Result{Conclusion: providers.Lost}
	if err := p.Complete(ctx, "c-1", job.Ref, r); err != nil {
		return fmt.Errorf("Complete = %w, want nil", err)
	}
	return reported(s, id, r)
}

func completeUnclaimed(ctx context.Context, s Service) error {
	p, o, id, err := offered(ctx, s)
	if err != nil {
		return err
	}
	if err := p.Complete(ctx, "c-never", nil, providers.Result{Conclusion: providers.Lost}); err != nil {
		return fmt.Errorf("Complete of a name never claimed = %w, want nil", err)
	}
	if got, err := s.Reports(id); err != nil || len(got) != 0 {
		return fmt.Errorf("reports = %+v, %w; want none: the job was not claimed", got, orNil(err))
	}
	if _, err := p.Claim(ctx, "c-1", o); err != nil {
		return fmt.Errorf("Claim after it = %w, want the job", err)
	}
	return nil
}

func completedIsOver(ctx context.Context, s Service) error {
	p, o, _, err := offered(ctx, s)
	if err != nil {
		return err
	}
	job, err := p.Claim(ctx, "c-1", o)
	if err != nil {
		return fmt.Errorf("Claim = %w", err)
	}
	if err := p.Complete(ctx, "c-1", job.Ref, providers.Result{Conclusion: providers.Success}); err != nil {
		return fmt.Errorf("Complete = %w", err)
	}
	if p, err = s.New(); err != nil {
		return err
	}
	if _, err := p.Claim(ctx, "c-2", o); !errors.Is(err, providers.ErrGone) {
		return fmt.Errorf("Claim of the old offer = %w, want ErrGone", orNil(err))
	}
	short, cancel := context.WithTimeout(ctx, moment)
	defer cancel()
	if o, err := p.Poll(short); err == nil {
		if _, err := p.Claim(ctx, "c-3", o); !errors.Is(err, providers.ErrGone) {
			return fmt.Errorf("the job is on offer again and Claim = %w, want ErrGone", orNil(err))
		}
	}
	return nil
}
