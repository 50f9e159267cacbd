// Package ssh issues user certificates of OpenSSH that live no longer than a job.
//
// A lease is a fresh key and a certificate for it, signed by an authority whose
// key the agent has (ssh-keygen(1), CERTIFICATES): for the principals that the
// policy names, with the command and the source addresses that it names, with no
// extension that it does not name, and valid until the lease ends. Its serial
// number follows from the name of the lease, so that the name is enough to revoke
// it: the serial goes into a key revocation list, which is published to where
// servers read theirs (RevokedKeys of sshd_config). It is dead when a server that
// took it when it was new refuses it, and takes at the same moment another
// certificate of the same authority: so it is not the server that is broken.
//
// What it cannot do: a session that is open goes on; give it a command that ends.
// A server that has not got the list yet accepts the certificate until it has, or
// until it expires.
package ssh

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/mayfly-ci/mayfly/creds"
)

const maxNameBytes = 40 // the contract's

// DefaultLongest is how long a certificate may be valid, and so for how long its
// serial stays in the list.
const DefaultLongest = 24 * time.Hour

// A Store keeps what is revoked, over the lives of the agent.
type Store interface {
	Load() ([]byte, error) // nil if nothing was saved
	Save([]byte) error     // replaces it; on disk when it returns
}

// A Config says who signs, for whom, and how the servers hear of a revocation.
type Config struct {
	// CA gives the key of the authority, in PEM without a passphrase. It is for
	// this installation alone: the list names what this installation revoked.
	CA func() (creds.Secret, error)

	Principals []string // all that leases may have
	Extensions []string // all that leases may have, as permit-pty

	// Address is HOST:PORT of a server that trusts the authority, and KnownHosts
	// the file with its key. There each certificate is tried.
	Address    string
	KnownHosts string
	User       string // of the tries; "" is the first principal of the lease

	// Dial is the agent's way out; nil dials directly.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)

	// List is the file that is written, "" is none; Publish a command that gets
	// the list on its standard input, without a shell, none if it is empty.
	List    string
	Publish []string

	Longest time.Duration // 0 is DefaultLongest

	Owner string             // installation id
	Store Store              // what is revoked
	Trace func(point string) // called between outside effects; nil is none
	Now   func() time.Time   // clock of the agent; nil is time.Now
}

// Validate reports everything that is wrong with c, by the names of the file.
func (c Config) Validate() error {
	var errs []error
	wrong := func(bad bool, format string, args ...any) {
		if bad {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	wrong(c.CA == nil, "ca_private_key_file: missing; ssh-keygen -t ed25519 makes one")
	wrong(len(c.Principals) == 0, "principals: missing; name those that leases may have")
	for _, p := range c.Principals {
		wrong(!word(p), "principals: %q: want a name", p)
	}
	for _, e := range c.Extensions {
		wrong(!slices.Contains(extensions(), e), "extensions: %q: want some of %s", e, strings.Join(extensions(), ", "))
	}
	_, _, err := net.SplitHostPort(c.Address)
	wrong(err != nil, "address %q: want HOST:PORT of a server that trusts the authority", c.Address)
	wrong(c.KnownHosts == "", "known_hosts: missing; it has the key of the server at address")
	wrong(c.User != "" && !word(c.User), "user %q: want a name", c.User)
	wrong(c.List == "" && len(c.Publish) == 0, "krl_file: missing, and publish too: no server would hear of a revocation")
	wrong(len(c.Publish) > 0 && !filepath.IsAbs(c.Publish[0]), "publish: %q: want the absolute path of a program, and its arguments", c.Publish)
	wrong(c.Longest < time.Minute, "longest %v: want a minute or more", c.Longest)
	wrong(!word(c.Owner), "owner %q: want the installation's id", c.Owner)
	wrong(c.Store == nil, "store: missing")
	return errors.Join(errs...)
}

// word is what needs no quoting in a list of principals or a log.
func word(s string) bool {
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r > '~' || strings.ContainsRune(`,"'\*?`, r) })
}

// extensions are those of OpenSSH's PROTOCOL.certkeys.
func extensions() []string {
	return []string{"permit-X11-forwarding", "permit-agent-forwarding", "permit-port-forwarding", "permit-pty", "permit-user-rc"}
}

