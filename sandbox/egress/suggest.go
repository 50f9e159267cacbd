package egress

import "fmt"

// Suggest renders the policy rule that would allow a refused line, or a learned
// one, for the user to paste:
//
//   - {name: example.com, port: 443, protocol: tls}
//
// A DNS question does not say what the job wants of the name; HTTPS is assumed.
// It is empty where a further rule would not help, and where a job used an
// address, because rules are about names; Reason then says what would.
func (l Line) Suggest() string {
	if l.Verdict != Refused && l.Verdict != Learned || l.Name == "" || l.Rule != "" {
		return ""
	}
	port := l.Port
	if l.Network == "dns" {
		port = 443
	}
	protocol := TCP
	switch port {
	case 0:
		return ""
	case 443:
		protocol = TLS
	case 80:
		protocol = HTTP
	}
	if l.Protocol != "" {
		protocol = l.Protocol
	}
	return fmt.Sprintf("- {name: %s, port: %d, protocol: %s}", l.Name, port, protocol)
}
