package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"github.com/mayfly-ci/mayfly/runner"
	"github.com/mayfly-ci/mayfly/runner/console"
	"github.com/mayfly-ci/mayfly/runner/monitor"
	"github.com/mayfly-ci/mayfly/sandbox"
)

func runAgent(c *call) error {
	o, err := c.flags("agent", 0, nil)
	if err != nil {
		return err
	}
	hangups := make(chan os.Signal, 1) // two that come together are one
	signal.Notify(hangups, syscall.SIGHUP)
	defer signal.Stop(hangups)
	sd := newNotifier()
	w, err := wire(o.config, c.stderr)
	if err != nil {
		return err
	}
	defer w.close()
	if err := w.checkRules(w.agent.Policy); err != nil {
		return exitError{exitUsage, err}
	}
	if err := w.gitCache(); err != nil {
		return err
	}
	record := monitor.NewRecord(w.agent.Audit)
	w.agent.Audit = record
	agent, err := runner.New(w.agent, w.state)
	if err != nil {
		return exitError{exitUsage, err}
	}
	if err := w.serve(agent, record); err != nil {
		return err
	}
	drain, kill, stop := signals(context.Background())
	defer stop()
	if err := w.probe(kill); err != nil {
		return err
	}
	closeShells, err := w.shells(kill, agent)
	if err != nil {
		return err
	}
	defer closeShells()
	w.agent.Log.Info().Str("version", version).Str("installation", w.state.Owner).
		Int64("generation", w.state.Generation).Int("slots", w.agent.Slots).
		Str("policy", w.agent.Policy.Digest()).Msg("agent")
	w.warnOfStatic()
	w.publishLists(kill)
	ctx, end := context.WithCancel(context.Background())
	var attending sync.WaitGroup
	attending.Go(func() { w.attend(ctx, drain, agent, sd, hangups) })
	err = agent.Run(drain, kill)
	end()
	attending.Wait()
	return err
}

// shells serves "mayfly shell" until the function that it returns is called.
func (w *wiring) shells(ctx context.Context, agent *runner.Agent) (func(), error) {
	if w.agent.Keep == 0 {
		return func() {}, nil
	}
	server, err := console.Listen(w.state.Dir, agent.Shell)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var serving sync.WaitGroup
	serving.Go(func() {
		if err := server.Serve(ctx); err != nil {
			w.agent.Log.Error().Err(err).Msg("shell")
		}
	})
	return func() { cancel(); serving.Wait() }, nil
}

// probe makes boxes of each runtime before the first job does: a machine that
// cannot hold a box, or whose boxes reach something, takes no jobs, and the first
// job finds the base ready.
func (w *wiring) probe(ctx context.Context) error {
	for name, runtime := range w.agent.Runtimes {
		if err := dropChecks(ctx, runtime); err != nil {
			return fmt.Errorf("runtime %s: %w", name, err)
		}
		claims, err := runtime.Check(ctx)
		if err != nil {
			return fmt.Errorf("runtime %s: %w", name, err)
		}
		if _, err := w.look(ctx, runtime); err != nil {
			return fmt.Errorf("runtime %s: %w", name, err)
		}
		for _, c := range claims {
			if !c.Enforced {
				w.agent.Log.Warn().Str("runtime", name).Str("claim", c.Name).Str("detail", c.Detail).Msg("not enforced here")
			}
		}
	}
	return nil
}

// dropChecks destroys the probe of an agent that was killed while it started.
// Later the reaper leaves such boxes alone until they expire, because they are
// a doctor's.
func dropChecks(ctx context.Context, runtime sandbox.Runtime) error {
	boxes, err := runtime.List(ctx)
	if err != nil {
		return err
	}
	for _, b := range boxes {
		if strings.HasPrefix(b.Name, sandbox.CheckPrefix) {
			if err := runtime.Destroy(ctx, b.Name); err != nil {
				return err
			}
		}
	}
	return nil
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
