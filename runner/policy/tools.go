package policy

import (
	"slices"

	"github.com/mayfly-ci/mayfly/configs/strict"
	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// A Tool is a way in which programs ask for credentials of themselves.
type Tool string

// The tools of a lease.
const (
	// GitHubOIDC is the endpoint of GitHub's identity tokens, for leases of an issuer
	// that is asked (creds.Asker). The audiences are in its scope.
	GitHubOIDC Tool = "github-oidc"
	// AWSContainer is the endpoint that AWS's tools ask in a container.
	AWSContainer Tool = "aws"
	// GitHelper and DockerHelper answer git, and what reads Docker's configuration,
	// for the hosts that have a value of the lease as: basic.
	GitHelper    Tool = "git"
	DockerHelper Tool = "docker"
)

// UnmarshalText implements encoding.TextUnmarshaler. It knows no other words.
func (t *Tool) UnmarshalText(b []byte) error {
	*t = Tool(b)
	return oneWord(b, "tool", string(AWSContainer), string(DockerHelper), string(GitHelper), string(GitHubOIDC))
}

// Has says whether the lease is for a tool.
func (l Lease) Has(t Tool) bool { return slices.Contains(l.Tools, t) }

// Serves says whether the job asks the agent for what the lease gives.
func (l Lease) Serves() bool { return l.Has(GitHubOIDC) || l.Has(AWSContainer) }

// AWSKey are the fields of the lease that AWS's tools get: those that are signed
// anew, else those that issuers of such keys have.
func (l Lease) AWSKey() (id, secret, session string) {
	for _, b := range l.Broker {
		if b.Rule.Inject.As == egress.SigV4 {
			return b.KeyID, b.Value, b.Session
		}
	}
	return "access_key_id", "secret_access_key", "session_token"
}

// Logins are the rules of the lease that have a password for git and docker.
func (l Lease) Logins() []Broker {
	return slices.DeleteFunc(slices.Clone(l.Broker), func(b Broker) bool { return b.Rule.Inject.As != egress.Basic })
}

// toolFields are the fields of the lease that its tools get.
func (l Lease) toolFields() []string {
	var all []string
	if l.Has(AWSContainer) {
		id, secret, session := l.AWSKey()
		all = append(all, id, secret)
		if session != "" {
			all = append(all, session)
		}
	}
	if l.Has(GitHubOIDC) {
		all = append(all, creds.RequestToken)
	}
	if l.Has(GitHelper) || l.Has(DockerHelper) {
		for _, b := range l.Logins() {
			all = append(all, b.Value)
		}
	}
	return all
}

// variables of a tool are those that only one lease at a time can set. Git's are
// joined.
func (t Tool) variables() []string {
	switch t {
	case GitHubOIDC:
		return []string{"ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_ID_TOKEN_REQUEST_TOKEN"}
	case AWSContainer:
		return []string{"AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_CONTAINER_AUTHORIZATION_TOKEN"}
	case DockerHelper:
		return []string{"DOCKER_CONFIG"}
	}
	return nil
}

// checkTools refuses tools that would have no answer.
func (l leaseNode) checkTools() error {
	var errs []error
	items := l.Self.Get("tools").Items()
	for i, t := range l.Tools {
		at := l.Self.At("tools")
		if i < len(items) {
			at = items[i]
		}
		basic := slices.ContainsFunc(l.Broker, func(b brokerNode) bool { return egress.Place(b.As) == egress.Basic })
		switch {
		case slices.Contains(l.Tools[:i], t):
			errs = append(errs, at.Errorf("%s stands here twice", t))
		case (t == GitHelper || t == DockerHelper) && !basic:
			errs = append(errs, at.Errorf("%s asks for the password of a host: name the host under broker, as: basic", t))
		case t == GitHubOIDC && len(l.Broker)+len(l.Login) > 0:
			errs = append(errs, at.Errorf("what is asked for by %s goes to the job, and is not brokered: remove broker and login", t))
		}
	}
	return strict.Join(errs...)
}
