package policy

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"github.com/mayfly-ci/mayfly/configs/strict"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// imageScope is a scope of a registry's token, in which {repository} and the like
// stand for facts of the job.
type imageScope string

func (s *imageScope) UnmarshalText(b []byte) error {
	*s = imageScope(b)
	_, err := pathPattern(b).fill(func(string) (string, error) { return "x", nil })
	return err
}

// registry is the rest of an entry that is for a registry of images: its realm,
// which is a way out of its own, with what both have in common.
func (n brokerNode) registry(b Broker, l leaseNode) (registry, realm Broker, way placed, err error) {
	w := n.With
	tokens := egress.Tokens{Realm: string(w.Realm), Service: string(w.Service), Scopes: texts(w.Scopes)}
	sample := tokens
	sample.Scopes = nil
	for _, s := range tokens.Scopes {
		text, _ := pathPattern(s).fill(func(string) (string, error) { return "x", nil }) // it was looked at
		sample.Scopes = append(sample.Scopes, text)
	}
	if err := sample.Check(); err != nil {
		return b, realm, way, n.With.Self.Errorf("%s", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	if n.Requests != nil {
		return b, realm, way, n.Self.At("requests").Errorf("as: oci-registry: the requests follow from the scopes; remove them")
	}
	at, number, _, _ := tokens.Endpoint() // checked above
	out := egressNode{Self: n.Self, Port: port(number), Protocol: protocol(egress.HTTPS), Resolve: w.Resolve, CA: w.CA, Step: l.Step, Purpose: n.Purpose}
	_, aerr := netip.ParseAddr(at)
	if err := out.Name.UnmarshalText([]byte(at)); err != nil || aerr == nil || strings.HasPrefix(at, "*") {
		return b, realm, way, n.With.Self.At("realm").Errorf("a credential is for one name, and %q is none", at)
	}
	if out.Name == n.Name && out.Port == n.Port {
		if w.Resolve != nil || w.CA != "" {
			return b, realm, way, n.With.Self.Errorf("the realm is at the registry's own name and port: remove resolve and ca from with")
		}
		out.Resolve, out.CA = n.Resolve, n.CA
	}
	e, err := out.egress()
	in := *b.Rule.Inject
	in.As, in.Tokens = egress.OCIToken, &tokens
	e.Rule.Inject, e.Rule.Requests = &in, tokens.Asking()
	realm = Broker{Rule: e.Rule, Value: b.Value, User: b.User}
	b.Rule.Inject.Pass, b.Rule.Inject.Tokens, b.User = true, &tokens, ""
	b.Rule.Requests = tokens.Using()
	return b, realm, placed{e, n.Self}, strict.Join(err, out.checkResolve())
}

// fillTokens gives scopes the job's own facts.
func fillTokens(t *egress.Tokens, j providers.Job) (*egress.Tokens, error) {
	if t == nil {
		return nil, nil
	}
	filled := *t
	filled.Scopes = nil
	var all []error
	for _, s := range t.Scopes {
		text, err := pathPattern(s).fill(func(name string) (string, error) { return safeFact(name, j) })
		filled.Scopes, all = append(filled.Scopes, text), append(all, err)
	}
	if err := errors.Join(append(all, filled.Check())...); err != nil {
		return nil, fmt.Errorf("%w: scope of a registry's token: %w", ErrDenied, err)
	}
	return &filled, nil
}
