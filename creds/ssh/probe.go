package ssh

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/mayfly-ci/mayfly/creds"
)

// loginTimeout bounds one login, which takes a tenth of a second, and several on a
// server that is busy; twinLife is the life of a certificate that never leaves the agent. Set 2026-11-24.
const (
	loginTimeout = 30 * time.Second
	twinLife     = time.Minute
)

// login is creds.ErrStillValid if the server lets the certificate in, and nil,
// with the refusal, if it refuses to. It opens no session.
func (i *Issuer) login(ctx context.Context, user string, signer ssh.Signer) (refusal string, err error) {
	known, err := knownhosts.New(i.config.KnownHosts)
	if err != nil {
		return "", fmt.Errorf("known_hosts: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, loginTimeout)
	defer cancel()
	conn, err := i.config.Dial(ctx, "tcp", i.config.Address)
	if err != nil {
		return "", fmt.Errorf("login: %w", err)
	}
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() }) // the handshake knows no context
	defer stop()
	c, channels, requests, err := ssh.NewClientConn(conn, i.config.Address, &ssh.ClientConfig{
		User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: known,
	})
	switch {
	case err == nil:
		var ends sync.WaitGroup // with the connection
		ends.Go(func() { ssh.DiscardRequests(requests) })
		ends.Go(func() {
			for ch := range channels {
				_ = ch.Reject(ssh.Prohibited, "none")
			}
		})
		_ = c.Close() // it has said what was asked
		ends.Wait()
		return "", creds.ErrStillValid
	case ctx.Err() != nil:
		return "", fmt.Errorf("login: %w", context.Cause(ctx))
	case strings.Contains(err.Error(), "unable to authenticate"):
		// The server has proved its key and said no to this one.
		return line(err.Error()), nil
	}
	return "", fmt.Errorf("login: %w", err)
}

// Probe implements creds.Issuer. Without a handle it tries a certificate of the
// same serial for another key, which the list revokes as well.
func (i *Issuer) Probe(ctx context.Context, name string, sealed []byte) (creds.Proof, error) {
	how, refusal, err := i.probe(ctx, name, sealed)
	if err != nil {
		return creds.Proof{}, fmt.Errorf("probe lease %s: %w", name, err)
	}
	return creds.Proof{At: i.config.Now(), How: how, Refusal: refusal}, nil
}

func (i *Issuer) probe(ctx context.Context, name string, sealed []byte) (how, refusal string, _ error) {
	if err := checkName(name); err != nil {
		return "", "", err
	}
	p, user, what, err := i.suspect(name, sealed)
	if err != nil {
		return "", "", err
	}
	// One that was never revoked gets in right behind it, or the refusal says
	// nothing of this one.
	now := i.config.Now()
	control, err := i.sign(i.serial("control "+name), "mayfly "+i.config.Owner+" control of "+name, scopeOf(p.cert), now, now.Add(twinLife))
	if err != nil {
		return "", "", err
	}
	if refusal, err = i.login(ctx, user, p.signer); err != nil {
		return "", "", err
	}
	no, err := i.login(ctx, user, control.signer)
	switch {
	case err == nil:
		return "", "", fmt.Errorf("the server at %s refuses every certificate, so that it proves nothing of this one: can it read its RevokedKeys? %s", i.config.Address, no)
	case !errors.Is(err, creds.ErrStillValid):
		return "", "", err
	}
	return fmt.Sprintf("login as %s at %s with %s (serial %d), and with one that is not revoked, which got in", user, i.config.Address, what, p.cert.Serial), refusal, nil
}

// suspect is what must be refused.
func (i *Issuer) suspect(name string, sealed []byte) (p pair, user, what string, _ error) {
	if sealed == nil {
		scope := Scope{Principals: i.config.Principals[:1]}
		if user = i.config.User; user == "" {
			user = scope.Principals[0]
		}
		now := i.config.Now()
		p, err := i.sign(i.serial(name), "mayfly "+i.config.Owner+" twin of "+name, scope, now, now.Add(twinLife))
		return p, user, "another certificate of its serial, for its own key is not known", err
	}
	h, err := openHandle(sealed)
	if err != nil {
		return pair{}, "", "", err
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(h.Cert))
	cert, ok := key.(*ssh.Certificate)
	if err != nil || !ok {
		return pair{}, "", "", errors.New("handle: no certificate in it")
	}
	p, err = open(h.Key, cert)
	return p, h.User, "its key and certificate", err
}

// scopeOf is what a certificate may.
func scopeOf(c *ssh.Certificate) Scope {
	s := Scope{Principals: c.ValidPrincipals, Command: c.CriticalOptions["force-command"]}
	if sources := c.CriticalOptions["source-address"]; sources != "" {
		s.Sources = strings.Split(sources, ",")
	}
	return s
}
