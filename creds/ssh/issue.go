package ssh

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mayfly-ci/mayfly/creds"
)

// clockSkew is how much earlier than now a certificate begins: servers refuse one
// of the future. Set 2026-11-24.
const clockSkew = time.Minute

// A handle is what Probe needs.
type handle struct {
	Key     string    `json:"key"` // in PEM
	Cert    string    `json:"cert"`
	User    string    `json:"user"`
	Expires time.Time `json:"expires"`
}

// A pair is a key and its certificate.
type pair struct {
	key    string // in PEM
	cert   *ssh.Certificate
	signer ssh.Signer
}

// Issue implements creds.Issuer. It logs in with the certificate once: only then
// is a later refusal a proof.
func (i *Issuer) Issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	l, err := i.issue(ctx, name, g)
	if err != nil {
		return creds.Lease{Handle: l.Handle}, fmt.Errorf("lease %s: %w", name, err)
	}
	return l, nil
}

func (i *Issuer) issue(ctx context.Context, name string, g creds.Grant) (creds.Lease, error) {
	if err := checkName(name); err != nil {
		return creds.Lease{}, err
	}
	scope, err := i.parseScope(g.Scope)
	if err != nil {
		return creds.Lease{}, err
	}
	now := i.config.Now()
	expires := g.Expires.UTC().Truncate(time.Second)
	if last := now.Add(i.config.Longest).UTC().Truncate(time.Second); last.Before(expires) {
		expires = last
	}
	if !expires.After(now) {
		return creds.Lease{}, fmt.Errorf("grant ends at %s, which is over", expires.Format(time.RFC3339))
	}
	if err := i.take(name); err != nil {
		return creds.Lease{}, err
	}
	s := g.Subject
	id := strings.Join([]string{"mayfly", i.config.Owner, name, s.Repository, s.Ref, s.SHA, s.Job, s.Step}, " ")
	p, err := i.sign(i.serial(name), id, scope, now, expires)
	if err != nil {
		return creds.Lease{}, err
	}
	i.config.Trace("ssh.signed")
	user := i.config.User
	if user == "" {
		user = scope.Principals[0]
	}
	cert := strings.TrimSpace(string(ssh.MarshalAuthorizedKey(p.cert)))
	h, err := json.Marshal(handle{p.key, cert, user, expires})
	if err != nil {
		return creds.Lease{}, err
	}
	lease := creds.Lease{Handle: h}
	switch refusal, err := i.login(ctx, user, p.signer); {
	case err == nil:
		return lease, fmt.Errorf("the server at %s refuses the new certificate of %s: see its TrustedUserCAKeys, the principal, and sources: %s", i.config.Address, user, refusal)
	case !errors.Is(err, creds.ErrStillValid):
		return lease, err
	}
	lease.Values = map[string]creds.Secret{
		"private_key": creds.NewSecret(p.key),
		"identity":    creds.NewSecret(p.key + cert + "\n"), // for the gateway, which logs in with one value
	}
	lease.Facts = map[string]string{
		"certificate": cert, "username": user, "principals": strings.Join(scope.Principals, ","),
		"serial": strconv.FormatUint(p.cert.Serial, 10), "key_id": p.cert.KeyId,
	}
	lease.ByName, lease.ExpiresAt = true, expires
	return lease, nil
}

// take keeps a name from being issued twice by one life of the agent; the agent
// gives no name again in another.
func (i *Issuer) take(name string) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.names[name] {
		return errors.New("issued already")
	}
	i.names[name] = true
	return nil
}

// sign makes a key and a certificate for it.
func (i *Issuer) sign(serial uint64, id string, scope Scope, from, until time.Time) (pair, error) {
	ca, err := i.authority()
	if err != nil {
		return pair{}, err
	}
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return pair{}, err
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		return pair{}, err
	}
	cert := &ssh.Certificate{
		Key: key, Serial: serial, CertType: ssh.UserCert, KeyId: line(id), ValidPrincipals: scope.Principals,
		ValidAfter: uint64(from.Add(-clockSkew).Unix()), ValidBefore: uint64(until.Unix()),
		Permissions: ssh.Permissions{CriticalOptions: map[string]string{}, Extensions: map[string]string{}},
	}
	if scope.Command != "" {
		cert.CriticalOptions["force-command"] = scope.Command
	}
	if len(scope.Sources) > 0 {
		cert.CriticalOptions["source-address"] = strings.Join(scope.Sources, ",")
	}
	for _, e := range scope.Extensions {
		cert.Extensions[e] = ""
	}
	if err := cert.SignCert(rand.Reader, ca); err != nil {
		return pair{}, fmt.Errorf("certificate: %w", err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		return pair{}, err
	}
	return open(string(pem.EncodeToMemory(block)), cert)
}

// open makes a signer of a key and its certificate.
func open(key string, cert *ssh.Certificate) (pair, error) {
	plain, err := ssh.ParsePrivateKey([]byte(key))
	if err != nil {
		return pair{}, errors.New("key: not one of this issuer") // its text is a secret
	}
	signer, err := ssh.NewCertSigner(cert, plain)
	if err != nil {
		return pair{}, fmt.Errorf("certificate: %w", err)
	}
	return pair{key, cert, signer}, nil
}

// line is one of a server's log: facts of a job come from outside.
func line(text string) string {
	return strings.Join(strings.Fields(strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, text)), " ")
}
