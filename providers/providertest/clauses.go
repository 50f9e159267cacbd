package providertest

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/providers"
)

// claimed submits a job and claims it under name as a new agent.
func claimed(ctx context.Context, s Service, name string) (p providers.Provider, job providers.Job, id string, err error) {
	p, offer, id, err := offered(ctx, s)
	if err != nil {
		return nil, providers.Job{}, "", err
	}
	job, err = p.Claim(ctx, name, offer)
	if err != nil {
		return nil, providers.Job{}, "", fmt.Errorf("Claim = %w, want the job", err)
	}
	return p, job, id, nil
}

func offered(ctx context.Context, s Service) (p providers.Provider, o providers.Offer, id string, err error) {
	p, err = s.New()
	if err != nil {
		return nil, o, "", err
	}
	if id, err = s.Submit("echo conformance"); err != nil {
		return nil, o, "", fmt.Errorf("Submit: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, patience(ctx))
	defer cancel()
	if o, err = p.Poll(ctx); err != nil {
		return nil, o, "", fmt.Errorf("Poll = %w, want an offer", err)
	}
	return p, o, id, nil
}

func pollWaits(ctx context.Context, s Service) error {
	p, err := s.New()
	if err != nil {
		return err
	}
	short, cancel := context.WithTimeout(ctx, moment)
	defer cancel()
	o, err := within(ctx, "Poll after its ctx ended", func() (providers.Offer, error) { return p.Poll(short) })
	if err == nil {
		// A service whose asking is taking offers before it knows.
		if _, err := p.Claim(ctx, "c-nothing", o); !errors.Is(err, providers.ErrGone) {
			return fmt.Errorf("an empty service offered %+v and Claim = %v, want ErrGone", o, err)
		}
		return nil
	}
	if h, ok := errors.AsType[*hang](err); ok {
		return h
	}
	if short.Err() == nil {
		return fmt.Errorf("Poll = %w before its ctx ended, want it to wait", err)
	}
	return nil
}

// within runs f and fails if it does not come back in time, so that a provider
// that ignores its ctx fails one clause and does not hang the suite.
func within[T any](ctx context.Context, what string, f func() (T, error)) (T, error) {
	type answer struct {
		v   T
		err error
	}
	done := make(chan answer, 1)
	go func() {
		v, err := f()
		done <- answer{v, err}
	}()
	ctx, cancel := context.WithTimeout(ctx, patience(ctx))
	defer cancel()
	select {
	case a := <-done:
		return a.v, a.err
	case <-ctx.Done():
		var zero T
		return zero, &hang{what}
	}
}

// A hang is the error of a call that did not come back.
type hang struct{ what string }

func (h *hang) Error() string { return h.what + " did not come back" }

func pollWakes(ctx context.Context, s Service) error {
	p, err := s.New()
	if err != nil {
		return err
	}
	submitted := make(chan error, 1)
	late := time.NewTimer(moment)
	defer late.Stop()
	go func() {
		<-late.C
		_, err := s.Submit("echo late")
		submitted <- err
	}()
	var job providers.Job
	for {
		wait, cancel := context.WithTimeout(ctx, patience(ctx))
		o, err := p.Poll(wait)
		cancel()
		if err != nil {
			return fmt.Errorf("Poll = %w, want an offer", err)
		}
		job, err = p.Claim(ctx, "c-late", o)
		if err == nil {
			break
		}
		if !errors.Is(err, providers.ErrGone) {
			return fmt.Errorf("Claim = %w, want the job", err)
		}
	}
	if err := <-submitted; err != nil {
		return fmt.Errorf("Submit: %w", err)
	}
	return runs(job, "echo late")
}

func runs(job providers.Job, command string) error {
	if len(job.Steps) != 1 || strings.TrimSpace(job.Steps[0].Run) != command {
		return fmt.Errorf("steps = %+v, want one that runs %q", job.Steps, command)
	}
	return nil
}

func claimGivesJob(ctx context.Context, s Service) error {
	_, job, _, err := claimed(ctx, s, "c-1")
	if err != nil {
		return err
	}
	if job.Subject.Provider == "" || job.Subject.Repository == "" || job.Subject.Job == "" {
		return fmt.Errorf("subject = %+v, want provider, repository and job", job.Subject)
	}
	if job.Trust == "" {
		return errors.New("trust is empty, want a tier")
	}
	if len(job.Steps) == 1 && job.Steps[0].ID == "" {
		return errors.New("the step has no id")
	}
	return runs(job, "echo conformance")
}

func claimTwice(ctx context.Context, s Service) error {
	p, o, _, err := offered(ctx, s)
	if err != nil {
		return err
	}
	first, err := p.Claim(ctx, "c-1", o)
	if err != nil {
		return fmt.Errorf("first Claim = %w", err)
	}
	second, err := p.Claim(ctx, "c-1", o)
	return same(first, second, err)
}

func same(first, second providers.Job, err error) error {
	if err != nil {
		return fmt.Errorf("second Claim = %w, want the job again", err)
	}
	if !reflect.DeepEqual(first, second) {
		return fmt.Errorf("second Claim = %+v, want the same job %+v", second, first)
	}
	return nil
}

func claimAfterRestart(ctx context.Context, s Service) error {
	p, o, _, err := offered(ctx, s)
	if err != nil {
		return err
	}
	first, err := p.Claim(ctx, "c-1", o)
	if err != nil {
		return fmt.Errorf("first Claim = %w", err)
	}
	p, err = s.New()
	if err != nil {
		return err
	}
	second, err := p.Claim(ctx, "c-1", o)
	if s.Taking && errors.Is(err, providers.ErrGone) {
		return nil
	}
	return same(first, second, err)
}

func claimOnce(ctx context.Context, s Service) error {
	p, o, _, err := offered(ctx, s)
	if err != nil {
		return err
	}
	q, err := s.New()
	if err != nil {
		return err
	}
	if _, err := p.Claim(ctx, "c-first", o); err != nil {
		return fmt.Errorf("first agent: Claim = %w, want the job", err)
	}
	if _, err := q.Claim(ctx, "c-second", o); !errors.Is(err, providers.ErrGone) {
		return fmt.Errorf("second agent: Claim = %w, want ErrGone", orNil(err))
	}
	if _, err := p.Claim(ctx, "c-third", o); !errors.Is(err, providers.ErrGone) {
		return fmt.Errorf("first agent under another name: Claim = %w, want ErrGone", orNil(err))
	}
	return nil
}

func orNil(err error) error {
	if err == nil {
		return errors.New("nil")
	}
	return err
}

// claimNothing offers ids that no service gave out, and some that lead
// elsewhere if they are made a part of a path or a URL.
func claimNothing(ctx context.Context, s Service) error {
	p, err := s.New()
	if err != nil {
		return err
	}
	for i, id := range []string{
		"none", "", ".", "..", "../new/none", "../../../../etc/passwd", "/etc/passwd", "a/b", "a\x00b", "a\nb", "a?b=c#d", "%2e%2e%2f", strings.Repeat("x", 5000), "\xff\xfe",
	} {
		if _, err := p.Claim(ctx, fmt.Sprintf("c-%d", i), providers.Offer{ID: id}); !errors.Is(err, providers.ErrGone) {
			return fmt.Errorf("Claim of the offer %.40q = %w, want ErrGone", id, orNil(err))
		}
		if err := p.Complete(ctx, fmt.Sprintf("c-%d", i), nil, providers.Result{Conclusion: providers.Lost}); err != nil {
			return fmt.Errorf("Complete after the claim of %.40q = %w, want nil", id, err)
		}
	}
	return nil
}

func noneLost(ctx context.Context, s Service) error {
	const jobs, agents = 50, 4
	want := map[string]int{}
	for i := range jobs {
		command := fmt.Sprintf("echo %d", i)
		if _, err := s.Submit(command); err != nil {
			return fmt.Errorf("Submit: %w", err)
		}
		want[command] = 1
	}
	ctx, done := context.WithTimeout(ctx, patience(ctx))
	defer done()
	var mu sync.Mutex
	got := map[string]int{}
	errs := make([]error, agents)
	var wg sync.WaitGroup
	for a := range agents {
		p, err := s.New()
		if err != nil {
			return err
		}
		wg.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				o, err := p.Poll(ctx)
				if err != nil {
					return // the others have taken the rest
				}
				job, err := p.Claim(ctx, fmt.Sprintf("c-%d-%d", a, n), o)
				if errors.Is(err, providers.ErrGone) || ctx.Err() != nil {
					continue
				}
				if err != nil || len(job.Steps) != 1 {
					errs[a] = fmt.Errorf("Claim = %+v, %w", job, orNil(err))
					done()
					return
				}
				mu.Lock()
				got[strings.TrimSpace(job.Steps[0].Run)]++
				if len(got) == jobs {
					done()
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if !reflect.DeepEqual(got, want) {
		return fmt.Errorf("claimed %v, want each of %d jobs once", got, jobs)
	}
	return nil
}

func badJob(ctx context.Context, s Service) error {
	p, err := s.New()
	if err != nil {
		return err
	}
	id, err := s.SubmitBad()
	if err != nil {
		return fmt.Errorf("SubmitBad: %w", err)
	}
	o, err := p.Poll(ctx)
	if err != nil {
		return fmt.Errorf("Poll = %w, want an offer", err)
	}
	job, err := p.Claim(ctx, "c-bad", o)
	if !errors.Is(err, providers.ErrBadJob) {
		return fmt.Errorf("Claim = %w, want ErrBadJob", orNil(err))
	}
	if len(job.Ref) == 0 && !job.ByName {
		return errors.New("Job.Ref is empty beside ErrBadJob: the claim stands and its ref is needed")
	}
	q, err := s.New()
	if err != nil {
		return err
	}
	if _, err := q.Claim(ctx, "c-other", o); !errors.Is(err, providers.ErrGone) {
		return fmt.Errorf("another agent's Claim = %w, want ErrGone: the claim stands", orNil(err))
	}
	r := providers.Result{Conclusion: providers.Failure, Reason: "the workflow is wrong"}
	if err := p.Complete(ctx, "c-bad", job.Ref, r); err != nil {
		return fmt.Errorf("Complete = %w, want nil", err)
	}
	return reported(s, id, r)
}

// reported fails unless exactly one report with that conclusion took effect.
func reported(s Service, id string, want providers.Result) error {
	got, err := s.Reports(id)
	if err != nil {
		return fmt.Errorf("Reports: %w", err)
	}
	if word, ok := s.Words[want.Conclusion]; ok {
		want.Conclusion = word
	}
	if len(got) != 1 || got[0].Conclusion != want.Conclusion {
		return fmt.Errorf("reports = %+v, want one of %q", got, want.Conclusion)
	}
	return nil
}

func longNames(ctx context.Context, s Service) error {
	names := []string{strings.Repeat("a", 40), strings.Repeat("a", 39) + "b", "-", "0"}
	for _, name := range names {
		p, job, id, err := claimed(ctx, s, name)
		if err != nil {
			return fmt.Errorf("name %q: %w", name, err)
		}
		r := providers.Result{Conclusion: providers.Success}
		if err := p.Complete(ctx, name, job.Ref, r); err != nil {
			return fmt.Errorf("name %q: Complete = %w", name, err)
		}
		if err := reported(s, id, r); err != nil {
			return fmt.Errorf("name %q: %w", name, err)
		}
	}
	return nil
}
