package native

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox"
	"github.com/mayfly-ci/mayfly/sandbox/native/boxinit"
)

// sockets are the agent's ends of the two pairs that a guest is born with.
type sockets struct {
	setup   *net.UnixConn // one packet each way
	control *net.UnixConn // the guest protocol
}

// socketPairs makes both pairs. The guest's ends are in the order of its
// descriptors.
func socketPairs() (*sockets, []*os.File, error) {
	setup, guestSetup, err := socketPair(unix.SOCK_SEQPACKET)
	if err != nil {
		return nil, nil, err
	}
	control, guestControl, err := socketPair(unix.SOCK_STREAM)
	if err != nil {
		return nil, nil, errors.Join(err, setup.Close(), guestSetup.Close())
	}
	return &sockets{setup, control}, []*os.File{guestControl, guestSetup}, nil
}

func socketPair(kind int) (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socket pair: %w", err)
	}
	near, far := os.NewFile(uintptr(fds[0]), "agent"), os.NewFile(uintptr(fds[1]), "guest")
	conn, err := net.FileConn(near)
	if err := errors.Join(err, near.Close()); err != nil { // conn is a copy
		return nil, nil, errors.Join(fmt.Errorf("socket pair: %w", err), far.Close())
	}
	return conn.(*net.UnixConn), far, nil
}

func (s *sockets) close() error {
	if s == nil {
		return nil // no guest was started
	}
	return errors.Join(s.setup.Close(), s.control.Close())
}

// send gives the guest its Setup and the mounts.
func (s *sockets) send(message []byte, fds []int) error {
	if len(message) > boxinit.MaxMessage {
		return fmt.Errorf("setup of %d bytes: at most %d", len(message), boxinit.MaxMessage)
	}
	if _, _, err := s.setup.WriteMsgUnix(message, unix.UnixRights(fds...), nil); err != nil {
		return fmt.Errorf("setup: %w: %w", err, sandbox.ErrDied)
	}
	return nil
}

// receive waits for the guest's answer: the sockets of its network, or why
// there is no box.
func (s *sockets) receive(ctx context.Context) (sandbox.Sockets, error) {
	stop := context.AfterFunc(ctx, func() {
		_ = s.setup.SetReadDeadline(time.Unix(1, 0)) // fails on a closed socket only
	})
	defer stop()
	message := make([]byte, boxinit.MaxMessage)
	oob := make([]byte, unix.CmsgSpace(3*4))
	n, oobn, _, _, err := s.setup.ReadMsgUnix(message, oob)
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return sandbox.Sockets{}, fmt.Errorf("guest: %w", err)
	}
	files, err := rights(oob[:oobn])
	switch {
	case err != nil:
	case n == 0:
		err = fmt.Errorf("guest: ended during its setup: %w", sandbox.ErrDied)
	case n > 1:
		err = fmt.Errorf("guest: %s", message[1:n])
	case len(files) != 3:
		err = fmt.Errorf("guest: %d sockets of its network instead of 3", len(files))
	default:
		return sandbox.Sockets{TCP: files[0], DNS: files[1], Log: files[2]}, nil
	}
	return sandbox.Sockets{}, errors.Join(err, closeAll(files))
}

// rights are the descriptors that came with a message.
func rights(oob []byte) ([]*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("guest: descriptors: %w", err)
	}
	var files []*os.File
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return files, fmt.Errorf("guest: descriptors: %w", err)
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "box"))
		}
	}
	return files, nil
}
