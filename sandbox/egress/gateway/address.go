package gateway

import (
	"encoding/binary"
	"net/netip"
)

// A class says what an address is when it is not public.
type class struct {
	prefix netip.Prefix
	what   string
}

// forbidden are the addresses that no rule opens: they hand out credentials of
// the machine or of its cloud account, or are no destinations.
func forbidden() []class {
	return classes(
		"169.254.169.254/32", "cloud metadata address", // AWS, Google, Azure, OpenStack, Oracle, DigitalOcean
		"169.254.169.253/32", "cloud resolver address", // AWS
		"169.254.170.2/32", "cloud metadata address", // AWS ECS task credentials
		"169.254.170.23/32", "cloud metadata address", // AWS EKS pod identity
		"169.254.0.23/32", "cloud metadata address", // Tencent
		"169.254.42.42/32", "cloud metadata address", // Scaleway
		"100.100.100.200/32", "cloud metadata address", // Alibaba
		"168.63.129.16/32", "cloud metadata address", // Azure wire server
		"192.0.0.192/32", "cloud metadata address", // Oracle, older
		"fd00:ec2::/32", "cloud metadata address", // AWS: ::254, ::253, ::23
		"fd20:ce::254/128", "cloud metadata address", // Google
		"fd00:42::42/128", "cloud metadata address", // Scaleway
		"fe80::a9fe:a9fe/128", "cloud metadata address", // OpenStack
		"0.0.0.0/8", "address of no host", // RFC 1122; connects to loopback on Linux
		"255.255.255.255/32", "broadcast address",
		"224.0.0.0/4", "multicast address",
		"::/128", "address of no host",
		"ff00::/8", "multicast address",
	)
}

// Forbidden says what an address is that no rule opens and that the agent does not
// dial itself either, and "" of all others.
func Forbidden(a netip.Addr) string { return newTable().never(a) }

// special are the IPv4 addresses that are not public: what the IANA registry
// (RFC 6890) says is not globally reachable.
func special() []class {
	return classes(
		"10.0.0.0/8", "private address", // RFC 1918
		"172.16.0.0/12", "private address",
		"192.168.0.0/16", "private address",
		"127.0.0.0/8", "loopback address",
		"169.254.0.0/16", "link-local address", // RFC 3927
		"100.64.0.0/10", "carrier-grade NAT address", // RFC 6598
		"192.0.0.0/24", "protocol assignment address",
		"192.0.2.0/24", "documentation address", // RFC 5737
		"198.51.100.0/24", "documentation address",
		"203.0.113.0/24", "documentation address",
		"192.88.99.0/24", "6to4 relay address", // RFC 7526
		"198.18.0.0/15", "benchmark address", // RFC 2544
		"240.0.0.0/4", "reserved address",
	)
}

// special6 are those of IPv6, where public is only what lies in 2000::/3.
func special6() []class {
	return classes(
		"::1/128", "loopback address",
		"fe80::/10", "link-local address",
		"fc00::/7", "private address", // RFC 4193
		"fec0::/10", "private address", // RFC 3879
		"2001:db8::/32", "documentation address", // RFC 3849
		"3fff::/20", "documentation address", // RFC 9637
		"2001::/23", "protocol assignment address", // Teredo, ORCHID, benchmarks
		"2002::/16", "6to4 address", // RFC 7526: not in use any more
		"2000::/3", "",
		"::/0", "reserved address",
	)
}

// classes makes a table of pairs of prefix and meaning.
func classes(pairs ...string) []class {
	all := make([]class, 0, len(pairs)/2)
	for i := 0; i+1 < len(pairs); i += 2 {
		all = append(all, class{netip.MustParsePrefix(pairs[i]), pairs[i+1]})
	}
	return all
}

// A table judges addresses.
type table struct{ forbidden, special, special6 []class }

func newTable() *table {
	return &table{forbidden(), special(), special6()}
}

// find returns the meaning of the first class that contains a.
func find(all []class, a netip.Addr) string {
	for _, c := range all {
		if c.prefix.Contains(a) {
			return c.what
		}
	}
	return ""
}

// never says what an address is that must not be dialled whatever the rules
// say, and "" of all others. An IPv4 address inside an IPv6 one counts.
func (t *table) never(a netip.Addr) string {
	if v4, ok := embedded(a); ok {
		if what := find(t.forbidden, v4); what != "" {
			return what
		}
	}
	return find(t.forbidden, a)
}

// private says what an address is that is not public, and "" of one that is.
func (t *table) private(a netip.Addr) string {
	if what := t.never(a); what != "" {
		return what
	}
	if a.Is4() {
		return find(t.special, a)
	}
	if v4, ok := embedded(a); ok && nat64(a) {
		return find(t.special, v4)
	}
	return find(t.special6, a)
}

// nat64 reports the well-known prefix of RFC 6052. Where IPv4 is reached through
// it, every IPv4 address looks like this, the public ones too.
func nat64(a netip.Addr) bool {
	b := a.As16()
	return binary.BigEndian.Uint64(b[:8]) == 0x0064_ff9b_0000_0000 && binary.BigEndian.Uint32(b[8:12]) == 0
}

// embedded returns the IPv4 address that a translating host would reach.
func embedded(a netip.Addr) (netip.Addr, bool) {
	if !a.Is6() {
		return netip.Addr{}, false
	}
	b := a.As16()
	tail := netip.AddrFrom4([4]byte(b[12:]))
	head := binary.BigEndian.Uint64(b[:8])
	switch {
	case a.Is4In6():
		return a.Unmap(), true
	case nat64(a):
		return tail, true
	case head>>16 == 0x0064_ff9b_0001: // RFC 8215; where the address stands depends on the network
		return tail, true
	case head>>48 == 0x2002: // 6to4, RFC 3056
		return netip.AddrFrom4([4]byte(b[2:6])), true
	case head>>32 == 0x2001_0000: // Teredo, RFC 4380: the client, inverted
		return netip.AddrFrom4([4]byte{^b[12], ^b[13], ^b[14], ^b[15]}), true
	case head == 0 && binary.BigEndian.Uint32(b[8:12]) == 0 && binary.BigEndian.Uint32(b[12:]) > 1: // RFC 4291 section 2.5.5.1
		return tail, true
	case binary.BigEndian.Uint32(b[8:12])&^0x0200_0000 == 0x0000_5efe: // ISATAP, RFC 5214
		return tail, true
	}
	return netip.Addr{}, false
}
