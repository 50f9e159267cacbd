package egress

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net/textproto"
	"slices"
	"strings"

	"github.com/mayfly-ci/mayfly/creds"
)

// A Place is where a credential stands in a request.
type Place string

// The places that a gateway can put a credential into.
const (
	Bearer Place = "bearer" // Authorization: Bearer (RFC 6750), or the scheme "token" if the job wrote that
	Basic  Place = "basic"  // the password of Authorization: Basic (RFC 7617), or its user
	Header Place = "header" // the whole of a named header
	Query  Place = "query"  // the value of a named key
	// SigV4 is the signature of AWS (Version 4), in the header or in the query:
	// what the job signed with placeholders is signed anew. See Signing.
	SigV4 Place = "aws-sigv4"
	// Certificate is in no request: the gateway proves itself to the destination
	// as the owner of Chain when a connection begins (RFC 8446 section 4.4.2),
	// with Value for a private key. The job speaks plain https, and its requests
	// pass as they are. A connection that was made so carries nothing else.
	Certificate Place = "client-certificate"
)

// A Signing is the rest of a key of AWS, whose secret part is the Value and the
// Placeholder of an Injection, and what may be signed with it.
type Signing struct {
	KeyID   creds.Secret `json:"-"`
	Session creds.Secret `json:"-"` // the session token; zero if the key has none
	// PlaceID and PlaceSession are what the job has in their place.
	PlaceID      string `json:"-"`
	PlaceSession string `json:"-"`
	// Regions and Services, as they stand in a signature, are those that are
	// signed for. Neither is empty. What a service answers passes: of sts and iam
	// that can be other credentials.
	Regions, Services []string
}

// An Injection puts a credential into the requests of an HTTPS rule for one
// name, or into the login of another (see SSHKey and Password). The job holds a placeholder in its place. What the answers say of the
// credential is hidden before the job sees them.
type Injection struct {
	Lease string // name of the lease that it belongs to, for the ledger
	As    Place
	Name  string `json:",omitempty"` // of the header or the key
	// User is that of Basic. Empty: what the job wrote, or DefaultUser.
	User string `json:",omitempty"`
	// Value is the credential: at least MinCredential bytes of printable ASCII
	// without blanks.
	Value creds.Secret `json:"-"`
	// Placeholder is replaced by Value where As says. It is worthless, unique,
	// and as long as MinPlaceholder. Everywhere else it is a tripwire: the
	// request is refused, whatever rule allows it, until the box is closed.
	Placeholder string `json:"-"`
	// Strip removes what the job sends of other credentials: in Authorization,
	// and in Name. Otherwise such a request is refused. Cookies, which would be
	// credentials of their own, are always removed, both ways.
	Strip bool `json:",omitempty"`
	// Pass lets a request without a credential pass as it is. Otherwise the
	// credential is added.
	Pass bool `json:",omitempty"`
	// Signing belongs to SigV4, and to nothing else.
	Signing *Signing `json:",omitempty"`
	// Tokens belongs to OCIToken and OCIRegistry, and to nothing else.
	Tokens *Tokens `json:",omitempty"`
	// Chain is the certificate of Certificate, and those that lead to its
	// authority, as PEM. Value is a PEM then, too.
	Chain string `json:",omitempty"`
	// Uses is how many requests, or logins, may have the credential: those of all
	// rules of an opening with the same Lease are counted together, and each that
	// was let through counts, whatever became of it. 0 is any number.
	Uses int `json:",omitempty"`
}

const (
	// DefaultUser is the user of Basic when nobody names one. Services that take
	// a token for a password do not look at it.
	DefaultUser = "x-access-token"
	// MinCredential is the least number of bytes that can be hidden in an answer
	// without spoiling it.
	MinCredential = 8
	// MinPlaceholder keeps a placeholder from being guessed, or met by chance.
	MinPlaceholder = 16
)

