package runner

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mayfly-ci/mayfly/runner/internal/failpoint"
	"github.com/mayfly-ci/mayfly/runner/internal/journal"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox"
)

// pullOwn makes the image of the plan ready before anything else is held, and
// says what it is: from then on it has a digest and no name (docs/adr/0013). What
// it is pulled with is gone when it returns. The base of a runtime may be an
// image too; of one that has none nothing is said.
func (l *life) pullOwn(ctx context.Context, plan policy.Plan, deadline time.Time) (sandbox.Image, error) {
	if _, ok := l.cfg.Runtimes[plan.Runtime].(sandbox.Puller); plan.Image == "" && !ok {
		return sandbox.Image{}, nil
	}
	request, err := l.credentials(ctx, plan, deadline)
	if err != nil {
		return sandbox.Image{}, err
	}
	img, err := l.pull(ctx, plan.Runtime, "the job", request)
	// A lease that cannot be released now is released with the job, and stops it.
	err = errors.Join(err, l.release(ctx, l.log, policy.PullStep, l.out))
	l.clock.mark("pull")
	return img, err
}

// pull makes an image ready for a box, and writes down, also in the job's log,
// which one it is.
func (l *life) pull(ctx context.Context, runtime, what string, p sandbox.Pull) (sandbox.Image, error) {
	puller, ok := l.cfg.Runtimes[runtime].(sandbox.Puller)
	if !ok {
		return sandbox.Image{}, fmt.Errorf("image %s: boxes of runtime %q are made of no image: %w", p.Image, runtime, sandbox.ErrUnsupported)
	}
	img, err := puller.Pull(ctx, p)
	base := p.Image == ""
	if err == nil && base {
		if img.Ref == "" {
			return img, nil
		}
		p.Image = "of the runtime"
	}
	failpoint.Here("pulled")
	err = errors.Join(err, l.audit(ctx, l.log.Job, "image.pull", p.Image, err,
		"for", what, "digest", img.Digest, "bytes", number(img.Size), "runtime", runtime))
	if err != nil {
		return sandbox.Image{}, err
	}
	if base { // nobody asked for it: the job's log is the job's
		return img, nil
	}
	l.out.notice(0, "image "+p.Image+" of "+what+" is "+img.Digest)
	return img, nil
}

// credentials holds what the image is pulled with, if the plan has something.
func (l *life) credentials(ctx context.Context, plan policy.Plan, deadline time.Time) (sandbox.Pull, error) {
	request := sandbox.Pull{Image: plan.Image}
	if l.own != nil { // the workflow's choice, with what the workflow has for it
		request.User, request.Password = l.own.Username, l.own.Password
		return request, nil
	}
	if plan.Pull == "" {
		return request, nil
	}
	s := newSteps(l, nil, sandbox.Image{}, plan, deadline)
	if err := s.issue(ctx, policy.PullStep); err != nil {
		return request, err
	}
	for _, lease := range plan.Leases {
		if lease.Name != plan.Pull {
			continue
		}
		held, _ := s.leases.get(lease.Name)
		password, ok := held.Values["password"]
		if !ok {
			return request, fmt.Errorf("lease %s: issuer %s gives no password, which a registry wants", lease.Name, lease.Issuer)
		}
		request.User, request.Password = held.field(lease, "username"), password
	}
	return request, nil
}

// pullDebts names what the pull will acquire.
func (l *life) pullDebts(plan policy.Plan, deadline time.Time) []journal.Debt {
	for _, lease := range plan.Leases {
		if lease.Step == policy.PullStep {
			return leaseDebts(l.log.Job, lease, 0, deadline)
		}
	}
	return nil
}
