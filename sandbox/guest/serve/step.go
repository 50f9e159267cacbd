package serve

import (
	"errors"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

// drainTime is how long after the end of a step's own process its output is
// still awaited if something in the background holds the pipe: enough for a
// `> >(tee log)` to finish, and paid only by steps that leave such a process.
// What the process itself had written is always read.
const drainTime = 250 * time.Millisecond

// A step is a process that the agent has started, from Start to Exit.
type step struct {
	number  int // 0, or 1 for one beside another
	command wire.Command
	credit  *wire.Credit       // for output
	input   *transfer          // nil if it reads /dev/null
	stop    chan time.Duration // told at most once: the grace

	terminal syscall.RawConn // nil if it has none, or not yet; guest.mu guards it
}

func newStep(number int, c wire.Command) *step {
	s := &step{number: number, command: c, credit: wire.NewCredit(), stop: make(chan time.Duration, 1)}
	if c.Input != wire.Nothing {
		s.input = newTransfer()
	}
	return s
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
	g.steps[s.number] = nil // before the agent can know
	g.mu.Unlock()
	if status.Signaled() {
		g.tell(s, wire.AppendExit(nil, 0, byte(status.Signal())))
	} else {
		g.tell(s, wire.AppendExit(nil, byte(status.ExitStatus()), 0))
	}
}

// execute starts the process, copies its input and output and waits for all.
func (g *guest) execute(s *step) unix.WaitStatus {
	if s.command.Alone && !g.clear() {
		g.end(errSurvivors)
		return 0 // nobody is left to hear it
	}
	ends, err := g.connect(s)
	if err != nil {
		return g.explain(s, err)
	}
	pid, exited, err := g.children.begin(func() (int, error) { return g.start(s.command, ends.child) })
	if err != nil {
		ends.closeAll()
		return g.explain(s, err)
	}
	ends.closeChild()
	var fed, copied sync.WaitGroup
	for _, o := range ends.outputs {
		g.tails.add(o.pipe)
		copied.Add(1)
		g.tasks.Go(func() { g.copy(s, o.as, o.pipe, &copied) })
	}
	if s.input != nil {
		fed.Go(func() { g.feed(s, ends) })
	}
	status := g.supervise(s, pid, exited)
	if s.input != nil {
		g.starve(s, ends)
		fed.Wait() // no grant may follow the exit
	}
	for _, o := range ends.outputs {
		o.pipe.drain()
	}
	copied.Wait()
	return status
}

// connect opens the streams of a step. A size that has come since its Start
// counts.
func (g *guest) connect(s *step) (*streams, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	ends, err := openStreams(s.command)
	if err == nil && s.command.Input == wire.Terminal {
		s.terminal = ends.outputs[0].pipe.raw
	}
	return ends, err
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
