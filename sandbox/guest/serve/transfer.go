package serve

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

// leastRead is the least that is read of a file at once.
const leastRead = 512

// errCanceled is the end of a transfer that the agent has given up.
var errCanceled = errors.New("canceled")

// A refusal is a request that breaks a rule of the contract.
type refusal string

func (r refusal) Error() string { return string(r) }

// A transfer is a Put or a Get under way, or the input of a step.
type transfer struct {
	inbox   *wire.Inbox   // of a Put or an input
	err     error         // why stopped is closed: io.EOF after a PutEnd or InputEnd
	stopped chan struct{} // no more will come
}

func newTransfer() *transfer {
	return &transfer{inbox: wire.NewInbox(), stopped: make(chan struct{})}
}

// stop ends what comes in. The first reason stays: behind a PutEnd there is
// nothing to cancel any more. The caller holds guest.mu.
func (x *transfer) stop(reason error) {
	if x.err == nil {
		x.err = reason
		close(x.stopped)
	}
}

// finish makes room for the next transfer and sends the result of this one, as
// the last of the frames in b.
func (g *guest) finish(b []byte, err error) {
	g.mu.Lock()
	g.transfer = nil // before the agent can know
	g.mu.Unlock()
	code, message := codeOf(err)
	g.say(wire.AppendResult(b, code, message))
}

// codeOf says in the words of the protocol what became of a transfer. An error
// of the system has an error number; the only others are refusals, ours and
// those of os.Root.
func codeOf(err error) (c wire.Code, message string) {
	var errno syscall.Errno
	switch {
	case err == nil:
		return wire.OK, ""
	case errors.Is(err, errCanceled):
		return wire.Canceled, err.Error()
	case errors.Is(err, fs.ErrNotExist):
		return wire.NotExist, err.Error()
	case errors.As(err, &errno):
		return wire.Failed, err.Error()
	}
	return wire.Refused, err.Error()
}

// get sends a file.
func (g *guest) get(x *transfer, name string, most uint64) {
	f, size, err := openRegular(g.files.root, name)
	if err != nil {
		g.finish(nil, err)
		return
	}
	defer closeFD(int(f))
	if size > most {
		g.finish(nil, refusal("file is larger than asked for"))
		return
	}
	// One byte more than the file has, so that its end shows in one read; and
	// not too few for a file that does not know its size, as those of /proc.
	b := make([]byte, wire.HeaderSize+int(min(max(size+1, leastRead), wire.MaxData)))
	for sent := uint64(0); ; {
		select {
		case <-x.stopped:
			g.finish(nil, errCanceled)
			return
		default:
		}
		n, err := io.ReadFull(f, b[wire.HeaderSize:])
		sent += uint64(n)
		last := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		switch {
		case err != nil && !last:
			g.finish(nil, err)
			return
		case sent > most:
			g.finish(nil, refusal("file is larger than asked for"))
			return
		}
		wire.PutHeader(b, wire.FileData, n)
		if last {
			g.finish(b[:wire.HeaderSize+n], nil)
			return
		}
		g.say(b)
	}
}

// A descriptor is an open regular file: it needs no poller, and asking for one
// would cost more than reading a small file does.
type descriptor int

func (d descriptor) Read(b []byte) (int, error) {
	for {
		n, err := unix.Read(int(d), b)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return 0, os.NewSyscallError("read", err)
		case n == 0:
			return 0, io.EOF
		}
		return n, nil
	}
}

// openRegular opens a regular file and follows no link on the way. Nothing else
// is opened, not even for a moment: opening a device may act, opening a FIFO
// may block.
func openRegular(root, name string) (d descriptor, size uint64, err error) {
	const through = unix.O_PATH | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, 0, &fs.PathError{Op: "open", Path: root, Err: err}
	}
	defer func() { closeFD(dir) }()
	rest := path.Clean(strings.TrimPrefix(path.Clean(name), "/"))
	for {
		part, tail, more := strings.Cut(rest, "/")
		if !more {
			break
		}
		next, err := unix.Openat(dir, part, through, 0)
		if err != nil {
			return 0, 0, why(dir, part, name, err)
		}
		closeFD(dir)
		dir, rest = next, tail
	}
	var info unix.Stat_t
	if err := unix.Fstatat(dir, rest, &info, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return 0, 0, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	if info.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0, 0, refusal("not a regular file")
	}
	fd, err := unix.Openat(dir, rest, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, 0, why(dir, rest, name, err)
	}
	// It may have been exchanged since the first look.
	if err := unix.Fstat(fd, &info); err != nil || info.Mode&unix.S_IFMT != unix.S_IFREG {
		closeFD(fd)
		return 0, 0, errors.Join(err, refusal("not a regular file"))
	}
	return descriptor(fd), uint64(info.Size), nil // the size of a regular file is not negative
}

// why turns the error of opening one part of a path into a refusal if that part
// is a link.
func why(dir int, part, name string, err error) error {
	var info unix.Stat_t
	statErr := unix.Fstatat(dir, part, &info, unix.AT_SYMLINK_NOFOLLOW)
	if statErr == nil && info.Mode&unix.S_IFMT == unix.S_IFLNK {
		return refusal(part + " is a link")
	}
	return &fs.PathError{Op: "open", Path: name, Err: err}
}
