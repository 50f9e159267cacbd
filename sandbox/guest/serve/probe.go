package serve

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/guest/wire"
)

// probe tries what the agent asks for, one after the other: what process 1 may
// do with sockets is what a step may, whose rights are the same.
func (g *guest) probe(wait time.Duration, attempts []wire.Attempt) {
	until := time.Now().Add(wait)
	outcomes := make([]wire.Outcome, len(attempts))
	for i, a := range attempts {
		var errno unix.Errno
		reply, err := try(a, until)
		if err != nil && !errors.As(err, &errno) {
			errno = unix.EIO
		}
		outcomes[i] = wire.Outcome{Errno: uint16(errno), Reply: reply}
	}
	g.mu.Lock()
	g.probing = false // before the agent can know
	g.mu.Unlock()
	g.say(wire.AppendProbed(nil, outcomes))
}

func try(a wire.Attempt, until time.Time) (reply string, err error) {
	fd, err := unix.Socket(int(a.Domain), int(a.Type)|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(a.Protocol))
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	var to unix.Sockaddr
	switch len(a.To) {
	case 4:
		to = &unix.SockaddrInet4{Port: int(a.Port), Addr: [4]byte([]byte(a.To))}
	case 16:
		to = &unix.SockaddrInet6{Port: int(a.Port), Addr: [16]byte([]byte(a.To))}
	default:
		return "", nil
	}
	if err := unix.Connect(fd, to); errors.Is(err, unix.EINPROGRESS) {
		if err := await(fd, unix.POLLOUT, until); err != nil {
			return "", err
		}
		if n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR); err != nil || n != 0 {
			return "", errors.Join(err, unix.Errno(n))
		}
	} else if err != nil {
		return "", err
	}
	if a.Text == "" {
		return "", nil
	}
	if _, err := unix.Write(fd, []byte(a.Text)); err != nil || a.Type != unix.SOCK_DGRAM {
		return "", err
	}
	if err := await(fd, unix.POLLIN, until); err != nil {
		return "", err
	}
	b := make([]byte, wire.MaxText)
	n, err := unix.Read(fd, b)
	return string(b[:max(n, 0)]), err
}

// await waits until the socket is ready, or has an error to tell.
func await(fd int, event int16, until time.Time) error {
	for {
		left := time.Until(until)
		if left <= 0 {
			return unix.ETIMEDOUT
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: event}}, int(left/time.Millisecond)+1)
		if n > 0 || err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
