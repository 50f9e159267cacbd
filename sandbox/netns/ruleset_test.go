package netns

import (
	"bytes"
	"encoding/binary"
	"flag"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

var update = flag.Bool("update", false, "write ruleset.nl")

// TestRuleset compares the messages in ruleset.nl with those that a library
// makes of the rules in the package comment. After a change of the rules:
// go test ./sandbox/netns -run TestRuleset -update.
func TestRuleset(t *testing.T) {
	want := encode(t)
	if *update {
		if err := os.WriteFile("ruleset.nl", want, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if got := []byte(ruleset); !bytes.Equal(got, want) {
		t.Errorf("ruleset.nl is not the ruleset of this test: got %d bytes %x, want %d bytes %x", len(got), got, len(want), want)
	}
}

// encode gives the batch as the kernel takes it: numbered from 1, addressed to
// the kernel.
func encode(t *testing.T) []byte {
	t.Helper()
	var all []byte
	conn, err := nftables.New(nftables.WithTestDial(func(batch []netlink.Message) ([]netlink.Message, error) {
		for i, m := range batch {
			m.Header.Sequence, m.Header.PID = uint32(i+1), 0
			m.Header.Length = uint32(unix.NLMSG_HDRLEN + len(m.Data))
			b, err := m.MarshalBinary()
			if err != nil {
				return nil, err
			}
			all = append(all, b...)
		}
		return nil, nil
	}))
	if err != nil {
		t.Fatal(err)
	}
	rules(conn)
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	return all
}

// rules are those of the package comment. They do not begin with a flush: the
// kernel would wait for a grace period, some 10 ms, and there is nothing to
// flush in a fresh namespace.
func rules(conn *nftables.Conn) {
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: "mayfly"}
	conn.AddTable(table)

	gate := conn.AddChain(&nftables.Chain{
		Name: "gate", Table: table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest,
	})
	add := func(chain *nftables.Chain, parts ...[]expr.Any) {
		r := &nftables.Rule{Table: table, Chain: chain}
		for _, p := range parts {
			r.Exprs = append(r.Exprs, p...)
		}
		conn.AddRule(r)
	}
	loopback := netip.MustParsePrefix("127.0.0.0/8")
	self := netip.PrefixFrom(egress.Self, 32)
	add(gate, daddr(expr.CmpOpEq, egress.Virtual), l4proto(unix.IPPROTO_TCP), toGateway())
	add(gate, daddr(expr.CmpOpNeq, loopback), daddr(expr.CmpOpNeq, self), l4proto(unix.IPPROTO_UDP), dport(53), toGateway())

	drop := nftables.ChainPolicyDrop
	wall := conn.AddChain(&nftables.Chain{
		Name: "wall", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter, Policy: &drop,
	})
	accept := []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
	add(wall, ct(expr.CtKeySTATE, expr.CtStateBitRELATED), accept)
	add(wall, ct(expr.CtKeySTATUS, 1<<5 /* IPS_DST_NAT */), accept)
	add(wall, daddr(expr.CmpOpEq, loopback), accept)
	add(wall, daddr(expr.CmpOpEq, self), accept)
	add(wall, daddr(expr.CmpOpEq, netip.MustParsePrefix("::1/128")), accept)
	add(wall, []expr.Any{&expr.Log{
		Key:   1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_SNAPLEN | 1<<unix.NFTA_LOG_QTHRESHOLD,
		Group: Group, Snaplen: Snap, QThreshold: 1,
	}})
	add(wall, l4proto(unix.IPPROTO_TCP), []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}})
	add(wall, []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_PORT_UNREACH}})
}

// daddr matches the destination against a prefix.
func daddr(op expr.CmpOp, p netip.Prefix) []expr.Any {
	family, offset := byte(unix.NFPROTO_IPV4), uint32(16)
	if p.Addr().Is6() {
		family, offset = unix.NFPROTO_IPV6, 24
	}
	n := uint32(p.Addr().BitLen() / 8)
	match := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: n},
	}
	if !p.IsSingleIP() {
		match = append(match, &expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: n,
			Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen()), Xor: make([]byte, n),
		})
	}
	return append(match, &expr.Cmp{Op: op, Register: 1, Data: p.Masked().Addr().AsSlice()})
}

func l4proto(proto byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
	}
}

func dport(port uint16) []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
	}
}

// ct matches if one of bits is set in the state or the status.
func ct(key expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: 1},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binary.NativeEndian.AppendUint32(nil, bits), Xor: make([]byte, 4),
		},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

func toGateway() []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: 1, Data: egress.Self.AsSlice()},
		&expr.Immediate{Register: 2, Data: binaryutil.BigEndian.PutUint16(Port)},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegProtoMin: 2, Specified: true},
	}
}
