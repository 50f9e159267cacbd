package main

import (
	"context"
	"crypto/rand"
	"errors"
	"strings"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/wall"
)

// lookTime bounds the destruction of the box that was looked at.
const lookTime = 10 * time.Second

// look makes a box of a runtime with a gateway that allows nothing, tries from
// inside to reach something, and destroys it. It returns what was refused.
func (w *wiring) look(ctx context.Context, r sandbox.Runtime) (seen string, err error) {
	name := sandbox.CheckPrefix + strings.ToLower(rand.Text())
	look := wall.NewLook()
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lookTime)
		defer cancel()
		err = errors.Join(err, r.Destroy(ctx, name), w.agent.Gateway.Close(ctx, name))
	}()
	ledger := func(l egress.Line) error { look.Line(l); return nil }
	if err := w.agent.Gateway.Open(ctx, name, egress.Opening{Ledger: ledger}); err != nil {
		return "", err
	}
	box, err := r.Create(ctx, name, sandbox.Spec{
		Labels: sandbox.Labels{Owner: w.state.Owner}, Expires: time.Now().Add(time.Minute),
	})
	if err != nil {
		return "", err
	}
	sockets, err := box.Attach(ctx)
	if err == nil {
		err = w.agent.Gateway.Attach(ctx, name, egress.Sockets(sockets))
	}
	if err != nil {
		return "", err
	}
	return look.Run(ctx, box, wall.Options{Canary: w.agent.Canary, Served: true, Logged: sockets.Log != nil})
}
