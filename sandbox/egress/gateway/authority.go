package gateway

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// defaultLife is how long an authority is valid whose box has no known end.
const defaultLife = 24 * time.Hour

// An authority signs for the destinations of one box. What signs is an
// intermediate under a root whose key nobody has any more: what the box trusts
// can sign nothing else. It is limited to the names of the rules, which not all
// clients look at; the gateway, which checks each name, does not rely on it.
type authority struct {
	names   []string // that it may sign for, wildcards without their star
	expires time.Time

	once sync.Once
	err  error
	root []byte // PEM
	ca   *x509.Certificate
	key  *ecdsa.PrivateKey

	mu     sync.Mutex
	leaves map[string]*tls.Config
}

// newAuthority is what an opening needs, nil if it needs none. Nothing is made
// before it is asked for.
func newAuthority(o egress.Opening) (*authority, error) {
	var names []string
	for _, r := range o.Rules.Allow {
		if certified(r.Protocol) {
			names = append(names, constraint(r.Name))
		}
	}
	for _, n := range o.Terminate {
		if err := validateName(n); err != nil {
			return nil, fmt.Errorf("%w: terminate: %w", egress.ErrBadRules, err)
		}
		names = append(names, constraint(n))
	}
	if len(names) == 0 {
		return nil, nil
	}
	slices.Sort(names)
	expires := o.Expires
	if expires.IsZero() {
		expires = time.Now().Add(defaultLife)
	}
	return &authority{names: slices.Compact(names), expires: expires, leaves: make(map[string]*tls.Config)}, nil
}

// certified reports a protocol whose TLS ends at the gateway.
func certified(p egress.Protocol) bool { return p == egress.HTTPS || p == egress.Postgres }

// constraint is what a name is limited to (RFC 5280 section 4.2.1.10, which
// cannot say "one label").
func constraint(name string) string { return strings.TrimPrefix(name, "*.") }

// covers says whether the authority was made for a name of a rule.
func (a *authority) covers(name string) bool {
	return a != nil && slices.Contains(a.names, constraint(name))
}

// ready makes the authority.
func (a *authority) ready() error {
	a.once.Do(func() { a.err = a.make() })
	if a.err != nil {
		return fmt.Errorf("authority of the job: %w", a.err)
	}
	return nil
}

func (a *authority) make() error {
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	root := a.template("Mayfly, root of one job", 1)
	der, err := x509.CreateCertificate(rand.Reader, root, root, rootKey.Public(), rootKey)
	if err != nil {
		return err
	}
	a.root = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	if root, err = x509.ParseCertificate(der); err != nil {
		return err
	}
	der, err = x509.CreateCertificate(rand.Reader, a.template("Mayfly, gateway of one job", 0), root, a.key.Public(), rootKey)
	if err != nil {
		return err
	}
	a.ca, err = x509.ParseCertificate(der)
	return err
}

// template is a certificate that signs others, depth of them below it.
func (a *authority) template(name string, depth int) *x509.Certificate {
	return &x509.Certificate{
		Subject:   pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Minute), // it has seconds, and they are cut off
		NotAfter:  a.expires,
		IsCA:      true, BasicConstraintsValid: true, MaxPathLen: depth, MaxPathLenZero: depth == 0,
		KeyUsage:                    x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage:                 []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		PermittedDNSDomainsCritical: true,
		PermittedDNSDomains:         a.names,
		ExcludedIPRanges: []*net.IPNet{
			{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
			{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)},
		},
	}
}

// config is how the gateway shows itself to the job as the owner of name. The
// caller has checked that a rule has the name.
func (a *authority) config(name string) (*tls.Config, error) {
	if a == nil {
		return nil, errors.New("authority of the job: there is none")
	}
	if err := a.ready(); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if c := a.leaves[name]; c != nil {
		return c, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	leaf := &x509.Certificate{
		DNSNames:  []string{name},
		NotBefore: a.ca.NotBefore, NotAfter: a.expires,
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, a.ca, key.Public(), a.key)
	if err != nil {
		return nil, fmt.Errorf("certificate for %s: %w", name, err)
	}
	c := &tls.Config{
		MinVersion:   tls.VersionTLS12,
		Certificates: []tls.Certificate{{Certificate: [][]byte{der, a.ca.Raw}, PrivateKey: key}},
		NextProtos:   []string{"h2", "http/1.1"},
	}
	a.leaves[name] = c
	return c, nil
}

// Authority implements egress.Terminator.
func (g *Gateway) Authority(name string) ([]byte, error) {
	g.mu.Lock()
	s := g.scopes[name]
	g.mu.Unlock()
	if s == nil || !s.root() {
		return nil, fmt.Errorf("gateway %s: is not open, or has no box of its own", name)
	}
	a := s.box.authority
	if a == nil {
		return nil, nil
	}
	if err := a.ready(); err != nil {
		return nil, fmt.Errorf("gateway %s: %w", name, err)
	}
	return slices.Clone(a.root), nil
}
