package serve

import (
	"errors"
	"io"
	"os"
	"syscall"
)

// OnDescriptor hardens the process and serves on an inherited stream, a socket
// for instance.
func OnDescriptor(fd int, o Options) error {
	if err := Harden(); err != nil {
		return err
	}
	conn, err := open(fd)
	if err != nil {
		return err
	}
	return Serve(conn, o)
}

// OnStdio hardens the process and serves on descriptors 0 and 1, as an engine
// gives them to process 1 of a container.
func OnStdio(o Options) error {
	if err := Harden(); err != nil {
		return err
	}
	conn, err := stdio()
	if err != nil {
		return err
	}
	return Serve(conn, o)
}

// open makes a stream of a descriptor. Not blocking, so that closing it ends a
// read that is under way.
func open(fd int) (*os.File, error) {
	if err := syscall.SetNonblock(fd, true); err != nil {
		return nil, os.NewSyscallError("stream", err)
	}
	return os.NewFile(uintptr(fd), "stream"), nil
}

// A pair is a stream with a descriptor for each direction.
type pair struct{ in, out *os.File }

func (p pair) Read(b []byte) (int, error)  { return p.in.Read(b) }
func (p pair) Write(b []byte) (int, error) { return p.out.Write(b) }
func (p pair) Close() error                { return errors.Join(p.in.Close(), p.out.Close()) }

// stdio takes descriptors 0 and 1 as the stream.
func stdio() (io.ReadWriteCloser, error) {
	in, err := move(0)
	if err != nil {
		return nil, err
	}
	out, err := move(1)
	if err != nil {
		return nil, err
	}
	return pair{in, out}, nil
}

// move takes a descriptor away from its number and leaves /dev/null there, so
// that nothing that is printed gets into the stream.
func move(fd int) (*os.File, error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	moved, err := syscall.Dup(fd)
	if err != nil {
		return nil, os.NewSyscallError("stream", err)
	}
	syscall.CloseOnExec(moved)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	if err := syscall.Dup3(int(null.Fd()), fd, 0); err != nil {
		return nil, os.NewSyscallError("stream", err)
	}
	if err := null.Close(); err != nil {
		return nil, err
	}
	return open(moved)
}
