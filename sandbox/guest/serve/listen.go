package serve

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

// Patience is how long the agent may take to connect and to finish the box. An
// agent that has died does neither, and then the box must end.
const Patience = time.Minute

// errStranger is a connection from within the box.
var errStranger = errors.New("stream: somebody in the box has connected")

// OnListener hardens the process and serves the one connection that it takes at
// the abstract address wire.Address, which only what is in the network namespace
// of the box can reach: the agent, which enters it. It is for engines that start
// process 1 for us and hand no descriptor on. Nothing else runs in the box
// before the connection is there, and nobody can connect after it: the peer must
// have no process id here, which is so for whoever is outside of the box.
//
// The agent finishes the box when it has connected. Its first byte, which is not
// part of the protocol, says that it has.
func OnListener(o Options) error {
	if err := Harden(); err != nil {
		return err
	}
	fd, err := Accept()
	if err != nil {
		return err
	}
	conn, err := open(fd)
	if err != nil {
		return err
	}
	ready := make([]byte, 1)
	err = conn.SetReadDeadline(time.Now().Add(Patience))
	if err == nil {
		_, err = conn.Read(ready)
	}
	if err == nil {
		err = conn.SetReadDeadline(time.Time{})
	}
	if err != nil {
		return errors.Join(fmt.Errorf("stream: the agent has not finished the box: %w", err), conn.Close())
	}
	return Serve(conn, o)
}

// Accept takes one connection at wire.Address from outside of the box, as
// OnListener says, and returns its descriptor.
func Accept() (int, error) {
	l, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("socket", err)
	}
	fd, err := acceptFrom(l)
	if err := errors.Join(err, unix.Close(l)); err != nil {
		return -1, fmt.Errorf("stream: %w", err)
	}
	return fd, nil
}

func acceptFrom(l int) (int, error) {
	wait := unix.NsecToTimeval(int64(Patience))
	if err := errors.Join(
		unix.SetsockoptTimeval(l, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait), // counts for accept
		unix.Bind(l, &unix.SockaddrUnix{Name: wire.Address}),
		unix.Listen(l, 1)); err != nil {
		return -1, err
	}
	for {
		fd, _, err := unix.Accept4(l, unix.SOCK_CLOEXEC)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return -1, err
		}
		peer, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err == nil && peer.Pid != 0 {
			err = errStranger
		}
		if err != nil {
			return -1, errors.Join(err, unix.Close(fd))
		}
		return fd, nil
	}
}
