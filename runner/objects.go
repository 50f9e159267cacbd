package runner

import (
	"context"
	"fmt"

	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/runner/gitcache"
	"github.com/mayfly-ci/mayfly/sandbox"
)

// A GitCache has git objects that boxes read instead of fetching them
// (gitcache.Cache). done is called when no box reads the directory any more.
type GitCache interface {
	Prepare(ctx context.Context, w gitcache.Want) (dir string, done func(), err error)
}

// objects finds the git objects that this agent has of the job's repository, in
// the job's tier of trust. A job does without them if there are none, and the
// operator's log says why.
func (l *life) objects(ctx context.Context) error {
	sourcer, ok := l.provider.(providers.Sourcer)
	if l.cfg.Git == nil || !ok {
		return nil
	}
	s := l.job.Subject
	source, err := sourcer.Source(l.job)
	var dir string
	if err == nil {
		dir, l.letGo, err = l.cfg.Git.Prepare(ctx, gitcache.Want{
			Provider: l.turn.provider, Repository: s.Repository, Tier: string(l.job.Trust), Ref: s.Ref, SHA: s.SHA,
			URL: source.URL, User: source.User, Token: source.Token, RootCA: source.RootCA,
		})
	}
	if err != nil {
		l.letGo = nil
		l.cfg.Log.Info().Err(err).Str("job", l.log.Job).Str("repository", s.Repository).Msg("the job has no git cache")
		return nil
	}
	if err := l.audit(ctx, l.log.Job, "git.cache", s.Repository, nil, "provider", l.turn.provider, "tier", string(l.job.Trust)); err != nil {
		return fmt.Errorf("git cache: %w", err)
	}
	l.mounts = []sandbox.Mount{{Source: dir, Target: gitcache.Target}}
	return nil
}

// unmounted lets go of what the box of the job read.
func (l *life) unmounted() {
	if l.letGo != nil {
		l.letGo()
	}
}