// An Issuer signs certificates of one authority. It may be used by several
// goroutines at once.
type Issuer struct {
	config Config

	mu    sync.Mutex
	names map[string]bool // issued by this life and not revoked

	listing sync.Mutex // one list at a time
}

// New checks c and returns an issuer. It reads no key and asks no server.
func New(c Config) (*Issuer, error) {
	if c.Trace == nil {
		c.Trace = func(string) {}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Dial == nil {
		c.Dial = (&net.Dialer{}).DialContext
	}
	if c.Longest == 0 {
		c.Longest = DefaultLongest
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return &Issuer{config: c, names: map[string]bool{}}, nil
}

// Close does nothing.
func (i *Issuer) Close() {}

// Authority is the line for TrustedUserCAKeys.
func (i *Issuer) Authority() (string, error) {
	ca, err := i.authority()
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(ca.PublicKey()))), nil
}

func (i *Issuer) authority() (ssh.Signer, error) {
	secret, err := i.config.CA()
	if err != nil {
		return nil, fmt.Errorf("ca_private_key_file: %w", err)
	}
	// Its errors are about the form, and hold none of the key.
	ca, err := ssh.ParsePrivateKey([]byte(secret.Reveal() + "\n"))
	if err != nil {
		return nil, fmt.Errorf("ca_private_key_file: not a private key without a passphrase: %w", err)
	}
	return ca, nil
}

// serial follows from the installation and the name. Zero stands for any.
func (i *Issuer) serial(name string) uint64 {
	sum := sha256.Sum256([]byte(i.config.Owner + "\x00" + name))
	return max(binary.BigEndian.Uint64(sum[:]), 1)
}

// A Scope is what a lease of the policy asks for.
type Scope struct {
	Principals []string `json:"principals"`           // of the configuration's
	Command    string   `json:"command,omitempty"`    // force-command: what runs, whatever the job asks for
	Sources    []string `json:"sources,omitempty"`    // addresses or networks that it may come from
	Extensions []string `json:"extensions,omitempty"` // of the configuration's; none are none
}

// CheckScope implements creds.ScopeChecker. It asks no server.
func (i *Issuer) CheckScope(scope json.RawMessage) error {
	_, err := i.parseScope(scope)
	return err
}

func (i *Issuer) parseScope(text json.RawMessage) (Scope, error) {
	var s Scope
	if len(text) == 0 {
		text = json.RawMessage("{}")
	}
	d := json.NewDecoder(strings.NewReader(string(text)))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return s, fmt.Errorf("%w: %w", creds.ErrBadScope, err)
	}
	bad := ""
	switch {
	case d.More():
		bad = "more than one value"
	case len(s.Principals) == 0:
		bad = "names no principals, which some servers take for all"
	case strings.ContainsAny(s.Command, "\x00\n"):
		bad = "command: want one line"
	}
	for _, p := range s.Principals {
		if !slices.Contains(i.config.Principals, p) {
			bad = fmt.Sprintf("principal %q is not among those of the configuration", p)
		}
	}
	for _, e := range s.Extensions {
		if !slices.Contains(i.config.Extensions, e) {
			bad = fmt.Sprintf("extension %q is not among those of the configuration", e)
		}
	}
	for _, a := range s.Sources {
		_, errNet := netip.ParsePrefix(a)
		if _, err := netip.ParseAddr(a); err != nil && errNet != nil {
			bad = fmt.Sprintf("source %q: want an address or a network", a)
		}
	}
	if bad != "" {
		return s, fmt.Errorf("%w: %s", creds.ErrBadScope, bad)
	}
	return s, nil
}

func checkName(name string) error {
	if name == "" || len(name) > maxNameBytes || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return fmt.Errorf("lease name %q: want 1 to %d bytes of a-z, 0-9 and -", name, maxNameBytes)
	}
	return nil
}

// List implements creds.Issuer: there is no list of what was signed. A name is
// enough to revoke, so that the journal covers all of it.
func (i *Issuer) List(context.Context) ([]creds.Info, error) {
	return nil, fmt.Errorf("list leases: %w: an authority keeps no list of certificates", errors.ErrUnsupported)
}

// blob is an authority's public key, for entries of the list.
func blob(key ssh.PublicKey) string { return base64.StdEncoding.EncodeToString(key.Marshal()) }

var (
	_ creds.Issuer       = (*Issuer)(nil)
	_ creds.ScopeChecker = (*Issuer)(nil)
)
