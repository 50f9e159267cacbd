package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/mayfly-ci/mayfly/runner"
)

func runAgent(c *call) error {
	o, err := c.flags("agent", nil)
	if err != nil {
		return err
	}
	w, err := wire(o.config, c.stderr)
	if err != nil {
		return err
	}
	defer w.close()
	agent, err := runner.New(w.agent, w.state)
	if err != nil {
		return exitError{exitUsage, err}
	}
	drain, kill, stop := signals(context.Background())
	defer stop()
	w.agent.Log.Info().Str("version", version).Str("installation", w.state.Owner).
		Int64("generation", w.state.Generation).Int("slots", w.agent.Slots).
		Str("policy", w.agent.Policy.Digest()).Msg("agent")
	return agent.Run(drain, kill)
}

// signals returns a context that ends with the first SIGTERM or SIGINT, and one
// that ends with the second. Call stop when the work is done.
func signals(parent context.Context) (drain, kill context.Context, stop func()) {
	drain, endDrain := context.WithCancel(parent)
	kill, endKill := context.WithCancelCause(parent)
	ch := make(chan os.Signal, 2)
	signal.Notify(ch, syscall.SIGTERM, syscall.SIGINT)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for _, end := range []func(){endDrain, func() { endKill(runner.ErrStopping) }} {
			if _, ok := <-ch; !ok {
				return
			}
			end()
		}
	}()
	return drain, kill, func() {
		signal.Stop(ch)
		close(ch)
		<-done
		endDrain()
		endKill(nil)
	}
}
