package serve

import (
	"errors"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

const (
	// outputHeader is what stands before the output in a frame.
	outputHeader = wire.HeaderSize + wire.StampSize

	// maxTails is how many pipes of earlier steps are kept open for processes
	// in the background: closing them would kill a server with its next line
	// of output. A job that leaves more loses the oldest.
	maxTails = 64

	// tailBuffer is enough to throw output away.
	tailBuffer = 4 << 10
)

// A pipe is the reading end of the output of a step.
type pipe struct {
	file *os.File
	raw  syscall.RawConn
}

// newPipe returns the reading end, which can be waited for with a deadline, and
// the writing end, which is an ordinary blocking descriptor for the step.
func newPipe() (p *pipe, writer int, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, 0, os.NewSyscallError("pipe", err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		closeFD(fds[0])
		closeFD(fds[1])
		return nil, 0, os.NewSyscallError("pipe", err)
	}
	p = &pipe{file: os.NewFile(uintptr(fds[0]), "output")}
	if p.raw, err = p.file.SyscallConn(); err != nil {
		p.close()
		closeFD(fds[1])
		return nil, 0, err
	}
	return p, fds[1], nil
}

// drain bounds the time that the end of the output is still waited for.
func (p *pipe) drain() {
	p.setDeadline(time.Now().Add(drainTime))
}

func (p *pipe) setDeadline(t time.Time) {
	// It can only fail on a closed pipe, which is at its end in any case.
	_ = p.file.SetReadDeadline(t)
}

func (p *pipe) close() {
	_ = p.file.Close() // only read from, or closed already
}

// waiting returns how many bytes are in the pipe.
func (p *pipe) waiting() (n int) {
	// A closed pipe holds nothing.
	_ = p.raw.Control(func(fd uintptr) {
		n, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ) // neither does one that cannot be asked
	})
	return n
}

// readNow is a read that does not wait; 0 is nothing there, or the end.
func (p *pipe) readNow(b []byte) (n int) {
	// A closed pipe holds nothing.
	_ = p.raw.Read(func(fd uintptr) bool {
		n, _ = unix.Read(int(fd), b) // EAGAIN and the like: nothing there
		return true
	})
	return max(n, 0)
}

// copy sends the output of a step until its end, calls copied.Done, and then,
// if a process in the background holds the pipe, throws away what comes.
func (g *guest) copy(s *step, t wire.Type, p *pipe, copied *sync.WaitGroup) {
	open := g.copyStep(s, t, p)
	copied.Done()
	if open {
		p.setDeadline(time.Time{})
		b := make([]byte, tailBuffer)
		for {
			if _, err := p.file.Read(b); err != nil {
				break
			}
		}
	}
	g.tails.remove(p)
	p.close()
}

// copyStep sends output until the end of the pipe, or until the step is over
// and what was in the pipe by then has been read. It reports true if the pipe
// is still open.
func (g *guest) copyStep(s *step, t wire.Type, p *pipe) (open bool) {
	b := g.buffer(s, t)
	for {
		n, err := p.file.Read(b[outputHeader:])
		at := time.Now()
		if n > 0 && !g.print(s, t, b[:outputHeader+n], at) {
			return true
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			return false
		}
	}
	// Whatever the step wrote before it ended is among these bytes, even if
	// something in the background writes without end.
	p.setDeadline(time.Time{})
	for left := p.waiting(); left > 0; {
		n := p.readNow(b[outputHeader:min(len(b), outputHeader+left)])
		if n == 0 || !g.print(s, t, b[:outputHeader+n], time.Now()) {
			break
		}
		left -= n
	}
	return true
}

// buffer returns the buffer of stdout or stderr. One step of a number runs at a time.
func (g *guest) buffer(s *step, t wire.Type) []byte {
	b := &g.buffers[s.number][t-wire.Stdout]
	if *b == nil {
		*b = make([]byte, outputHeader+wire.MaxData)
	}
	return *b
}

// print sends b, which has outputHeader bytes of room in front. It waits for
// credit and reports false if the agent has gone.
func (g *guest) print(s *step, t wire.Type, b []byte, at time.Time) bool {
	for !s.credit.Try(len(b)) {
		select {
		case <-s.credit.Wake():
		case <-g.done:
			return false
		}
	}
	wire.PutHeader(b, t, len(b)-wire.HeaderSize)
	wire.PutStamp(b[wire.HeaderSize:], at.UnixNano())
	g.tell(s, b)
	return true
}

// tails are the pipes that are open, oldest first.
type tails struct {
	mu     sync.Mutex
	pipes  []*pipe
	closed bool
}

func (l *tails) add(ps ...*pipe) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pipes = append(l.pipes, ps...)
	if l.closed {
		l.closeAll()
	}
	for len(l.pipes) > maxTails {
		l.pipes[0].close() // ends its copy
		l.pipes = l.pipes[1:]
	}
}

func (l *tails) remove(p *pipe) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, q := range l.pipes {
		if p == q {
			l.pipes = append(l.pipes[:i], l.pipes[i+1:]...)
			return
		}
	}
}

// close ends all copies, those that begin later too.
func (l *tails) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.closeAll()
}

func (l *tails) closeAll() {
	for _, p := range l.pipes {
		p.close()
	}
}

func closeFD(fd int) {
	_ = unix.Close(fd) // the writing end of a pipe, or one never used
}
