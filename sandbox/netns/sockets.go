package netns

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

const (
	// backlog is how many connections may wait for the gateway; the kernel
	// caps it at net.core.somaxconn, which is 4096 by default.
	backlog = 4096
	// logBuffer is asked for the NFLOG socket: some thousand refused packets
	// while the ledger is busy. The kernel caps it at net.core.rmem_max.
	logBuffer = 1 << 20
)

// Close closes the sockets that are open.
func (f FDs) Close() error {
	var all error
	for _, fd := range [...]int{f.TCP, f.DNS, f.Log} {
		if fd >= 0 {
			all = errors.Join(all, unix.Close(fd))
		}
	}
	return all
}

// bound makes an IPv4 socket on Self:Port.
func bound(kind int) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, wrap("socket", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: self(), Port: Port}); err != nil {
		return -1, errors.Join(wrap("bind", err), unix.Close(fd))
	}
	return fd, nil
}

func listenTCP() (int, error) {
	fd, err := bound(unix.SOCK_STREAM)
	if err != nil {
		return -1, wrap("gateway listener", err)
	}
	if err := unix.Listen(fd, backlog); err != nil {
		return -1, errors.Join(wrap("gateway listener: listen", err), unix.Close(fd))
	}
	return fd, nil
}

func listenUDP() (int, error) {
	fd, err := bound(unix.SOCK_DGRAM)
	return fd, wrap("DNS socket", err)
}

// The configuration of an NFLOG group (linux/netfilter/nfnetlink_log.h).
const (
	nfulMsgConfig = 1
	nfulCfgCmd    = 1
	nfulCfgMode   = 2
	nfulCfgThresh = 5
	nfulCfgFlags  = 6
	nfulBind      = 1
	nfulCopy      = 2 // packets, not only their metadata
	nfulSeq       = 1 // number the messages, so that losses can be counted
)

// listenLog makes a netlink socket that receives the refused packets, each at
// once and numbered.
func listenLog() (int, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return -1, wrap("NFLOG socket", err)
	}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, logBuffer),
		exchange(fd, message(unix.NFNL_SUBSYS_ULOG<<8|nfulMsgConfig, 0, group())),
		unix.SetNonblock(fd, true),
	)
	if err != nil {
		return -1, errors.Join(wrap("NFLOG group", err), unix.Close(fd))
	}
	return fd, nil
}

// group is an nfgenmsg that binds the socket to Group, with its options.
func group() []byte {
	b := []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0}
	b = binary.BigEndian.AppendUint16(b, Group)
	b = attr(b, nfulCfgCmd, nfulBind)
	b = attr(b, nfulCfgMode, append(binary.BigEndian.AppendUint32(nil, Snap), nfulCopy, 0)...)
	b = attr(b, nfulCfgThresh, binary.BigEndian.AppendUint32(nil, 1)...)
	return attr(b, nfulCfgFlags, binary.BigEndian.AppendUint16(nil, nfulSeq)...)
}
