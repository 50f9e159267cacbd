package policy

import (
	"fmt"
	"net/netip"
	"regexp"
	"strings"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// host is the name of an egress rule: a host name in the one spelling that the
// gateway compares (RFC 1123 section 2.1, lower case, no trailing dot), or an
// IP address. "*." before it is any one label.
type host string

func (h *host) UnmarshalText(b []byte) error {
	text := string(b)
	if addr, err := netip.ParseAddr(text); err == nil {
		*h = host(text)
		return checkAddr(addr, text)
	}
	name := text
	if rest, wild := strings.CutPrefix(text, "*."); wild {
		if !strings.Contains(rest, ".") {
			return fmt.Errorf("name %q: two labels are needed behind *, else it opens what many own", text)
		}
		name = rest
	}
	lower := strings.ToLower(text)
	last := text[strings.LastIndexByte(text, '.')+1:]
	switch {
	case strings.Contains(name, "*"):
		return fmt.Errorf("name %q: a wildcard is the whole first label, as in *.example.com", text)
	case strings.ContainsFunc(text, func(r rune) bool { return r > 0x7e }):
		return fmt.Errorf("name %q is not ASCII: write its xn-- form, which is what is looked up", text)
	case text != lower:
		return fmt.Errorf("name %q: write it in lower case: %s", text, lower)
	case strings.HasSuffix(text, "."):
		return fmt.Errorf("name %q: remove the dot at the end", text)
	case len(text) > 253 || !hostName(name):
		return fmt.Errorf("name %q is not a host name: write letters, digits, - and dots, without scheme, port or path", text)
	case strings.Trim(last, "0123456789") == "" || strings.HasPrefix(last, "0x"):
		return fmt.Errorf("name %q looks like an address and is none", text)
	case name == egress.Reserved || strings.HasSuffix(name, "."+egress.Reserved):
		return fmt.Errorf("name %q: what is below %s is the agent's own", text, egress.Reserved)
	case last == "localhost":
		return fmt.Errorf("name %q is the box itself: give the service a name of its own and say resolve: [127.0.0.1]", text)
	}
	*h = host(text)
	return nil
}

func hostName(text string) bool {
	const label = `[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?`
	ok, err := regexp.MatchString(`^`+label+`(?:\.`+label+`)*$`, text)
	return err == nil && ok
}

// checkAddr refuses addresses that no rule can open: what stays in the box,
// and what the gateway never dials.
func checkAddr(a netip.Addr, text string) error {
	switch {
	case a.Zone() != "" || a.Is4In6() || a.String() != text:
		return fmt.Errorf("address %q: write it as %s", text, a.WithZone("").Unmap())
	case a.IsLoopback(), a.IsUnspecified(), egress.Virtual.Contains(a), a == egress.Self, a == egress.Resolver:
		return fmt.Errorf("address %s belongs to the box itself and never reaches the gateway", text)
	case a.IsMulticast(), a.IsLinkLocalUnicast():
		return fmt.Errorf("address %s: link-local and multicast addresses are never dialled: metadata services live there", text)
	}
	return nil
}
