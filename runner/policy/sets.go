package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	sets "github.com/mayfly-ci/mayfly/configs/egress"
	"github.com/mayfly-ci/mayfly/configs/strict"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// setName is a set of rules that comes with the agent.
type setName string

func (s *setName) UnmarshalText(b []byte) error {
	if !slices.Contains(sets.Names(), string(b)) {
		return fmt.Errorf("unknown set %q (known: %s)", b, strings.Join(sets.Names(), ", "))
	}
	*s = setName(b)
	return nil
}

// setFile is a file of configs/egress.
type setFile struct {
	Egress []egressNode `yaml:"egress,required"`
}

// A placed is a way out and where the policy says so.
type placed struct {
	Egress
	at strict.Node
}

// expand is what an entry of the list opens: itself, or what is in its set.
func (e egressNode) expand() ([]placed, error) {
	if err := e.check(); err != nil {
		return nil, err
	}
	if e.Set == "" {
		one, err := e.egress()
		return []placed{{one, e.Self}}, err
	}
	src, file := sets.Set(string(e.Set))
	root, err := strict.Parse(src, file)
	if err != nil {
		return nil, err
	}
	var f setFile
	if err := root.Decode(&f); err != nil {
		return nil, err
	}
	var all []placed
	for _, n := range f.Egress {
		if n.Set != "" || n.Step != "" || n.Service != "" || n.When != "" {
			return nil, n.Self.Errorf("a set names no set, step or service, and has no condition")
		}
		if err := n.check(); err != nil {
			return nil, err
		}
		one, err := n.egress()
		if err != nil {
			return nil, err
		}
		one.Step, one.Service = string(e.Step), string(e.Service)
		one.Rule.ID = at(e.Self) + " " + one.Rule.ID
		if e.Purpose != "" {
			one.Rule.Purpose = string(e.Purpose)
		}
		all = append(all, placed{one, e.Self})
	}
	return all, nil
}

// check refuses what does not stand alone.
func (e egressNode) check() error {
	if e.Service != "" && e.Step != "" {
		return e.Self.At("service").Errorf("a service runs beside all steps: name a step or a service")
	}
	var errs []error
	if e.Set != "" {
		for _, key := range []string{"name", "port", "protocol", "resolve", "requests", "ca"} {
			if !e.Self.Get(key).IsZero() {
				errs = append(errs, e.Self.At(key).Errorf("set %s says this itself: write a rule of your own beside it", e.Set))
			}
		}
		return strict.Join(errs...)
	}
	if e.Self.Get("set").IsZero() {
		for _, key := range []string{"name", "port", "protocol"} {
			if e.Self.Get(key).IsZero() {
				errs = append(errs, e.Self.Errorf("key %q is missing", key))
			}
		}
	}
	return strict.Join(append(errs, e.checkHTTP(), e.checkLogin(), e.checkResolve())...)
}

func (e egressNode) checkHTTP() error {
	var errs []error
	if e.Requests != nil && len(*e.Requests) == 0 {
		errs = append(errs, e.Self.At("requests").Errorf("empty list: name requests, or remove the key to allow any"))
	}
	if e.Protocol == "" {
		return strict.Join(errs...) // it was refused already
	}
	if e.Requests != nil && e.Protocol != protocol(egress.HTTP) && e.Protocol != protocol(egress.HTTPS) {
		errs = append(errs, e.Self.At("requests").Errorf("protocol %s: its requests are not seen: write protocol: https, or http", e.Protocol))
	}
	if e.CA != "" && e.Protocol != protocol(egress.HTTPS) {
		errs = append(errs, e.Self.At("ca").Errorf("protocol %s: certificates are looked at with protocol: https", e.Protocol))
	}
	return strict.Join(errs...)
}

func (e egressNode) checkResolve() error {
	if e.Resolve != nil && len(*e.Resolve) == 0 {
		return e.Self.At("resolve").Errorf("empty list: name addresses, or remove the key to allow any public one")
	}
	if _, err := netip.ParseAddr(string(e.Name)); err != nil {
		return nil
	}
	var errs []error
	if e.Protocol != "" && e.Protocol != protocol(egress.TCP) {
		errs = append(errs, e.Self.At("protocol").Errorf("protocol %s checks a name, and %s is an address: write tcp", e.Protocol, e.Name))
	}
	if e.Resolve != nil {
		errs = append(errs, e.Self.At("resolve").Errorf("%s is an address: remove resolve", e.Name))
	}
	return strict.Join(errs...)
}

// contradictions refuses two rules for one port of a name that a step could see
// both of. Those that narrow requests add up, and so do those with credentials.
func contradictions(all []placed) error {
	var errs []error
	for i, p := range all {
		for _, q := range all[:i] {
			a, b := p.Rule, q.Rule
			together := p.Step == q.Step || p.Step == "" || q.Step == ""
			if a.Name != b.Name || a.Port != b.Port || a.Name == "" || a.Port == 0 || p.Service != q.Service || !together {
				continue
			}
			if a.Protocol == b.Protocol && slices.Equal(a.Resolve, b.Resolve) && a.CA == b.CA && (len(a.Requests) > 0 && len(b.Requests) > 0 || a.Inject != nil && b.Inject != nil) {
				continue
			}
			what := fmt.Sprintf("%s port %d", a.Name, a.Port)
			if p.Service != "" {
				what += " of service " + p.Service
			}
			errs = append(errs, p.at.Errorf("%s is already given in line %d", what, q.at.Pos().Line))
			break
		}
	}
	return strict.Join(errs...)
}
