package gateway

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
	"github.com/mayfly-ci/mayfly/sandbox/netns"
)

// cite names a rule to the author of the policy.
func cite(r egress.Rule) string {
	if r.ID != "" {
		return "rule " + r.ID
	}
	return fmt.Sprintf("rule {%s %d %s}", printable(r.Name), r.Port, r.Protocol)
}

// validate refuses rules that cannot be enforced as written. Every bad rule is
// named.
func validate(o egress.Opening) error {
	var all []error
	add := func(r egress.Rule, err error) {
		if err != nil {
			all = append(all, fmt.Errorf("%w: %s: %w", egress.ErrBadRules, cite(r), err))
		}
	}
	for _, r := range o.Rules.Allow {
		add(r, validateRule(r))
		if reserved(r.Name) {
			add(r, fmt.Errorf("name %s: names of %s are the agent's own", r.Name, egress.Reserved))
		}
	}
	for _, s := range o.Serve {
		add(s.Rule, validateServed(s, o.Parent))
	}
	if o.Parent != "" && o.Learn != nil {
		all = append(all, fmt.Errorf("%w: learning belongs to the gateway that has the box", egress.ErrBadRules))
	}
	if o.Parent != "" && (len(o.Terminate) > 0 || !o.Expires.IsZero()) {
		all = append(all, fmt.Errorf("%w: terminate and expires belong to the gateway that has the box", egress.ErrBadRules))
	}
	ports := map[uint16]bool{}
	for _, p := range o.Publish {
		add(p.Rule, validateRule(p.Rule))
		switch {
		case p.Rule.Service == "" || p.Rule.Port == 0 || o.Parent != "":
			add(p.Rule, errors.New("a published port leads to a port of a service, and belongs to a box"))
		case p.Port == 0 || p.Port == netns.Port || ports[p.Port]:
			add(p.Rule, fmt.Errorf("published port %d: a number from 1 to 65535 is needed, once, and not %d", p.Port, netns.Port))
		}
		ports[p.Port] = true
	}
	return errors.Join(all...)
}

func validateRule(r egress.Rule) error {
	if err := validateName(r.Name); err != nil {
		return err
	}
	if r.Service == "" && strings.Contains(r.Name, "_") {
		return fmt.Errorf("name %q: services of a job alone have an underscore in their names", r.Name)
	}
	if r.Service != "" && strings.HasPrefix(r.Name, "*") {
		return fmt.Errorf("name %q: a service has one name", r.Name)
	}
	if r.Service != "" && (r.Protocol != egress.TCP || len(r.Resolve) > 0) {
		return errors.New("a service is reached by tcp, and is not resolved")
	}
	if r.Port == 0 && r.Service == "" {
		return errors.New("port: a number from 1 to 65535 is needed")
	}
	switch r.Protocol {
	case egress.TCP, egress.TLS, egress.HTTP, egress.HTTPS, egress.SSH, egress.Postgres:
	default:
		return fmt.Errorf("protocol %q: tcp, tls, http, https, ssh or postgres is needed", r.Protocol)
	}
	if err := validateRequests(r); err != nil {
		return err
	}
	for _, p := range r.Resolve {
		if !p.IsValid() || p.Addr().Is4In6() {
			return fmt.Errorf("resolve %v: an IPv4 or IPv6 prefix is needed", p)
		}
	}
	return nil
}

// validateName refuses what cannot be the name of a rule.
func validateName(name string) error {
	if addr, err := netip.ParseAddr(name); err == nil {
		return fmt.Errorf("the network of a box carries names only; name the host and add resolve: [%s]", addr)
	}
	rest, wild := strings.CutPrefix(name, "*.")
	if wild && !strings.Contains(rest, ".") {
		return fmt.Errorf("name %s: two labels are needed behind *, else it opens what many own", printable(name))
	}
	host, err := canonical(rest)
	if err == nil && host != rest {
		err = fmt.Errorf("name %s: write %s", printable(name), strings.Replace(name, rest, host, 1))
	}
	return err
}

// validateRequests refuses what is said of requests where none are seen.
func validateRequests(r egress.Rule) error {
	if r.Protocol != egress.HTTP && r.Protocol != egress.HTTPS && len(r.Requests) > 0 {
		return fmt.Errorf("protocol %s: its requests are not seen; https or http is needed to narrow them", r.Protocol)
	}
	if r.Protocol != egress.HTTPS && r.Protocol != egress.Postgres && r.CA != "" {
		return fmt.Errorf("protocol %s: its certificates are not seen; https or postgres is needed for a CA", r.Protocol)
	}
	if r.CA != "" && !x509.NewCertPool().AppendCertsFromPEM([]byte(r.CA)) {
		return errors.New("CA: certificates as PEM are needed")
	}
	validate := validateInjection
	if logs(r.Protocol) || r.Session != nil {
		validate = validateLogin
	}
	if err := validate(r); err != nil {
		return err
	}
	for i, request := range r.Requests {
		if err := request.Check(); err != nil {
			return fmt.Errorf("request %d: %w", i+1, err)
		}
	}
	return nil
}

// validateInjection refuses a credential that could reach somebody else.
func validateInjection(r egress.Rule) error {
	switch {
	case r.Inject == nil:
		return nil
	case r.Protocol != egress.HTTPS:
		return fmt.Errorf("protocol %s: a credential is put into requests of https alone", r.Protocol)
	case strings.HasPrefix(r.Name, "*"):
		return fmt.Errorf("name %s: a credential is for one name; what is below it may be anybody's", r.Name)
	case r.Inject.Value.IsZero():
		return errors.New("the credential is empty")
	}
	return r.Inject.Check()
}

// canonical is the one form of a host name: lower-case LDH labels (RFC 1123
// section 2.1) without the final dot, at most 253 bytes. A name that ends in a
// number is refused, because programs take such for IPv4 addresses.
func canonical(s string) (string, error) {
	name := strings.TrimSuffix(s, ".")
	if name == "" || len(name) > 253 {
		return "", fmt.Errorf("name %s: 1 to 253 bytes are needed", printable(s))
	}
	lower := []byte(name)
	label := 0
	for i, c := range lower {
		switch {
		case c >= 'A' && c <= 'Z':
			lower[i] = c + 'a' - 'A'
		case c >= 'a' && c <= 'z', c >= '0' && c <= '9', c == '_': // ids of services may have one
		case c == '-' && label > 0 && i+1 < len(lower) && lower[i+1] != '.':
		case c == '.' && label > 0:
			label = -1
		default:
			return "", fmt.Errorf("name %s: labels of letters, digits and inner hyphens are needed (punycode for others)", printable(s))
		}
		if label++; label > 63 {
			return "", fmt.Errorf("name %s: a label has more than 63 bytes", printable(s))
		}
	}
	name = string(lower)
	if label == 0 {
		return "", fmt.Errorf("name %s: a label is empty", printable(s))
	}
	if last := name[strings.LastIndexByte(name, '.')+1:]; numeric(last) {
		return "", fmt.Errorf("name %s: ends in a number, as an address does", printable(s))
	}
	return name, nil
}

// numeric reports a label that inet_aton would read as a number.
func numeric(label string) bool {
	digits, set := label, "0123456789"
	if strings.HasPrefix(label, "0x") {
		digits, set = label[2:], "0123456789abcdef"
	}
	return strings.Trim(digits, set) == ""
}

// printable makes what a job sent fit for a line or an error: ASCII, bounded.
func printable(s string) string {
	const limit = 300
	if len(s) > limit {
		s = s[:limit]
	}
	q := fmt.Sprintf("%+q", s)
	return q[1 : len(q)-1]
}
