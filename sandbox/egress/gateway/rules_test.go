package gateway

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

func rule(name string, port uint16) egress.Rule {
	return egress.Rule{ID: "policy:1", Name: name, Port: port, Protocol: egress.TCP}
}

func discard(egress.Line) error { return nil }

func TestCanonical(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("a", 63)
	for in, want := range map[string]string{
		"example.com":       "example.com",
		"Example.COM.":      "example.com",
		"a":                 "a",
		"a-b.c":             "a-b.c",
		"1.a":               "1.a",
		"xn--mnchen-3ya.de": "xn--mnchen-3ya.de",
		long + ".x":         long + ".x",
		"0xg":               "0xg",
		"":                  "",
		".":                 "",
		"a..b":              "",
		".a":                "",
		"a..":               "",
		"-a":                "",
		"a-":                "",
		"a-.b":              "",
		"a_b":               "a_b",
		"a b":               "",
		"a\x00.b":           "",
		"a\n":               "",
		"münchen.de":        "",
		"a%00":              "",
		"*.a":               "",
		"1.2.3.4":           "",
		"a.1":               "",
		"0x7f.1":            "",
		"a.0x7f":            "",
		"a.0x":              "",
		"[::1]":             "",
		long + "a.x":        "",
		strings.Repeat(strings.Repeat("a", 9)+".", 26): "",
	} {
		got, err := canonical(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("canonical(%q): got %q %v, want %q", in, got, err, want)
		}
	}
}

func FuzzCanonical(f *testing.F) {
	f.Add("Example.com.")
	f.Add("a\x00.example")
	f.Fuzz(func(t *testing.T, s string) {
		name, err := canonical(s)
		if err != nil {
			return
		}
		if again, err := canonical(name); err != nil || again != name {
			t.Errorf("canonical(%q) = %q, of which it makes %q %v", s, name, again, err)
		}
		if !strings.EqualFold(name, strings.TrimSuffix(s, ".")) || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-.") != "" {
			t.Errorf("canonical(%q) = %q", s, name)
		}
		if _, err := netip.ParseAddr(name); err == nil {
			t.Errorf("canonical(%q) = %q, an address", s, name)
		}
	})
}

func TestConfig(t *testing.T) {
	t.Parallel()
	for _, c := range []Config{{Names: -1}, {Conns: -1}, {Idle: -time.Second}, {Never: []netip.AddrPort{{}}}} {
		if _, err := New(c); err == nil {
			t.Errorf("New(%+v): got no error", c)
		}
	}
}

// TestVirtualAddresses: each name has one of its own, and keeps it; the cap
// holds over all steps of a job.
func TestVirtualAddresses(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	g, err := New(Config{Names: 3})
	if err != nil {
		t.Fatal(err)
	}
	open := func(name, parent string, rules ...egress.Rule) error {
		return g.Open(ctx, name, egress.Opening{Rules: egress.Rules{Allow: rules}, Ledger: discard, Parent: parent})
	}
	if err := open("job", "", rule("a.example", 1), rule("b.example", 1), rule("a.example", 2)); err != nil {
		t.Fatal(err)
	}
	b := g.scopes["job"].box
	a1, _, _ := b.answer("a.example")
	b1, _, _ := b.answer("b.example")
	if a1 == b1 || !egress.Virtual.Contains(a1) || !egress.Virtual.Contains(b1) {
		t.Errorf("virtual addresses: got %v and %v, want two of %v", a1, b1, egress.Virtual)
	}
	for range 3 { // steps one after the other, with the same name
		if err := open("step", "job", rule("c.example", 1)); err != nil {
			t.Fatal(err)
		}
		if err := g.Close(ctx, "step"); err != nil {
			t.Fatal(err)
		}
	}
	if err := open("step", "job", rule("d.example", 1)); !errors.Is(err, egress.ErrBadRules) {
		t.Errorf("a fourth name: got %v, want ErrBadRules", err)
	}
	if err := open("step", "job", rule("a.example", 1)); err != nil {
		t.Errorf("the same rule again: %v", err)
	}
	contrary := rule("a.example", 1)
	contrary.Protocol = egress.TLS
	if err := open("step-2", "job", contrary); !errors.Is(err, egress.ErrBadRules) {
		t.Errorf("a rule that contradicts the job's: got %v, want ErrBadRules", err)
	}
	if err := open("step-2", "step"); err == nil {
		t.Error("a parent without a box: got no error")
	}
	last := virtualAddress(virtualAddresses)
	if !egress.Virtual.Contains(last) || egress.Virtual.Contains(last.Next()) {
		t.Errorf("the last virtual address is %v, want that of %v", last, egress.Virtual)
	}
}

// TestLiteral: a rule for an address is refused, and says what to write.
func TestLiteral(t *testing.T) {
	t.Parallel()
	err := validate(egress.Opening{Rules: egress.Rules{Allow: []egress.Rule{rule("192.0.2.9", 22)}}})
	if !errors.Is(err, egress.ErrBadRules) || !strings.Contains(err.Error(), "resolve: [192.0.2.9]") || !strings.Contains(err.Error(), "policy:1") {
		t.Errorf("rule for an address: got %v, want ErrBadRules with the rule and a hint", err)
	}
}