// Check says why the injection cannot be made as it is written. It looks at the
// credential if there is one, and says nothing of it.
func (in Injection) Check() error {
	if in.Uses < 0 {
		return fmt.Errorf("uses %d: a number of uses is 1 or more, 0 is any", in.Uses)
	}
	if in.As == SSHKey || in.As == Password {
		return in.checkLogin()
	}
	var all []error
	if in.Lease == "" {
		all = append(all, errors.New("a credential without a lease"))
	}
	named := in.As == Header || in.As == Query
	switch {
	case !slices.Contains([]Place{Bearer, Basic, Header, Query, SigV4, Certificate, OCIToken, OCIRegistry}, in.As):
		all = append(all, fmt.Errorf("as %q: bearer, basic, header, query, aws-sigv4, oci-registry or client-certificate is needed", in.As))
	case named && (in.Name == "" || strings.ContainsFunc(in.Name, func(c rune) bool { return !tokenChar(c) })):
		all = append(all, fmt.Errorf("name %q: the name of the %s is needed, of letters, digits, _ and -", in.Name, in.As))
	case !named && in.Name != "":
		all = append(all, fmt.Errorf("as %s has its place, and takes no name", in.As))
	case in.As == Certificate && (in.Strip || in.Pass), in.As != Certificate && in.Chain != "":
		all = append(all, errors.New("as client-certificate, and nothing else, has a chain; its requests pass as they are"))
	case in.As == Header && framing(in.Name):
		all = append(all, fmt.Errorf("header %s: it is the gateway's own, or has a meaning for HTTP; Authorization is as: bearer or basic", in.Name))
	}
	if in.As != Basic && in.As != OCIToken && in.User != "" || strings.ContainsFunc(in.User, func(c rune) bool { return c == ':' || unprintable(c) }) {
		all = append(all, errors.New("user: as basic and oci-registry alone have one, of printable ASCII without a colon"))
	}
	return errors.Join(append(all, in.checkSigning(), in.checkTokens(), in.checkValue())...)
}

func (in Injection) checkSigning() error {
	s := in.Signing
	switch {
	case s == nil && in.As != SigV4:
		return nil
	case s == nil || in.As != SigV4:
		return errors.New("as aws-sigv4, and nothing else, has a signing")
	case in.Strip:
		return errors.New("as aws-sigv4: what is signed with another key is refused, and cannot be stripped")
	case len(s.Regions) == 0 || len(s.Services) == 0:
		return errors.New("as aws-sigv4: the regions and services that may be signed for are needed")
	}
	for _, w := range append(s.Regions[:len(s.Regions):len(s.Regions)], s.Services...) {
		if w == "" || strings.ContainsFunc(w, func(c rune) bool { return !tokenChar(c) }) {
			return fmt.Errorf("as aws-sigv4: %q is no region or service", w)
		}
	}
	if in.Value.IsZero() {
		return nil
	}
	err := checkCredential(s.KeyID, s.PlaceID)
	if s.Session.IsZero() != (s.PlaceSession == "") {
		err = errors.Join(err, errors.New("a session token and its placeholder come together"))
	} else if !s.Session.IsZero() {
		err = errors.Join(err, checkCredential(s.Session, s.PlaceSession))
	}
	return err
}

func (in Injection) checkValue() error {
	if in.Value.IsZero() && in.Placeholder == "" {
		return nil // it is not issued yet
	}
	if in.As == Certificate {
		if _, err := tls.X509KeyPair([]byte(in.Chain), []byte(in.Value.Reveal())); err != nil {
			return errors.New("as client-certificate: a certificate and its private key are needed, as PEM")
		}
		return nil
	}
	return checkCredential(in.Value, in.Placeholder)
}

// checkCredential compares a credential with what stands in its place.
func checkCredential(secret creds.Secret, placeholder string) error {
	value := secret.Reveal()
	switch {
	case len(value) < MinCredential:
		return fmt.Errorf("the credential has under %d bytes, and could not be hidden in answers", MinCredential)
	case strings.ContainsFunc(value, unprintable):
		return errors.New("the credential has blanks, control characters, or is not ASCII: no header carries it")
	case len(placeholder) < MinPlaceholder || strings.ContainsFunc(placeholder, unprintable):
		return fmt.Errorf("the placeholder has under %d bytes, or some that are not printable ASCII", MinPlaceholder)
	case strings.Contains(value, placeholder) || strings.Contains(placeholder, value):
		return errors.New("the placeholder is the credential")
	}
	return nil
}

func tokenChar(c rune) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_'
}

// framing reports a header that means something to the gateway.
func framing(name string) bool {
	return slices.Contains([]string{
		"Accept-Encoding", "Authorization", "Connection", "Content-Encoding", "Content-Length", "Content-Type", "Cookie", "Expect", "Host",
		"If-Range", "Keep-Alive", "Proxy-Authorization", "Proxy-Connection", "Range", "Te", "Trailer", "Transfer-Encoding", "Upgrade",
	}, textproto.CanonicalMIMEHeaderKey(name))
}
