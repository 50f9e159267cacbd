package runner

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/runner/policy"
	"github.com/mayfly-ci/mayfly/sandbox/egress"
)

// Credentials that the job does not hold. The gateway adds them to the requests
// that the lease's rules allow, and the job has placeholders in their place. The
// rules are opened when the lease is issued, are owed behind it, and so are
// closed before it is revoked.

// brokered are the rules of all leases of one step, or of the whole job for "",
// for the names in them: there is no credential yet.
func brokered(plan policy.Plan, step string) []egress.Rule {
	var rules []egress.Rule
	for _, l := range plan.Leases {
		for _, b := range l.Broker {
			if l.Step == step {
				rules = append(rules, b.Rule)
			}
		}
	}
	return rules
}

// A holding is a lease, and what the job has in place of some of its values.
type holding struct {
	creds.Lease
	stand map[string]string // by the name of the value
	// What its programs look for: variables, files below secretsDir and git's settings.
	env, files map[string]string
	git        [][2]string
}

// field is a value or fact of the lease, or what stands in place of a value that is
// brokered. This is where a secret leaves for its user.
func (h holding) field(l policy.Lease, name string) string {
	if stand, ok := h.stand[name]; ok && !slices.Contains(l.Clear, name) {
		return stand
	}
	if v, ok := h.Values[name]; ok {
		return v.Reveal()
	}
	return h.Facts[name]
}

// broker opens the rules of a lease that was just issued, which put it in the
// place of the placeholders, and the endpoints at which it is asked for.
func (s *steps) broker(ctx context.Context, l policy.Lease, h *holding, turn int) error {
	if len(l.Broker) == 0 && !l.Serves() {
		return nil
	}
	lease, stand := h.Lease, h.stand
	var rules []egress.Rule
	for _, b := range l.Broker {
		in := *b.Rule.Inject
		in.Value, in.Placeholder = lease.Values[b.Value], stand[b.Value]
		in.Lease = useName(l, turn)
		if b.User != "" {
			in.User = lease.Facts[b.User]
		}
		if b.Database != "" {
			in.Name = lease.Facts[b.Database]
		}
		in.Chain = secretOf(lease, b.Certificate).Reveal()
		if in.Signing != nil {
			key := *in.Signing
			key.KeyID, key.PlaceID = secretOf(lease, b.KeyID), stand[b.KeyID]
			key.Session, key.PlaceSession = secretOf(lease, b.Session), stand[b.Session]
			in.Signing = &key
		}
		b.Rule.Inject = &in
		rules = append(rules, b.Rule)
	}
	name := brokerName(s.log.Job, l, turn)
	_, err := acquired(ctx, s.life, name, func(ctx context.Context) (none, grip, error) {
		o := egress.Opening{Rules: egress.Rules{Allow: rules}, Ledger: s.ledger, Parent: gatewayName(s.log.Job)}
		return none{}, grip{}, s.openFor(ctx, name, o, l, h)
	})
	if turn == 0 {
		s.clock.mark(s.stage(name))
	}
	return err
}

// placeholders makes one for each value that the lease's rules add. It refuses a
// lease that would give the job such a value in another of its fields.
func placeholders(l policy.Lease, lease creds.Lease) (map[string]string, error) {
	stand := map[string]string{}
	for _, b := range l.Broker {
		value, ok := lease.Values[b.Value]
		if !ok {
			return nil, fmt.Errorf("lease %s: %s wants the value %q to be brokered, which issuer %s does not give", l.Name, b.Rule.ID, b.Value, l.Issuer)
		}
		for what, fact := range map[string]string{"user": b.User, "database": b.Database} {
			if _, ok := lease.Facts[fact]; fact != "" && !ok {
				return nil, fmt.Errorf("lease %s: %s wants the fact %q for a %s, which issuer %s does not give", l.Name, b.Rule.ID, fact, what, l.Issuer)
			}
		}
		if stand[b.Value] == "" {
			stand[b.Value] = placeholder(value)
		}
		if b.Certificate != "" && secretOf(lease, b.Certificate).IsZero() {
			return nil, fmt.Errorf("lease %s: %s wants the certificate %q, which issuer %s does not give", l.Name, b.Rule.ID, b.Certificate, l.Issuer)
		}
		for _, f := range []string{b.KeyID, b.Session} {
			v := secretOf(lease, f)
			if f != "" && v.IsZero() {
				return nil, fmt.Errorf("lease %s: %s wants %q of the key, which issuer %s does not give", l.Name, b.Rule.ID, f, l.Issuer)
			}
			if f != "" && stand[f] == "" {
				stand[f] = placeholder(v)
			}
		}
	}
	var errs []error
	for _, wants := range []map[string]string{l.Env, l.Files} {
		for to, field := range wants {
			if _, ok := stand[field]; ok || slices.Contains(l.Clear, field) {
				continue
			}
			for name := range stand {
				if contains(lease, field, name) && !slices.Contains(l.Clear, name) {
					errs = append(errs, fmt.Errorf("lease %s: %s wants %q, which has the brokered value %q in it", l.Name, to, field, name))
				}
			}
		}
	}
	return stand, errors.Join(errs...)
}

