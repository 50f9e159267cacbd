// Package aws issues sessions of a role: temporary credentials of AWS, or of a
// server with its API (MinIO).
//
// The agent shows the STS a signed token about the job (AssumeRoleWithWebIdentity),
// which the role's trust policy judges. The session has the lease's name and a
// policy of its own. That says what the grant says, and that all is denied from
// the grant's end on: AWS gives no session for less than 15 minutes, and a grant
// is often shorter. It also denies what outlives a session: other roles at AWS,
// and access keys at MinIO.
//
// AWS cannot take a session back. What it has is a policy of the role that denies
// all to that session, by its name, which Revoke writes if the configuration has
// an access key for that; nothing but the name is needed. Without such a key
// Revoke returns creds.ErrNotRevocable and the session ends at its expiry. That a
// session is dead is read from the refusal of a call that is signed with it: the
// call was tried when the session was made, and was not refused in that way then.
//
// MinIO takes a session back at once, by the session itself. One whose handle is
// lost cannot be found, and ends at its expiry; nobody has it then.
//
// The way of AWS is tested against a server that behaves as AWS documents it, and
// not at AWS. That of MinIO is tested at MinIO.
package aws

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/web"
)

const maxNameBytes = 40 // the contract's

// What Config.Service may be.
const (
	serviceAWS   = "aws"
	serviceMinIO = "minio"
)

// Bounds of a session: AssumeRoleWithWebIdentity, parameter DurationSeconds. An
// hour is what a role allows that says nothing.
const (
	minSession     = 15 * time.Minute
	defaultSession = time.Hour
	maxSession     = 12 * time.Hour
)

// An Identity is a token that the STS is shown.
type Identity struct {
	Token creds.Secret
	ID    string // its "jti", for the records
}

// A Signer makes an identity for one lease of a job, new at every call.
type Signer func(ctx context.Context, s creds.Subject, lease string) (Identity, error)

// A Config says which role jobs have, and where.
type Config struct {
	Service    string        // aws, the default, or minio
	Endpoint   string        // https://HOST:PORT of all services; "" is AWS's own
	Region     string        // "" is us-east-1 at minio
	Role       string        // ARN
	CAFile     string        // PEM; only these are trusted, "" is the system's
	Insecure   bool          // http to another machine
	MaxSession time.Duration // what the role allows; 0 is an hour

	// JobEndpoint is where jobs find the server, if that is not where the agent
	// does.
	JobEndpoint string

	// RevokerKey and RevokerSecret are an access key that may put, list and delete
	// the inline policies of the role, and nothing else. Without one no session of
	// AWS can be taken back. The secret is asked for at each use.
	RevokerKey    string
	RevokerSecret func() (creds.Secret, error)

	// Out is the agent's way out; nil dials directly.
	Out web.Out

	Sign  Signer
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
	minio := c.Service == serviceMinIO
	wrong(c.Service != "" && c.Service != serviceAWS && !minio, "service %q: want aws or minio", c.Service)
	for key, text := range map[string]string{"endpoint": c.Endpoint, "job_endpoint": c.JobEndpoint} {
		if text != "" || key == "endpoint" && minio {
			err := web.CheckServer(text, c.Insecure)
			wrong(err != nil, "%s %w", key, err)
		}
	}
	wrong(c.CAFile != "" && strings.HasPrefix(c.Endpoint, "http:"), "ca_file: not used with %s", c.Endpoint)
	wrong(!minio && !regexp.MustCompile(`^[a-z]{2}-[a-z]+(-[a-z]+)?-[0-9]+$`).MatchString(c.Region), "region %q: want one as in eu-central-1", c.Region)
	role := `^arn:aws:iam::[0-9]{12}:role/[\w+=,.@/-]+$`
	if minio {
		role = `^arn:minio:iam:::role/[\w-]+$`
	}
	wrong(!regexp.MustCompile(role).MatchString(c.Role), "role %q: want its ARN; it is in the partition aws, or what MinIO prints when it starts", c.Role)
	wrong(c.MaxSession != 0 && (c.MaxSession < minSession || c.MaxSession > maxSession), "max_session %v: want %v to %v, as the role has it", c.MaxSession, minSession, maxSession)
	wrong((c.RevokerKey == "") != (c.RevokerSecret == nil), "revoker_key, revoker_secret_file: want both or none")
	wrong(minio && c.RevokerKey != "", "revoker_key: not used with minio, where a session ends itself")
	wrong(c.Sign == nil, "oidc: missing; the agent needs an identity to show")
	return errors.Join(errs...)
}

func (c Config) minio() bool { return c.Service == serviceMinIO }

// at is the address of a service, and the region that its signatures name.
func (c Config) at(service string) (address, region string) {
	switch {
	case c.Endpoint != "":
		address, region = c.Endpoint, c.Region
	case service == "iam": // one for the world
		return "https://iam.amazonaws.com", "us-east-1"
	default:
		address, region = "https://"+service+"."+c.Region+".amazonaws.com", c.Region
	}
	if region == "" || service == "iam" {
		region = "us-east-1"
	}
	return address, region
}

// An Issuer mints sessions of one role. It may be used by several goroutines at
// once.
type Issuer struct {
	config Config
	client *http.Client

	mu    sync.Mutex
	names map[string]bool // issued by this life and not revoked
}

// New checks c and returns an issuer. It does not connect: a service that is down
// stops the jobs that want it and not the agent.
func New(c Config) (*Issuer, error) {
	if c.Trace == nil {
		c.Trace = func(string) {}
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.MaxSession == 0 {
		c.MaxSession = defaultSession
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	client, err := web.NewClient(c.CAFile, c.Out)
	if err != nil {
		return nil, err
	}
	return &Issuer{config: c, client: client, names: map[string]bool{}}, nil
}

// Close ends idle connections. Leases stay as they are.
func (i *Issuer) Close() { i.client.CloseIdleConnections() }

// List implements creds.Issuer: neither service tells which sessions there are.
func (i *Issuer) List(ctx context.Context) ([]creds.Info, error) {
	if err := context.Cause(ctx); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("list leases: %w: sessions cannot be listed", errors.ErrUnsupported)
}

// Check asks the services for what this issuer needs and mints nothing: that the
// STS answers, and that the access key may see the policies of the role.
func (i *Issuer) Check(ctx context.Context) error {
	form := url.Values{
		"Action": {"AssumeRoleWithWebIdentity"}, "Version": {"2011-06-15"},
		"RoleArn": {i.config.Role}, "RoleSessionName": {"mayfly-doctor"}, "WebIdentityToken": {"none"},
	}
	var r *refusal
	if err := i.do(ctx, call{service: "sts", method: http.MethodPost, path: "/", form: form}, nil); !errors.As(err, &r) {
		return errors.Join(errors.New("the STS does not refuse an identity that is none"), err)
	}
	if i.config.RevokerKey == "" {
		return nil
	}
	k, err := i.revoker()
	if err != nil {
		return err
	}
	return i.iam(ctx, k, "ListRolePolicies", url.Values{}, nil)
}

// checkName keeps to the contract's alphabet, in which there is no character that
// a policy takes for a pattern.
func checkName(name string) error {
	if name == "" || len(name) > maxNameBytes || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return fmt.Errorf("lease name %q: want 1 to %d bytes of a-z, 0-9 and -", name, maxNameBytes)
	}
	return nil
}

var (
	_ creds.Issuer       = (*Issuer)(nil)
	_ creds.ScopeChecker = (*Issuer)(nil)
)
