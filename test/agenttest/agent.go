package agenttest

import (
	"bytes"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// An Agent is one life of "mayfly agent".
type Agent struct {
	process *os.Process
	log     output
	ended   chan struct{} // closed when it is dead
	code    int           // its exit status; -1 if a signal ended it
}

// output is what a process has written so far.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// Launch starts the agent and returns at once. It dies with tb at the latest.
func (w *World) Launch(tb testing.TB) *Agent {
	tb.Helper()
	a := &Agent{ended: make(chan struct{})}
	cmd := exec.Command(w.Program, "agent", "--config", w.Config())
	cmd.Stdout, cmd.Stderr = &a.log, &a.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go func() { // Kill waits for it
		runtime.LockOSThread() // the death signal is bound to the thread
		defer runtime.UnlockOSThread()
		defer close(a.ended)
		err := cmd.Start()
		a.process = cmd.Process
		started <- err
		if err == nil {
			_ = cmd.Wait() // its status says it
			a.code = cmd.ProcessState.ExitCode()
		}
	}()
	Must(tb, <-started)
	tb.Cleanup(func() {
		a.Kill()
		if tb.Failed() {
			tb.Logf("the agent said:\n%s", tail(a.Log()))
		}
	})
	return a
}

func tail(s string) string { return s[max(0, len(s)-6000):] }

// Start is Launch, and waits until the agent takes jobs.
func (w *World) Start(tb testing.TB) *Agent {
	tb.Helper()
	a := w.Launch(tb)
	Eventually(tb, 2*time.Minute, "the agent takes jobs", func() bool {
		return a.Over() || strings.Contains(a.Log(), `"message":"agent"`)
	})
	if a.Over() {
		tb.Fatalf("the agent ended with status %d at its start:\n%s", a.code, a.Log())
	}
	return a
}

// Log is what the agent has told its operator.
func (a *Agent) Log() string { return a.log.String() }

// Pid is the agent's.
func (a *Agent) Pid() int { return a.process.Pid }

// Over reports whether the agent is dead.
func (a *Agent) Over() bool {
	select {
	case <-a.ended:
		return true
	default:
		return false
	}
}

// Kill kills the agent and waits until it is dead.
func (a *Agent) Kill() {
	_ = a.process.Kill() // dead already
	<-a.ended
}

// Signal sends a signal to the agent.
func (a *Agent) Signal(tb testing.TB, s syscall.Signal) {
	tb.Helper()
	Must(tb, a.process.Signal(s))
}

// Wait waits for the end of the agent and returns its exit status.
func (a *Agent) Wait(tb testing.TB, most time.Duration) int {
	tb.Helper()
	select {
	case <-a.ended:
		return a.code
	case <-time.After(most):
		tb.Fatalf("the agent did not end within %v", most)
		return -1
	}
}

// Stop ends the agent by the first SIGTERM, which must leave nothing owed.
func (a *Agent) Stop(tb testing.TB) {
	tb.Helper()
	a.Signal(tb, syscall.SIGTERM)
	if code := a.Wait(tb, time.Minute); code != 0 {
		tb.Errorf("the agent ended with status %d, want 0:\n%s", code, tail(a.Log()))
	}
}
