package gateway

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// Protocols that are no HTTP and end here: the job's side of the connection asks
// for no credential, or for a placeholder, and the destination's side logs in
// with that of the lease.

// logins are what a box has for such protocols.
type logins struct {
	once sync.Once
	key  ssh.Signer // that SSH destinations show to the job
	err  error

	mu      sync.Mutex
	cancels map[cancelKey]bool // of the PostgreSQL sessions that the box has
}

// hostKey makes the key when it is first needed.
func (l *logins) hostKey() (ssh.Signer, error) {
	l.once.Do(func() {
		_, key, err := ed25519.GenerateKey(rand.Reader)
		if err == nil {
			l.key, err = ssh.NewSignerFromSigner(key)
		}
		l.err = err
	})
	if l.err != nil {
		return nil, fmt.Errorf("host key of the job: %w", l.err)
	}
	return l.key, nil
}

// HostKey implements egress.Host.
func (g *Gateway) HostKey(name string) ([]byte, error) {
	g.mu.Lock()
	s := g.scopes[name]
	g.mu.Unlock()
	if s == nil || !s.root() {
		return nil, fmt.Errorf("gateway %s: is not open, or has no box of its own", name)
	}
	key, err := s.box.logins.hostKey()
	if err != nil {
		return nil, fmt.Errorf("gateway %s: %w", name, err)
	}
	line := ssh.MarshalAuthorizedKey(key.PublicKey())
	return line[:len(line)-1], nil
}

// logs reports a protocol whose rules log in.
func logs(p egress.Protocol) bool { return p == egress.SSH || p == egress.Postgres }

// validateLogin refuses a login that could not be made, or to somebody else.
func validateLogin(r egress.Rule) error {
	as := egress.SSHKey
	if r.Protocol == egress.Postgres {
		as = egress.Password
	}
	switch {
	case (r.Session != nil) != (r.Protocol == egress.SSH):
		return fmt.Errorf("protocol %s: ssh, and nothing else, says what its sessions are for", r.Protocol)
	case r.Inject == nil || r.Inject.As != as || r.Inject.Value.IsZero():
		return fmt.Errorf("protocol %s: the gateway logs in with a credential of a lease (%s); a job that has its own needs protocol: tcp", r.Protocol, as)
	case strings.HasPrefix(r.Name, "*"):
		return fmt.Errorf("name %s: a credential is for one name; what is below it may be anybody's", r.Name)
	}
	if err := r.Inject.Check(); err != nil {
		return err
	}
	if r.Session == nil {
		return nil
	}
	if err := r.Session.Check(); err != nil {
		return err
	}
	if _, err := hostKeys(r.Session.HostKeys); err != nil {
		return err
	}
	_, err := clientKey(r.Inject.Value)
	return err
}

// hostKeys reads lines of authorized_keys.
func hostKeys(lines []string) ([]ssh.PublicKey, error) {
	var all []ssh.PublicKey
	for _, l := range lines {
		key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(l))
		if err != nil {
			return nil, fmt.Errorf("host key %s: %w", printable(l), err)
		}
		all = append(all, key)
	}
	return all, nil
}

// clientKey reads a private key and the certificate behind it, if there is one.
// Its errors say nothing of the key.
func clientKey(secret creds.Secret) (ssh.Signer, error) {
	text := secret.Reveal()
	_, rest := pem.Decode([]byte(text))
	key, err := ssh.ParsePrivateKey([]byte(text))
	if err != nil {
		return nil, errors.New("the credential is no private key as PEM, or has a passphrase")
	}
	if strings.TrimSpace(string(rest)) == "" {
		return key, nil
	}
	public, _, _, _, err := ssh.ParseAuthorizedKey(rest)
	cert, ok := public.(*ssh.Certificate)
	if err != nil || !ok {
		return nil, errors.New("behind the private key is something that is no OpenSSH certificate")
	}
	signer, err := ssh.NewCertSigner(cert, key)
	if err != nil {
		return nil, errors.New("the certificate is not for the private key before it")
	}
	return signer, nil
}

// open writes the line of a login that is about to be made, and returns the
// function that writes its last one.
func (c *session) open(line egress.Line, g grant) (func(end egress.Line, err error), error) {
	line.Verdict = egress.Allowed
	if err := g.scope.book.line(line); err != nil {
		return nil, err
	}
	return func(end egress.Line, err error) {
		end.Verdict, end.Duration = egress.Ended, time.Since(end.Time)
		if err != nil {
			end.Reason = err.Error()
		}
		_ = g.scope.book.line(end) // nothing is left to refuse; Close tells of it
	}, nil
}
