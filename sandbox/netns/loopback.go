package netns

import (
	_ "embed"
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// loIndex is the interface index of lo, the same in every namespace.
const loIndex = 1

// self is egress.Self. The guest does without net/netip.
func self() [4]byte { return [4]byte{192, 0, 2, 1} }

//go:embed ruleset.nl
var ruleset string

// loopback brings lo up with its addresses and makes all others local. The
// kernel gives lo ::1 when it comes up.
func loopback() error {
	const put = unix.NLM_F_CREATE | unix.NLM_F_REPLACE
	return request(unix.NETLINK_ROUTE,
		batch{"lo up", message(unix.RTM_NEWLINK, 0, link()), nil},
		batch{"address 127.0.0.1", message(unix.RTM_NEWADDR, put, address([4]byte{127, 0, 0, 1}, 8, unix.RT_SCOPE_HOST)), nil},
		batch{"address of the box", message(unix.RTM_NEWADDR, put, address(self(), 32, unix.RT_SCOPE_UNIVERSE)), nil},
		batch{"IPv4 route", message(unix.RTM_NEWROUTE, put, localDefault(unix.AF_INET, unix.RT_SCOPE_HOST)), nil},
		batch{"IPv6 route", message(unix.RTM_NEWROUTE, put, localDefault(unix.AF_INET6, unix.RT_SCOPE_UNIVERSE)), noIPv6},
	)
}

// noIPv6 reports that the kernel has no IPv6, or that it is disabled on lo.
func noIPv6(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EACCES)
}

// link is an ifinfomsg that sets IFF_UP on lo (rtnetlink(7)).
func link() []byte {
	b := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(b[4:], loIndex)
	binary.NativeEndian.PutUint32(b[8:], unix.IFF_UP)
	binary.NativeEndian.PutUint32(b[12:], unix.IFF_UP)
	return b
}

// address is an ifaddrmsg that gives lo an IPv4 address.
func address(ip [4]byte, bits, scope byte) []byte {
	b := make([]byte, unix.SizeofIfAddrmsg)
	b[0], b[1], b[3] = unix.AF_INET, bits, scope
	binary.NativeEndian.PutUint32(b[4:], loIndex)
	b = attr(b, unix.IFA_LOCAL, ip[:]...)
	return attr(b, unix.IFA_ADDRESS, ip[:]...)
}

// localDefault is an rtmsg for "local default dev lo" in the local table.
func localDefault(family, scope byte) []byte {
	b := make([]byte, unix.SizeofRtMsg)
	b[0], b[4], b[5], b[6], b[7] = family, unix.RT_TABLE_LOCAL, unix.RTPROT_STATIC, scope, unix.RTN_LOCAL
	return attr(b, unix.RTA_OIF, binary.NativeEndian.AppendUint32(nil, loIndex)...)
}

// wall applies the ruleset. It is one transaction: all of it holds or nothing.
func wall() error {
	return request(unix.NETLINK_NETFILTER, batch{"nftables rules", []byte(ruleset), nil})
}
