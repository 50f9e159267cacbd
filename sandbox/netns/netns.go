// Package netns makes the loopback-only network of a box.
//
// It runs inside the fresh network namespace of the box: in the guest before
// it drops its capabilities, or on a locked thread of the agent that entered
// the namespace. [Setup] makes every address local and lets nothing pass but
// what the box may have; [Open] makes the three sockets that the gateway
// serves. Both need CAP_NET_ADMIN over the namespace. The guest carries this
// package, so it imports little and speaks netlink by itself.
//
// The namespace has no interface but lo, which carries 127.0.0.1, ::1 and
// egress.Self. "local default dev lo" makes every other address local too, so
// a packet to anywhere meets these rules and no route exists that could be
// forgotten:
//
//	table inet mayfly {
//		chain gate {
//			type nat hook output priority dstnat; policy accept;
//			ip daddr 198.18.0.0/15 meta l4proto tcp dnat ip to 192.0.2.1:65353
//			ip daddr != 127.0.0.0/8 ip daddr != 192.0.2.1 udp dport 53 dnat ip to 192.0.2.1:65353
//		}
//		chain wall {
//			type filter hook input priority filter; policy drop;
//			ct state related accept
//			ct status dnat accept
//			ip daddr 127.0.0.0/8 accept
//			ip daddr 192.0.2.1 accept
//			ip6 daddr ::1 accept
//			log group 5 snaplen 128 queue-threshold 1
//			meta l4proto tcp reject with tcp reset
//			reject with icmpx port-unreachable
//		}
//	}
//
// So 127.0.0.0/8, ::1 and Self are the job's own, DNS servers of its own on
// them included; TCP to the virtual range and UDP 53 to any other IPv4 address
// reach the gateway, and answers come back from the address that was asked;
// all else, IPv6 and TCP 53 included, is logged and refused. The refusal is
// also why a job that listens on 0.0.0.0:443 does not answer its own
// connections to 169.254.169.254:443, although that address is local.
//
// The wall stands at the input hook, where each packet on lo must pass. At the
// output hook the refusal would come back while connect still holds the socket,
// which then ignores it: a blocking connect would fail after a second, not at
// once. Replies need no rule for established connections: they go to an address
// of the job's own or belong to a connection that was redirected. "related" is
// what the kernel itself answers to a refused packet.
//
// The rules are constant. ruleset.nl holds them as netlink messages, written by
// the test of this package with github.com/google/nftables, which compares them
// byte by byte on every run.
package netns

import "errors"

const (
	// Port is where the gateway's sockets are bound, on egress.Self, TCP and
	// UDP. A job cannot listen on it at 0.0.0.0. It lies above the range that
	// the kernel takes client ports from (32768-60999), and no service is
	// registered for it.
	Port = 65353

	// Group is the NFLOG group of the refused packets. It belongs to the
	// namespace, so boxes do not meet in it.
	Group = 5

	// Snap is how many bytes of a refused packet are logged: the longest IPv4
	// header, or an IPv6 header with some extensions, and the ports.
	Snap = 128
)

// Setup makes the network of the current thread's namespace that of a box: lo
// up, its addresses, every other address local, and the rules above. Once is
// enough; the rules of a second call stand behind those of the first. If it fails the namespace must not be given to a job; the error
// is a system call's or the kernel's answer to a netlink message, EPERM if the
// caller lacks CAP_NET_ADMIN, ENOENT if the kernel lacks a part of nftables.
//
// A namespace in which IPv6 is switched off stays without: there is nothing to
// refuse then, and connect says ENETUNREACH or EAFNOSUPPORT.
func Setup() error {
	if err := loopback(); err != nil {
		return err
	}
	return wall()
}

// FDs are the sockets of a box as descriptors: close-on-exec, non-blocking. A
// socket keeps the namespace that it was made in, so they may be passed on.
type FDs struct {
	TCP int // listener on Self:Port
	DNS int // UDP socket on Self:Port
	Log int // netlink socket bound to Group
}

// Open makes the sockets in the current thread's namespace, after Setup and
// before the job, which could otherwise take the port. The caller owns them.
// The Log socket loses packets if nobody reads it, which the numbers in its
// messages show.
func Open() (FDs, error) {
	fds := FDs{TCP: -1, DNS: -1, Log: -1}
	for _, part := range []struct {
		fd   *int
		open func() (int, error)
	}{{&fds.TCP, listenTCP}, {&fds.DNS, listenUDP}, {&fds.Log, listenLog}} {
		fd, err := part.open()
		if err != nil {
			return FDs{TCP: -1, DNS: -1, Log: -1}, errors.Join(err, fds.Close())
		}
		*part.fd = fd
	}
	return fds, nil
}
