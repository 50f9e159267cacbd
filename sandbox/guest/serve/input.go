package serve

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

// null stands for /dev/null among the descriptors of a step.
const null = -1

// streams are the descriptors of a step and our ends of them.
type streams struct {
	child   [3]int   // the step's 0, 1 and 2
	outputs []output // what is read of the step
	input   *os.File // what is written to it; nil if it has /dev/null
}

// An output is what is sent as frames of one type.
type output struct {
	as   wire.Type
	pipe *pipe
}

// openStreams makes what a command asks for. If it fails, nothing is open.
func openStreams(c wire.Command) (*streams, error) {
	if c.Input == wire.Terminal {
		return openTerminal(c.Size)
	}
	s := &streams{child: [3]int{null, null, null}}
	for i, as := range []wire.Type{wire.Stdout, wire.Stderr} {
		p, writer, err := newPipe()
		if err != nil {
			s.closeAll()
			return nil, err
		}
		s.outputs, s.child[1+i] = append(s.outputs, output{as, p}), writer
	}
	if c.Input == wire.Nothing {
		return s, nil
	}
	var fds [2]int
	err := unix.Pipe2(fds[:], unix.O_CLOEXEC)
	if err == nil {
		s.child[0] = fds[0]
		err = unix.SetNonblock(fds[1], true) // so that a write can be given up
	}
	if err != nil {
		s.closeAll()
		return nil, os.NewSyscallError("pipe", err)
	}
	s.input = os.NewFile(uintptr(fds[1]), "input")
	return s, nil
}

// openTerminal makes a terminal (pty(7)) in the box's own /dev/pts. The job may
// have put something else there: then it is no terminal, which shows.
func openTerminal(size wire.Size) (*streams, error) {
	const flags = unix.O_RDWR | unix.O_NOCTTY | unix.O_CLOEXEC
	fd, err := unix.Open("/dev/ptmx", flags|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("terminal: /dev/ptmx: %w", err)
	}
	s := &streams{child: [3]int{null, null, null}}
	s.input = os.NewFile(uintptr(fd), "terminal")
	master := &pipe{file: s.input}
	if master.raw, err = s.input.SyscallConn(); err != nil {
		s.closeAll()
		return nil, err
	}
	s.outputs = []output{{wire.Stdout, master}}
	number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		err = setSize(fd, size)
	}
	if err != nil {
		s.closeAll()
		return nil, fmt.Errorf("terminal: /dev/ptmx: %w", err)
	}
	name := "/dev/pts/" + strconv.Itoa(number)
	slave, err := unix.Open(name, flags, 0)
	if err != nil {
		s.closeAll()
		return nil, fmt.Errorf("terminal: %s: %w", name, err)
	}
	s.child = [3]int{slave, slave, slave}
	return s, nil
}

func setSize(fd int, s wire.Size) error {
	return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: s.Rows, Col: s.Cols})
}

// closeChild closes the step's ends, which it has copies of once it runs.
func (s *streams) closeChild() {
	for i, fd := range s.child {
		if fd != null && (i == 0 || fd != s.child[i-1]) {
			closeFD(fd)
		}
	}
	s.child = [3]int{null, null, null}
}

func (s *streams) closeAll() {
	s.closeChild()
	for _, o := range s.outputs {
		o.pipe.close()
	}
	s.closeInput()
}

// closeInput ends the input of a step. That of a terminal is its output too,
// and is closed with that.
func (s *streams) closeInput() {
	if s.input != nil {
		_ = s.input.Close() // a step that has not read all of it is at liberty not to
	}
}

// feed gives the agent's input to the step. Once the step takes no more it
// throws the rest away, so that nobody waits for it.
func (g *guest) feed(s *step, to *streams) {
	in := &incoming{guest: g, transfer: s.input, step: s}
	_, err := io.CopyBuffer(writer{to.input}, in, make([]byte, scratchSize))
	if s.command.Input == wire.Pipe {
		to.closeInput()
	}
	if err != nil {
		_, _ = io.Copy(io.Discard, in) // to its end, or ours
	}
}

// starve ends the input of a step that has ended.
func (g *guest) starve(s *step, to *streams) {
	g.mu.Lock()
	defer g.mu.Unlock()
	s.input.stop(errCanceled)
	_ = to.input.SetWriteDeadline(time.Now()) // it fails on a closed pipe only
}

// resize tells a terminal, now or when it is made, how large it is. The caller
// holds guest.mu.
func (s *step) resize(size wire.Size) {
	s.command.Size = size
	if s.terminal == nil {
		return
	}
	// A terminal that has been closed has no size.
	_ = s.terminal.Control(func(fd uintptr) { _ = setSize(int(fd), size) })
}

// dispatchInput is dispatch for what a process reads. The caller holds g.mu.
func (g *guest) dispatchInput(t wire.Type, p []byte) error {
	s := g.steps[g.topic.about]
	size, err := wire.ParseResize(p)
	switch {
	case t == wire.Resize && err != nil:
		return fmt.Errorf("%w: resize", ErrProtocol)
	case s == nil:
	case t == wire.Resize && s.command.Input == wire.Terminal:
		s.resize(size)
	case t == wire.Resize || s.input == nil:
		return fmt.Errorf("%w: input that was not announced", ErrProtocol)
	case t == wire.InputEnd:
		s.input.stop(io.EOF)
	case !s.input.inbox.Put(t, p):
		return fmt.Errorf("%w: more input than was granted", ErrProtocol)
	}
	return nil
}
