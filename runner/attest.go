package runner

import (
	"context"
	"errors"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/wall"
)

// attestTime bounds the look at a box whose job is over: it may be starved.
const attestTime = 15 * time.Second

// A look is one at the box that a gateway is of.
type look struct {
	*wall.Look
	gateway string
}

// attest looks from inside a box whether anything leaves it, and writes down
// what was seen. Any surprise ends the job before its first own command.
func (l *life) attest(ctx context.Context, name, gateway string, box sandbox.Sandbox, s sandbox.Sockets, when string) error {
	look := &look{wall.NewLook(), gateway}
	l.look.Store(look)
	seen, err := look.Run(ctx, box, wall.Options{
		Canary: l.cfg.Canary, Served: true,
		Logged: s.Log != nil && when == attestBefore, // a job may flood the log
	})
	return errors.Join(err, l.audit(ctx, l.log.Job, "box.attest", name, err, "when", when, "seen", seen))
}

// When a box is looked at: before the job's first command, and after its last.
const (
	attestBefore = "before"
	attestAfter  = "after"
)

// attestEnd looks again, while everything that the job left behind still runs.
// A box that cannot be looked at any more is no surprise: it is destroyed next.
func (l *life) attestEnd(alive context.Context, box sandbox.Sandbox, s sandbox.Sockets) error {
	ctx, cancel := context.WithTimeout(alive, attestTime)
	defer cancel()
	err := l.attest(ctx, l.box(), gatewayName(l.log.Job), box, s, attestAfter)
	if errors.Is(err, sandbox.ErrDied) || ctx.Err() != nil && !errors.Is(err, wall.ErrBreached) {
		return nil
	}
	return err
}