// withhold refuses to give a job a value that its issuer lets no job have, or whose
// uses are counted.
func withhold(l policy.Lease, lease creds.Lease) error {
	if !lease.Withheld && l.Uses == 0 {
		return nil
	}
	for _, field := range l.InClear() {
		if _, ok := lease.Values[field]; ok && !lease.Withheld {
			return fmt.Errorf("lease %s: the job would hold %q, whose uses could not be counted (uses: %d): name it under broker", l.Name, field, l.Uses)
		} else if ok {
			return fmt.Errorf("lease %s: the job would hold %q, which issuer %s lets no job have: name it under broker, and not under clear", l.Name, field, l.Issuer)
		}
	}
	return nil
}

// secretOf is a value of the lease, or a fact: the id of a key is no secret to its
// issuer.
func secretOf(lease creds.Lease, field string) creds.Secret {
	if v, ok := lease.Values[field]; ok || lease.Facts[field] == "" {
		return v
	}
	return creds.NewSecret(lease.Facts[field])
}

// contains reports that a field has a value in it.
func contains(lease creds.Lease, field, value string) bool {
	text := lease.Facts[field]
	if v, ok := lease.Values[field]; ok {
		text = v.Reveal()
	}
	return strings.Contains(text, secretOf(lease, value).Reveal())
}

// prefixes are how services mark what they issue, which programs look at.
func prefixes() []string {
	return []string{
		"ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "gldt-", "glrt-", "glcbt-", "AKIA", "ASIA",
		"npm_", "pypi-", "hvs.", "hvb.", "s.", "dop_v1_", "xoxb-", "sk-", "eyJ", "dckr_pat_", "rubygems_",
	}
}

// placeholder is worthless, and looks like the secret: the prefix that programs
// know it by, the length, and of each character the kind. It is longer if there
// were less than egress.MinPlaceholder characters to choose.
func placeholder(secret creds.Secret) string {
	value := secret.Reveal()
	keep := ""
	for _, p := range prefixes() {
		if strings.HasPrefix(value, p) && len(p) > len(keep) {
			keep = p
		}
	}
	rest := value[len(keep):]
	const digits, lower, upper = "0123456789", "abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
	small, large := lower, upper
	if strings.Trim(rest, digits+"abcdef-") == "" {
		small = "abcdef" // hexadecimal, or a UUID
	}
	if strings.Trim(rest, digits+"ABCDEF-") == "" {
		large = "ABCDEF"
	}
	var b strings.Builder
	b.WriteString(keep)
	chosen := 0
	for i := range len(rest) {
		c := rest[i]
		from := ""
		for _, set := range []string{digits, lower, upper} {
			if strings.IndexByte(set, c) >= 0 {
				from = map[string]string{digits: digits, lower: small, upper: large}[set]
			}
		}
		switch {
		case from != "":
			b.WriteByte(anyOf(from))
			chosen++
		case c > ' ' && c < 0x7f:
			b.WriteByte(c)
		default:
			b.WriteByte('_') // no header carries it
		}
	}
	for ; chosen < egress.MinPlaceholder; chosen++ {
		b.WriteByte(anyOf(digits + small))
	}
	return b.String()
}

// anyOf is a character of the set, any as likely as the other.
func anyOf(set string) byte {
	n, err := rand.Int(rand.Reader, big.NewInt(int64(len(set))))
	if err != nil {
		return set[0] // never (crypto/rand, Go 1.24); the gateway would refuse the value itself
	}
	return set[n.Int64()]
}
