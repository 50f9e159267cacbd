package gateway

import (
	"net/netip"
	"strings"
	"testing"
)

// classified is an address and what it is.
type classified struct {
	addr  string
	never bool
	what  string // "" is public
}

func classifications() []classified {
	return []classified{
		{"93.184.216.34", false, ""},
		{"8.8.8.8", false, ""},
		{"172.32.0.1", false, ""},
		{"100.128.0.1", false, ""},
		{"198.20.0.1", false, ""},
		{"2606:2800:220:1::1", false, ""},
		{"64:ff9b::808:808", false, ""}, // a public address behind NAT64
		{"10.0.0.1", false, "private"},
		{"172.16.0.1", false, "private"},
		{"172.31.255.255", false, "private"},
		{"192.168.1.1", false, "private"},
		{"127.0.0.1", false, "loopback"},
		{"127.255.255.255", false, "loopback"},
		{"169.254.1.1", false, "link-local"},
		{"100.64.0.1", false, "carrier-grade"},
		{"100.127.255.255", false, "carrier-grade"},
		{"192.0.0.1", false, "protocol assignment"},
		{"192.0.2.1", false, "documentation"},
		{"198.51.100.1", false, "documentation"},
		{"203.0.113.1", false, "documentation"},
		{"192.88.99.1", false, "6to4 relay"},
		{"198.18.0.1", false, "benchmark"},
		{"198.19.255.255", false, "benchmark"},
		{"240.0.0.1", false, "reserved"},
		{"::1", false, "loopback"},
		{"fe80::1", false, "link-local"},
		{"fc00::1", false, "private"},
		{"fd12:3456::1", false, "private"},
		{"fec0::1", false, "private"},
		{"2001:db8::1", false, "documentation"},
		{"3fff::1", false, "documentation"},
		{"2001::1", false, "protocol assignment"},
		{"2001:2::1", false, "protocol assignment"},
		{"2002:808:808::1", false, "6to4"},
		{"64:ff9b::a00:1", false, "private"},
		{"64:ff9b::7f00:1", false, "loopback"},
		{"64:ff9b:1::a00:1", false, "reserved"},
		{"4000::1", false, "reserved"},
		{"::10.0.0.1", false, "reserved"},
		{"0.0.0.0", true, "no host"},
		{"0.1.2.3", true, "no host"},
		{"::", true, "no host"},
		{"255.255.255.255", true, "broadcast"},
		{"224.0.0.1", true, "multicast"},
		{"239.255.255.255", true, "multicast"},
		{"ff02::1", true, "multicast"},
		{"169.254.169.254", true, "metadata"},
		{"169.254.169.253", true, "resolver"},
		{"169.254.170.2", true, "metadata"},
		{"169.254.170.23", true, "metadata"},
		{"100.100.100.200", true, "metadata"},
		{"168.63.129.16", true, "metadata"},
		{"192.0.0.192", true, "metadata"},
		{"fd00:ec2::254", true, "metadata"},
		{"fd00:ec2::23", true, "metadata"},
		{"fd20:ce::254", true, "metadata"},
		{"fe80::a9fe:a9fe", true, "metadata"},
		{"64:ff9b::a9fe:a9fe", true, "metadata"},
		{"64:ff9b:1::a9fe:a9fe", true, "metadata"},
		{"2002:a9fe:a9fe::1", true, "metadata"},
		{"2001:0:1234::5601:5601", true, "metadata"}, // Teredo, inverted
		{"::a9fe:a9fe", true, "metadata"},
		{"::ffff:169.254.169.254", true, "metadata"},
		{"2620:0:1:2:0:5efe:a9fe:a9fe", true, "metadata"}, // ISATAP
		{"2620:0:1:2:200:5efe:a9fe:a9fe", true, "metadata"},
	}
}

func TestAddressClasses(t *testing.T) {
	t.Parallel()
	table := newTable()
	for _, tt := range classifications() {
		a := netip.MustParseAddr(tt.addr)
		if got := table.never(a); (got != "") != tt.never {
			t.Errorf("never(%s): got %q, want forbidden: %v", tt.addr, got, tt.never)
		}
		got := table.private(a.Unmap())
		if tt.what == "" && got != "" || !strings.Contains(got, tt.what) {
			t.Errorf("private(%s): got %q, want %q", tt.addr, got, tt.what)
		}
	}
}

func TestJudge(t *testing.T) {
	t.Parallel()
	g, err := New(Config{Never: []netip.AddrPort{netip.MustParseAddrPort("[::]:9000"), netip.MustParseAddrPort("10.0.0.5:8080")}})
	if err != nil {
		t.Fatal(err)
	}
	own := func(a netip.Addr) bool {
		return a == netip.MustParseAddr("20.0.0.1") || a == netip.MustParseAddr("10.0.0.9")
	}
	all := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	for _, tt := range []struct {
		addr    string
		port    uint16
		resolve []netip.Prefix
		good    bool
	}{
		{"20.0.0.2", 443, nil, true},
		{"20.0.0.1", 443, nil, false}, // this machine, though public
		{"20.0.0.1", 443, all, true},
		{"20.0.0.1", 9000, all, false}, // the agent listens on every address
		{"127.0.0.7", 9000, all, false},
		{"10.0.0.9", 9000, all, false},
		{"10.0.0.8", 9000, all, true}, // another machine
		{"10.0.0.5", 8080, all, false},
		{"10.0.0.5", 8081, all, true},
		{"10.0.0.5", 8081, nil, false},
		{"fe80::1%eth0", 443, all, false},
		{"169.254.169.254", 443, all, false},
	} {
		r := rule("x.example", tt.port)
		r.Resolve = tt.resolve
		if got := g.judge(netip.MustParseAddr(tt.addr), r, own); (got == "") != tt.good {
			t.Errorf("judge(%s, port %d, resolve %v): got %q, want good: %v", tt.addr, tt.port, tt.resolve, got, tt.good)
		}
	}
}
