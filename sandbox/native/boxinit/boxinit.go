// Package boxinit makes a box from inside its fresh namespaces and then becomes
// its guest. It is linked into the guest binary and is the only code of the
// native runtime that runs with the capabilities of the box's own user
// namespace.
//
// The agent starts the guest program with a setup socket and a control stream.
// [Run] makes the network, waits for the [Setup], builds the file system, gives
// up every privilege that a step must not have, answers with the sockets of the
// network, and executes the guest program anew to serve the control stream. So
// the guest proper, and all that it starts, begins with what is left: nothing
// depends on each of its threads having given something up. With gVisor it does
// not execute the guest but runsc, as a child, and waits (see keeper).
package boxinit

import (
	"errors"
	"fmt"
	"math"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/gvisor/keeper"
	"github.com/mayfly-ci/mayfly/sandbox/netns"
)

// Host is the host name of every box. A warm box has no job yet, so the name
// says nothing about one.
const Host = "mayfly"

// Run makes the box and executes the guest in it. It returns only if that went
// wrong, which it has told the agent if it could.
func Run() error {
	// Capabilities and filters belong to a thread, and this one is to execute.
	runtime.LockOSThread()
	if err := unix.CloseRange(LifeFD+1, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return fmt.Errorf("close-on-exec: %w", err)
	}
	s, err := prepare()
	if err != nil {
		return err
	}
	if s.GVisor() {
		return keeper.Kernel{
			Control: ControlFD, Life: SetupFD, Guest: GuestFD, Runsc: RunscFD,
			Platform: s.Platform, Host: Host, Expires: s.Expires,
		}.Keep()
	}
	args := []string{"mayfly-guest", "serve"}
	if s.Expires != 0 {
		args = append(args, strconv.FormatUint(s.Expires, 10))
	}
	return fmt.Errorf("execute the guest: %w", unix.Exec("/proc/self/exe", args, nil))
}

// prepare does everything that comes before the guest, and answers: a byte and
// the sockets, or a byte and what went wrong.
func prepare() (s *Setup, err error) {
	var sockets netns.FDs
	ready := make(chan error, 1)
	go func() { // beside the file system: both wait for the kernel
		var err error
		sockets, err = network()
		ready <- err
	}()
	s, err = build()
	if err = errors.Join(<-ready, err); err == nil {
		err = confine(s)
	}
	answer := []byte{0} // never empty: an empty packet looks like the end of the stream
	var rights []byte
	if err != nil {
		answer = append(answer, err.Error()...)
	} else {
		rights = unix.UnixRights(sockets.TCP, sockets.DNS, sockets.Log)
	}
	err = errors.Join(err, unix.Sendmsg(SetupFD, answer, rights, nil, unix.MSG_NOSIGNAL), sockets.Close())
	if err != nil || !s.GVisor() { // a keeper sees by it that the agent lives
		err = errors.Join(err, unix.Close(SetupFD))
	}
	return s, err
}

func network() (netns.FDs, error) {
	if err := netns.Setup(); err != nil {
		return netns.FDs{TCP: -1, DNS: -1, Log: -1}, fmt.Errorf("box network: %w", err)
	}
	fds, err := netns.Open()
	if err != nil {
		return fds, fmt.Errorf("box network: %w", err)
	}
	return fds, nil
}

func build() (*Setup, error) {
	s, fds, err := receive()
	if err != nil {
		return nil, err
	}
	if err := (&builder{Setup: s, fds: fds}).filesystem(); err != nil {
		return nil, err
	}
	return s, nil
}

// receive waits for the Setup and its descriptors.
func receive() (*Setup, []int, error) {
	b := make([]byte, MaxMessage)
	oob := make([]byte, unix.CmsgSpace(4*(Dirs+Mounts+MaxImage+1)))
	n, oobn, _, _, err := unix.Recvmsg(SetupFD, b, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, nil, fmt.Errorf("setup socket: %w", err)
	}
	if n == 0 {
		return nil, nil, errors.New("setup socket: the agent is gone")
	}
	s, err := Decode(b[:n])
	if err != nil {
		return nil, nil, err
	}
	var fds []int
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, nil, fmt.Errorf("setup socket: %w", err)
	}
	for i := range messages {
		got, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return nil, nil, fmt.Errorf("setup socket: %w", err)
		}
		fds = append(fds, got...)
	}
	return s, fds, nil
}
