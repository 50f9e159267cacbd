package egress_test

import (
	"testing"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

func TestSuggest(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		line egress.Line
		want string
	}{
		{"name asked for", egress.Line{Verdict: egress.Refused, Network: "dns", Name: "example.com"}, "- {name: example.com, port: 443, protocol: tls}"},
		{"http port", egress.Line{Verdict: egress.Refused, Network: "tcp", Name: "example.com", Port: 80}, "- {name: example.com, port: 80, protocol: http}"},
		{"other port", egress.Line{Verdict: egress.Refused, Network: "tcp", Name: "example.com", Port: 5432}, "- {name: example.com, port: 5432, protocol: tcp}"},
		{"allowed", egress.Line{Verdict: egress.Allowed, Network: "tcp", Name: "example.com", Port: 443}, ""},
		{"refused by a rule", egress.Line{Verdict: egress.Refused, Network: "tcp", Name: "example.com", Port: 443, Rule: "p:1"}, ""},
		{"learned", egress.Line{Verdict: egress.Learned, Network: "tcp", Name: "example.com", Port: 8080, Protocol: egress.HTTP}, "- {name: example.com, port: 8080, protocol: http}"},
		{"address", egress.Line{Verdict: egress.Refused, Network: "tcp", Address: "192.0.2.7", Port: 443}, ""},
		{"no port", egress.Line{Verdict: egress.Refused, Network: "tcp", Name: "example.com"}, ""},
	} {
		if got := tt.line.Suggest(); got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}
