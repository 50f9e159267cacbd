package bypass

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// An entry is a row of the catalogue of ways around an egress filter.
type entry struct {
	row   string
	what  string
	stops string   // what does
	tests []string // of other packages that judge it as well, or alone: directory and function
}

func catalogue() []entry {
	return []entry{
		{"B1", "unset the proxy, direct TCP", "there is no other route", []string{"test/isolation TestNetworkOfTheHost", "test/isolation TestNetworkAfterAttach"}},
		{"B2", "other ports", "the port is part of a rule", nil},
		{"B3", "TLS to an address, or without a server name", "names alone are carried, and the server name is the rule's", nil},
		{"B4", "DNS tunnels by way of the resolver", "the resolver asks nobody", nil},
		{"B5", "DNS over TCP, several messages, odd ones", "there is no way for DNS, and one question is answered", nil},
		{"B6", "DoH, DoT, DoQ, at an allowed host too", "the names are not allowed, and requests that resolve are refused", nil},
		{"B7", "UDP by every call, QUIC", "UDP goes nowhere", []string{"sandbox/egress/gateway TestOtherProtocols"}},
		{"B8", "ICMP, raw and packet sockets, SCTP, MPTCP", "no right to make them, and no route", []string{"test/isolation TestSocketFamilies", "sandbox/egress/gateway TestOtherProtocols"}},
		{"B9", "IPv6, IPv4 in IPv6, numbers that are addresses", "no route, and no name ends in a number", nil},
		{"B10", "another host at a shared address", "addresses are not opened, each connection is for a name", nil},
		{"B11", "an allowed server name at the attacker's address", "the gateway resolves and dials itself, and verifies the certificate", []string{"sandbox/egress/egresstest TestGateway"}},
		{"B12", "domain fronting, CONNECT", "name = server name = host, of each request", []string{"test/https TestPrograms"}},
		{"B13", "encrypted ClientHello", "it is refused, and no keys for it are handed out", nil},
		{"B14", "reuse of connections, h2c, upgrades", "each request is judged", []string{"sandbox/egress/gateway TestStreams"}},
		{"B15", "request smuggling", "what can be read in two ways is refused, and one parser writes the rest anew", []string{"sandbox/egress/gateway TestOneFraming", "sandbox/egress/gateway TestOneFramingOfAnswers", "sandbox/egress/gateway TestTerminatedFraming", "sandbox/egress/gateway TestFrames"}},
		{"B16", "names that are read in two ways: NUL, dots, case, IDN", "one strict form before any comparison", []string{"sandbox/egress/gateway TestCanonical"}},
		{"B17", "redirects", "they are the client's to follow, and judged as any request", []string{"test/https TestPrograms"}},
		{"B18", "DNS rebinding, names of private addresses", "resolved once, judged, and dialled as judged", []string{"sandbox/egress/egresstest TestGateway"}},
		{"B19", "cloud metadata", "a list that no rule opens", []string{"test/isolation TestNetworkOfTheHost", "sandbox/egress/gateway TestAddressClasses"}},
		{"B20", "an allowed host with many tenants", "rules of methods and paths", []string{"sandbox/egress/gateway TestMatches"}},
		{"B21", "the attacker's own token at an allowed host", "a credential that the broker did not issue is stripped or refused", []string{"sandbox/egress/gateway TestInjection", "test/broker TestGit"}},
		{"B22", "registries, caches and mirrors as a way out", "rules of methods, and paths that are read in one way", nil},
		{"B23", "container engines' sockets, sibling containers", "no socket of the host is in a box", []string{"test/isolation TestUnixSocketsOfTheHost"}},
		{"B24", "flushed rules, new namespaces", "neither right nor call", []string{"test/isolation TestKernel", "test/isolation TestSocketFamilies"}},
		{"B25", "marks of packets, foreign source addresses", "nothing goes by them, and no right to set them", nil},
		{"B26", "a policy that the change brings along", "the policy is the agent's; a repository narrows it", []string{"test/hostile TestPolicyOfTheChange", "runner/policy TestNeverWiden", "runner/policy TestNarrow"}},
		{"B27", "kill the gateway", "without it there is no network", []string{"test/hostile TestKilledGateway", "sandbox/egress/egresstest TestGateway"}},
		{"B28", "a weaker policy by an error, an empty list, a reload", "nothing allows nothing, unreadable refuses, and each box is probed", []string{"test/hostile TestPolicyOfTheChange", "test/hostile TestPolicyThatIsNone", "runner/policy TestEmptyListsMatchNothing", "runner/policy TestZeroPolicyRefuses", "sandbox/wall TestWallThatDoesNotHold", "runner TestBoxThatLeaks"}},
		{"B29", "a proxy inside the job", "who asks is told by the box, not by a header", nil},
		{"B30", "sizes and timing as a channel, data in paths", "budgets; what is left is a risk that stays", []string{"sandbox/egress/gateway TestRate"}},
		{"B31", "ssh and git at the port of https", "only a ClientHello or HTTP is carried where the rule says so", nil},
		{"B32", "WebSocket and gRPC streams as tunnels", "a rule must say so, and its budgets count", []string{"sandbox/egress/gateway TestWebSocket"}},
	}
}

// judges are the tests of a row as docs/bypass.md names them.
func (e entry) judges(own bool) string {
	all := slices.Clone(e.tests)
	if own {
		all = append([]string{"test/bypass TestRows/" + e.row}, all...)
	}
	for i, name := range all {
		all[i] = "`" + name + "`"
	}
	return strings.Join(all, ", ")
}

// TestCatalogue wants every row judged, the tests that are named to exist, and
// docs/bypass.md to say the same.
func TestCatalogue(t *testing.T) {
	own := ownRows()
	var doc strings.Builder
	doc.WriteString("| row | way around | what stops it | judged by |\n|---|---|---|---|\n")
	for i, e := range catalogue() {
		if e.row != "B"+strconv.Itoa(i+1) {
			t.Errorf("row %d is %s", i+1, e.row)
		}
		here := len(own[e.row]) > 0 || e.row == "B27"
		if !here && len(e.tests) == 0 {
			t.Errorf("%s: no test judges it", e.row)
		}
		delete(own, e.row)
		for _, name := range e.tests {
			if !exists(t, name) {
				t.Errorf("%s: there is no test %s", e.row, name)
			}
		}
		fmt.Fprintf(&doc, "| %s | %s | %s | %s |\n", e.row, e.what, e.stops, e.judges(here))
	}
	if n := len(catalogue()); n != 32 || len(own) > 0 {
		t.Errorf("got %d rows, want 32; not in the catalogue: %v", n, own)
	}
	written, err := os.ReadFile("../../docs/bypass.md")
	must(t, err)
	if !strings.HasSuffix(string(written), doc.String()) {
		t.Errorf("docs/bypass.md should end with:\n%s", &doc)
	}
}

// exists looks for a test function in the source of a directory.
func exists(t *testing.T, name string) bool {
	t.Helper()
	dir, function, _ := strings.Cut(name, " ")
	files, err := filepath.Glob(filepath.Join("../..", dir, "*_test.go"))
	must(t, err)
	for _, file := range files {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		must(t, err)
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == function {
				return true
			}
		}
	}
	return false
}
