package serve

import (
	"errors"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

// drainTime is how long after the end of a step's own process its output is
// still awaited if something in the background holds the pipe: enough for a
// `> >(tee log)` to finish, and paid only by steps that leave such a process.
// What the process itself had written is always read.
const drainTime = 250 * time.Millisecond

// A step is the process that the agent has started, from Start to Exit.
type step struct {
	command wire.Command
	credit  *wire.Credit       // for output
	stop    chan time.Duration // told at most once: the grace
}

func newStep(c wire.Command) *step {
	return &step{command: c, credit: wire.NewCredit(), stop: make(chan time.Duration, 1)}
}

// stopAfter asks for the end of the step. Only the first request counts.
func (s *step) stopAfter(grace time.Duration) {
	select {
	case s.stop <- grace:
	default:
	}
}

// run runs a step to its end and reports it.
func (g *guest) run(s *step) {
	status := g.execute(s)
	g.mu.Lock()
	g.step = nil // before the agent can know
	g.mu.Unlock()
	if status.Signaled() {
		g.say(wire.AppendExit(nil, 0, byte(status.Signal())))
	} else {
		g.say(wire.AppendExit(nil, byte(status.ExitStatus()), 0))
	}
}

// execute starts the process, copies its output and waits for both.
func (g *guest) execute(s *step) unix.WaitStatus {
	stdout, outWriter, err := newPipe()
	if err != nil {
		return g.explain(s, err)
	}
	stderr, errWriter, err := newPipe()
	if err != nil {
		stdout.close()
		closeFD(outWriter)
		return g.explain(s, err)
	}
	pid, exited, err := g.children.begin(func() (int, error) {
		return g.start(s.command, outWriter, errWriter)
	})
	closeFD(outWriter)
	closeFD(errWriter)
	if err != nil {
		stdout.close()
		stderr.close()
		return g.explain(s, err)
	}
	g.tails.add(stdout, stderr)
	var copied sync.WaitGroup
	copied.Add(2)
	g.tasks.Go(func() { g.copy(s, wire.Stdout, stdout, &copied) })
	g.tasks.Go(func() { g.copy(s, wire.Stderr, stderr, &copied) })
	status := g.supervise(s, pid, exited)
	stdout.drain()
	stderr.drain()
	copied.Wait()
	return status
}

// explain tells on stderr why the command could not be started.
func (g *guest) explain(s *step, err error) unix.WaitStatus {
	status := byte(statusCannot)
	var start *startError
	if errors.As(err, &start) {
		status = start.status
	}
	text := []byte("mayfly: " + err.Error() + "\n")
	text = text[:min(len(text), wire.MaxData)]
	b := make([]byte, outputHeader, outputHeader+len(text))
	g.print(s, wire.Stderr, append(b, text...), time.Now())
	return unix.WaitStatus(status) << 8 // wait(2): the status is the second byte
}

// supervise waits for the process, and stops it when the agent says so or has
// gone: an interrupt, a request to terminate, and a kill, as far as needed.
func (g *guest) supervise(s *step, pid int, exited <-chan unix.WaitStatus) unix.WaitStatus {
	family := newFamily(pid, g.children)
	escalation := []func(){
		func() { family.signal(unix.SIGINT) },
		func() { family.signal(unix.SIGTERM) },
		family.kill,
	}
	var grace time.Duration
	var alarm <-chan time.Time
	stop, stopped := s.stop, false
	for {
		select {
		case status := <-exited:
			if stopped {
				family.kill() // what the process left behind when it was told to stop
			}
			return status
		case grace = <-stop:
			stop, stopped = nil, true
		case <-alarm:
		case <-g.done:
			family.kill()
			return 0 // nobody is left to hear it
		}
		escalation[0]()
		if escalation = escalation[1:]; len(escalation) > 0 {
			alarm = time.After(grace)
		} else {
			alarm = nil
		}
	}
}
