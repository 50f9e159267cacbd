package gateway

import (
	"crypto/tls"
	"crypto/x509"
	"sync"
)

// trusts are what a box's connections to destinations chain to, by the rules' CA:
// a pool is made once, and a session that was verified by one CA is resumed under
// that CA only.
type trusts struct {
	mu sync.Mutex
	of map[string]*trust
}

type trust struct {
	roots    *x509.CertPool // nil: what the machine trusts
	sessions tls.ClientSessionCache
}

// under is the trust of a rule. roots are for one that names no CA.
func (t *trusts) under(ca string, roots *x509.CertPool) *trust {
	t.mu.Lock()
	defer t.mu.Unlock()
	if have := t.of[ca]; have != nil {
		return have
	}
	made := &trust{roots, tls.NewLRUClientSessionCache(resumed)}
	if ca != "" {
		made.roots = x509.NewCertPool()
		made.roots.AppendCertsFromPEM([]byte(ca)) // Open has looked
	}
	if t.of == nil {
		t.of = make(map[string]*trust)
	}
	t.of[ca] = made
	return made
}
