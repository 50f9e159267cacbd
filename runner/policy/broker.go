package policy

import (
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/mayfly-ci/mayfly/configs/strict"
	"github.com/mayfly-ci/mayfly/providers"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// A Broker is a way out on which the gateway adds a value of a lease, so that the
// job needs no more of it than a placeholder. It is open while the lease is held.
type Broker struct {
	Rule  egress.Rule `json:"rule"`           // its Inject has everything but the credential
	Value string      `json:"value"`          // of the lease
	User  string      `json:"user,omitempty"` // the fact of the lease that is the user of Basic, or who logs in
	// Database is the fact that names what a login is to.
	Database string `json:"database,omitempty"`
	// KeyID and Session are the values or facts that belong to Value where
	// requests are signed (aws-sigv4). "" for Session: the key has none.
	KeyID   string `json:"key_id,omitempty"`
	Session string `json:"session,omitempty"`
	// Certificate is the value or fact that has the certificate of Value, where
	// that is the private key of client-certificate.
	Certificate string `json:"certificate,omitempty"`
}

// Fields are the fields of the lease in whose place the job has placeholders.
func (b Broker) Fields() []string {
	return slices.DeleteFunc([]string{b.Value, b.KeyID, b.Session}, func(f string) bool { return f == "" })
}

// brokerNode is an entry of a lease's list.
type brokerNode struct {
	Self     strict.Node    `yaml:",self"`
	Name     host           `yaml:"name,required"`
	Port     port           `yaml:"port,required"`
	As       place          `yaml:"as,required"`
	Value    field          `yaml:"value,required"`
	User     field          `yaml:"user"`
	Header   string         `yaml:"header"`
	Query    string         `yaml:"query"`
	Foreign  foreign        `yaml:"foreign"`
	Absent   absence        `yaml:"absent"`
	Resolve  *[]prefix      `yaml:"resolve"`
	Requests *[]requestNode `yaml:"requests"`
	CA       certificates   `yaml:"ca"`
	Purpose  purpose        `yaml:"purpose"`
	With     withNode       `yaml:"with"`
}

// withNode is what belongs to the value where that is not all: the rest of a key
// of AWS, and what may be signed with it; the certificate of a private key; where
// a registry sends its clients for tokens, and what these may be for.
type withNode struct {
	Self        strict.Node  `yaml:",self"`
	KeyID       field        `yaml:"key_id"`
	Session     field        `yaml:"session"`
	Regions     []awsName    `yaml:"regions"`
	Services    []awsName    `yaml:"services"`
	Certificate field        `yaml:"certificate"`
	Realm       string       `yaml:"realm"`
	Service     string       `yaml:"service"`
	Scopes      []imageScope `yaml:"scopes"`
	Resolve     *[]prefix    `yaml:"resolve"` // of the realm, as CA is
	CA          certificates `yaml:"ca"`
}

// awsName is a region or a service, as it stands in a signature.
type awsName string

func (a *awsName) UnmarshalText(b []byte) error {
	*a = awsName(b)
	return word(b, "the name of a region or a service", `[a-z0-9][a-z0-9-]{0,62}`)
}

type place egress.Place

func (p *place) UnmarshalText(b []byte) error {
	err := oneWord(b, "place", string(egress.Bearer), string(egress.Basic), string(egress.Header), string(egress.Query), string(egress.SigV4), string(egress.OCIRegistry), string(egress.Certificate))
	if err == nil {
		*p = place(b)
	}
	return err
}

// foreign is what becomes of a request with another credential.
type foreign string

func (f *foreign) UnmarshalText(b []byte) error {
	*f = foreign(b)
	return oneWord(b, "word for foreign credentials", "refuse", "strip")
}

// absence is what becomes of a request without a credential.
type absence string

func (a *absence) UnmarshalText(b []byte) error {
	*a = absence(b)
	return oneWord(b, "word for requests without a credential", "add", "pass")
}

func oneWord(b []byte, what string, known ...string) error {
	if !slices.Contains(known, string(b)) {
		return fmt.Errorf("unknown %s %q (known: %s)", what, b, strings.Join(known, ", "))
	}
	return nil
}

// broker is what the gateway gets, and what the policy says is where.
func (n brokerNode) broker(l leaseNode) (Broker, placed, error) {
	out := egressNode{
		Self: n.Self, Name: n.Name, Port: n.Port, Protocol: protocol(egress.HTTPS),
		Resolve: n.Resolve, Requests: n.Requests, CA: n.CA, Step: l.Step, Purpose: n.Purpose,
	}
	e, err := out.egress()
	in := &egress.Injection{
		Lease: string(l.Name), As: egress.Place(n.As), Name: n.Header + n.Query,
		Strip: n.Foreign == "strip", Pass: n.Absent == "pass", Uses: int(l.Uses),
	}
	if in.As == egress.SigV4 {
		in.Signing = &egress.Signing{Regions: texts(n.With.Regions), Services: texts(n.With.Services)}
	}
	if in.As == egress.Header {
		in.Name = http.CanonicalHeaderKey(in.Name)
	}
	e.Rule.Inject = in
	errs := []error{err, out.checkHTTP(), n.checkPlace()}
	if _, aerr := netip.ParseAddr(string(n.Name)); aerr == nil {
		errs = append(errs, n.Self.At("name").Errorf("a credential is for a name: the certificate is verified for it; name the host and add resolve: [%s]", n.Name))
	} else {
		errs = append(errs, out.checkResolve())
	}
	if strings.HasPrefix(string(n.Name), "*") {
		errs = append(errs, n.Self.At("name").Errorf("a credential is for one name: what is below %s may be anybody's", n.Name[2:]))
	}
	if n.As != "" && errs[1] == nil && errs[2] == nil && in.As != egress.OCIRegistry { // that is not whole yet

		if err := in.Check(); err != nil {
			errs = append(errs, n.Self.Errorf("%s", strings.ReplaceAll(err.Error(), "\n", "; ")))
		}
	}
	return Broker{Rule: e.Rule, Value: string(n.Value), KeyID: string(n.With.KeyID), Session: string(n.With.Session), Certificate: string(n.With.Certificate), User: string(n.User)}, placed{e, n.Self}, strict.Join(errs...)
}

func (n brokerNode) checkPlace() error {
	var errs []error
	for _, c := range []struct {
		key   string
		given bool
		as    egress.Place
	}{
		{"header", n.Header != "", egress.Header}, {"query", n.Query != "", egress.Query}, {"user", n.User != "", egress.Basic},
	} {
		if c.given && egress.Place(n.As) != c.as && (c.key != "user" || egress.Place(n.As) != egress.OCIRegistry) {
			errs = append(errs, n.Self.At(c.key).Errorf("%s is for as: %s", c.key, c.as))
		}
	}
	return strict.Join(append(errs, n.checkWith())...)
}

func (n brokerNode) checkWith() error {
	w := n.With
	realm := w.Realm != "" || w.Service != "" || len(w.Scopes) > 0 || w.Resolve != nil || w.CA != ""
	if realm != (egress.Place(n.As) == egress.OCIRegistry) {
		return n.Self.At("as").Errorf("as: oci-registry, and nothing else, needs with: {realm: https://NAME/PATH, service: NAME, scopes: [repository:NAME:pull]}, and resolve and ca of the realm")
	}
	key := w.KeyID != "" && len(w.Regions) > 0 && len(w.Services) > 0
	more := w.KeyID != "" || w.Session != "" || len(w.Regions) > 0 || len(w.Services) > 0
	switch egress.Place(n.As) {
	case egress.SigV4:
		if !key || w.Certificate != "" {
			return n.Self.At("as").Errorf("as: aws-sigv4 needs with: {key_id: FIELD, regions: […], services: […]}, and session: FIELD if the key has a token")
		}
	case egress.Certificate:
		if w.Certificate == "" || more {
			return n.Self.At("as").Errorf("as: client-certificate needs with: {certificate: FIELD}, of which value is the private key")
		}
	case egress.OCIRegistry:
		if w.Certificate != "" || more {
			return n.Self.At("with").Errorf("as: oci-registry has a realm, a service and scopes, and nothing else")
		}
	default:
		if !w.Self.IsZero() {
			return n.Self.At("with").Errorf("with is for as: aws-sigv4 and client-certificate")
		}
	}
	return nil
}

// brokers are those of a lease, and what they open, for contradictions.
func (l leaseNode) brokers() ([]Broker, []placed, error) {
	var all []Broker
	var out []placed
	var errs []error
	for _, n := range l.Broker {
		b, p, err := n.broker(l)
		if err == nil && b.Rule.Inject.As == egress.OCIRegistry {
			registry, realm, way, rerr := n.registry(b, l)
			if b, err = registry, rerr; err == nil {
				p.Rule = b.Rule
				all, out = append(all, realm), append(out, way)
			}
		}
		all, out, errs = append(all, b), append(out, p), append(errs, err)
	}
	for _, n := range l.Login {
		b, p, err := n.broker(l)
		all, out, errs = append(all, b), append(out, p), append(errs, err)
	}
	for _, f := range l.Clear {
		if !slices.ContainsFunc(all, func(b Broker) bool { return slices.Contains(b.Fields(), string(f)) }) {
			errs = append(errs, l.Self.At("clear").Errorf("%s is not brokered, so what names it has it in clear anyway: remove it", f))
		}
	}
	return all, out, strict.Join(errs...)
}

// fillBrokers gives the paths of a lease's rules the job's own facts.
func fillBrokers(l Lease, j providers.Job) (Lease, error) {
	l.Broker = slices.Clone(l.Broker)
	for i, b := range l.Broker {
		r, err := fill(b.Rule, j)
		if err != nil {
			return l, err
		}
		if in := r.Inject; in != nil && in.Tokens != nil {
			filled := *in
			if filled.Tokens, err = fillTokens(in.Tokens, j); err != nil {
				return l, err
			}
			r.Inject = &filled
		}
		l.Broker[i].Rule = r
	}
	return l, nil
}

// Warnings are what the policy says on purpose, and had better not.
func (p *Policy) Warnings() []string {
	var all []string
	for _, r := range p.rules {
		for _, l := range r.plan.Leases {
			for _, f := range l.Clear {
				all = append(all, fmt.Sprintf("%s: lease %s: %s is brokered, and the job gets it in clear all the same", r.plan.Rule, l.Name, f))
			}
		}
	}
	return all
}
