package netns

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// replyTimeout bounds the wait for the kernel's answer, which is otherwise
// given before sendto returns.
const replyTimeout = 5

// fail names the operation that failed. The guest does without fmt.
type fail struct {
	what string
	err  error
}

func (f *fail) Error() string { return f.what + ": " + f.err.Error() }
func (f *fail) Unwrap() error { return f.err }

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return &fail{what, err}
}

// message is one netlink request that asks for an acknowledgement. body is the
// family header and the attributes.
func message(typ, flags uint16, body []byte) []byte {
	b := make([]byte, unix.NLMSG_HDRLEN, unix.NLMSG_HDRLEN+len(body))
	binary.NativeEndian.PutUint32(b[0:], uint32(unix.NLMSG_HDRLEN+len(body)))
	binary.NativeEndian.PutUint16(b[4:], typ)
	binary.NativeEndian.PutUint16(b[6:], flags|unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	return append(b, body...)
}

// attr appends an attribute, padded to four bytes.
func attr(b []byte, typ uint16, value ...byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofNlAttr+len(value)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, value...)
	for len(b)%unix.NLMSG_ALIGNTO != 0 {
		b = append(b, 0)
	}
	return b
}

// request opens a netlink socket and exchanges each batch of messages on it.
func request(protocol int, batches ...batch) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return wrap("netlink socket", err)
	}
	for _, b := range batches {
		if err = wrap(b.what, exchange(fd, b.messages)); err != nil && !(b.mayFail != nil && b.mayFail(err)) {
			break
		}
		err = nil
	}
	return errors.Join(err, unix.Close(fd))
}

// A batch is messages that are sent at once, and what they are for.
type batch struct {
	what     string
	messages []byte
	mayFail  func(error) bool // nil: it must not
}

// exchange sends messages and waits until each that asked for it is
// acknowledged. It returns the first refusal.
func exchange(fd int, messages []byte) error {
	wait := unix.Timeval{Sec: replyTimeout}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		return wrap("netlink timeout", err)
	}
	if err := unix.Sendto(fd, messages, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return wrap("netlink send", err)
	}
	buf := make([]byte, 8<<10)
	for open := acks(messages); open > 0; {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return wrap("netlink receive", err)
		}
		done, err := answers(buf[:n])
		if err != nil {
			return err
		}
		open -= done
	}
	return nil
}

// acks counts the messages that ask for an acknowledgement.
func acks(messages []byte) int {
	n := 0
	for _, m := range split(messages) {
		if binary.NativeEndian.Uint16(m[6:])&unix.NLM_F_ACK != 0 {
			n++
		}
	}
	return n
}

// answers counts the acknowledgements in a datagram from the kernel, or
// returns the first error in it.
func answers(b []byte) (int, error) {
	n := 0
	for _, m := range split(b) {
		if binary.NativeEndian.Uint16(m[4:]) != unix.NLMSG_ERROR || len(m) < unix.NLMSG_HDRLEN+4 {
			continue
		}
		if code := int32(binary.NativeEndian.Uint32(m[unix.NLMSG_HDRLEN:])); code != 0 {
			return n, wrap("netlink", unix.Errno(-code))
		}
		n++
	}
	return n, nil
}

// split cuts a buffer into its whole messages.
func split(b []byte) [][]byte {
	var all [][]byte
	for len(b) >= unix.NLMSG_HDRLEN {
		n := int(binary.NativeEndian.Uint32(b))
		if n < unix.NLMSG_HDRLEN || n > len(b) {
			break
		}
		all = append(all, b[:n])
		b = b[min((n+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1), len(b)):]
	}
	return all
}
