package keeper

import (
	"errors"
	"fmt"
	"math"
	"time"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/guest/serve"
)

// linger is how long the agent may take to look why a kernel has ended: it has to
// be scheduled, and to read a file.
const linger = 10 * time.Second

// Handed is how many descriptors come with the agent's word: the runsc program,
// what is Life of a Kernel, and where it is said why there is no box.
const Handed = 3

// OnListener is a keeper in a container, whose yard the agent makes from outside. It
// takes the stream as a guest does (serve.Accept). The agent's word, which comes
// when the yard is its root, is the platform, and brings Handed descriptors.
func OnListener(host string, expires uint64) error {
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("close-on-exec: %w", err)
	}
	control, err := serve.Accept()
	if err != nil {
		return err
	}
	platform, fds, err := word(control)
	if err != nil {
		return fmt.Errorf("keeper: the agent has not finished the box: %w", err)
	}
	if err := errors.Join(unix.Dup3(fds[2], 2, 0), unix.Close(fds[2])); err != nil {
		return fmt.Errorf("keeper: complaint: %w", err)
	}
	guest, err := unix.Open("/proc/self/exe", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("keeper: guest program: %w", err)
	}
	return Kernel{
		Control: control, Runsc: fds[0], Life: fds[1], Guest: guest,
		Platform: platform, Host: host, Expires: expires, Linger: linger,
	}.Keep()
}

// word waits for it.
func word(control int) (platform string, fds []int, err error) {
	wait := unix.NsecToTimeval(int64(serve.Patience))
	if err := unix.SetsockoptTimeval(control, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return "", nil, err
	}
	b, oob := make([]byte, 64), make([]byte, unix.CmsgSpace(4*Handed))
	n, oobn, err := 0, 0, error(unix.EINTR)
	for errors.Is(err, unix.EINTR) {
		n, oobn, _, _, err = unix.Recvmsg(control, b, oob, unix.MSG_CMSG_CLOEXEC)
	}
	if err != nil {
		return "", nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err == nil && len(messages) == 1 {
		fds, err = unix.ParseUnixRights(&messages[0])
	}
	if err == nil && (n == 0 || len(fds) != Handed) {
		err = fmt.Errorf("got %d bytes and %d descriptors", n, len(fds))
	}
	return string(b[:n]), fds, errors.Join(err, unix.SetsockoptTimeval(control, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{}))
}
