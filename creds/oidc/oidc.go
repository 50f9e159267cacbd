// Package oidc is the agent's own OpenID Connect issuer: it says, in a signed
// token (RFC 7519) that lives for seconds, which job asks for a credential.
// Providers of credentials verify it by the discovery document and the keys
// (RFC 7517) that an [Issuer] publishes, and bind what they give to its claims.
//
// The keys rotate. The next one is published a whole period before it signs, so
// that files which were copied to a web server stay good until then, and an old
// one stays published until nobody can hold a token of it.
//
// It is signed with ES256 or RS256 and the standard library; nothing is parsed
// that somebody else wrote.
package oidc

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/mayfly-ci/mayfly/creds"
)

// Defaults, set 2026-11-24: a login takes milliseconds, and clocks differ by
// seconds; a copy of the keys that is renewed once a month is never too old.
const (
	defaultLifetime = time.Minute
	maxLifetime     = 10 * time.Minute
	defaultRotate   = 60 * 24 * time.Hour
	overlap         = 24 * time.Hour // caches of keys are refreshed within
	skew            = 5 * time.Second
)

// DefaultSubject is the "sub" of a job's token unless Config.Subject is set.
const DefaultSubject = "repository:{repository}[:ref:{ref}]:job:{job_id}"

// A Store keeps the keys between lives of the agent, sealed.
type Store interface {
	Load() ([]byte, error) // nil if nothing was saved
	Save(b []byte) error   // on disk when it returns
}

// A Config says who the issuer is.
type Config struct {
	// URL is the issuer as tokens name it, where providers find the documents.
	URL string
	// Algorithm signs: ES256 (the default) or RS256.
	Algorithm string
	// Lifetime of a token; 0 is a minute. Ten minutes are the most.
	Lifetime time.Duration
	// Rotate is how long a key signs; 0 is 60 days.
	Rotate time.Duration
	// Subject is the form of "sub", with names of claims in braces. It must
	// have {job_id}, so that no two jobs are the same to a provider. What stands in
	// brackets is left out for a job that lacks one of the claims in it; else such a
	// job gets no token: "" must not match what begins as it. What pushers name is
	// divided from other claims by colons, which are escaped in values.
	Subject string
	// Owner is the installation's id.
	Owner string
	// Facts are claims of every token, about the agent; nil is none.
	Facts func() map[string]string
	Store Store
	Now   func() time.Time // nil is time.Now
}

// Validate reports everything that is wrong with c, by the names of the file.
func (c Config) Validate() error {
	var errs []error
	wrong := func(bad bool, format string, args ...any) {
		if bad {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	u, err := url.Parse(c.URL)
	bad := err != nil || u.Host == "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil || strings.HasSuffix(c.URL, "/")
	wrong(bad, "url %q: want https://HOST[/PATH] without a slash at the end", c.URL)
	if !bad {
		wrong(u.Scheme != "https" && (u.Scheme != "http" || !loopback(u.Hostname())),
			"url %q: want https; keys that come in the clear can be replaced on the way", c.URL)
	}
	wrong(c.Algorithm != "" && c.Algorithm != es256 && c.Algorithm != rs256, "algorithm %q: want ES256 or RS256", c.Algorithm)
	wrong(c.Lifetime < 0 || c.Lifetime > maxLifetime || c.Lifetime%time.Second != 0, "lifetime %v: want whole seconds, %v at most", c.Lifetime, maxLifetime)
	wrong(c.Rotate != 0 && c.Rotate < overlap, "rotate %v: want %v at least", c.Rotate, overlap)
	_, err = fill(c.subject(), map[string]any{}, true)
	wrong(err != nil, "subject: %w", err)
	wrong(err == nil && joined(c.subject()) != "", "subject %q: want a colon before {%s}: only colons are escaped in values, and a branch must not be named so that it reads as more", c.subject(), joined(c.subject()))
	bare, _ := fill(c.subject(), map[string]any{"job_id": "ID"}, true)
	wrong(err == nil && !strings.Contains(bare, "ID"), "subject %q: want {job_id} in it; else all jobs of it are one to a provider", c.subject())
	wrong(c.Owner == "", "owner: missing; it is the installation's id")
	return errors.Join(errs...)
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func (c Config) subject() string {
	if c.Subject == "" {
		return DefaultSubject
	}
	return c.Subject
}

// An Issuer signs tokens and publishes what verifies them. It may be used by
// several goroutines at once.
type Issuer struct {
	config Config
	mu     sync.Mutex
	ring   *ring // nil until it is needed
}

// New checks c and returns an issuer. Keys are read or made when they are
// needed first.
func New(c Config) (*Issuer, error) {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Algorithm == "" {
		c.Algorithm = es256
	}
	if c.Lifetime == 0 {
		c.Lifetime = defaultLifetime
	}
	if c.Rotate == 0 {
		c.Rotate = defaultRotate
	}
	if err := c.Validate(); err != nil {
		return nil, err
	}
	return &Issuer{config: c}, nil
}

// A Token is signed, and its id is for the record.
type Token struct {
	Value   creds.Secret
	ID      string // claim "jti"
	Expires time.Time
}

// Mint signs a token about a job for one audience, new at every call. extra
// adds claims and replaces none. A subject without a job stands for the agent
// itself: its "sub" is "installation:" and the installation's id, which no
// job's can be.
func (i *Issuer) Mint(subject creds.Subject, audience string, extra map[string]string) (Token, error) {
	if audience == "" {
		return Token{}, errors.New("token: no audience; name the one that shall accept it")
	}
	now := i.config.Now()
	key, err := i.signer(now)
	if err != nil {
		return Token{}, fmt.Errorf("token: %w", err)
	}
	claims, err := i.claims(subject, extra)
	if err != nil {
		return Token{}, fmt.Errorf("token: %w", err)
	}
	t := Token{ID: rand.Text(), Expires: now.Add(i.config.Lifetime).Truncate(time.Second)}
	maps.Copy(claims, map[string]any{
		"iss": i.config.URL, "aud": audience, "jti": t.ID,
		"iat": now.Unix(), "nbf": now.Add(-skew).Unix(), "exp": t.Expires.Unix(),
	})
	value, err := sign(key, claims)
	if err != nil {
		return Token{}, fmt.Errorf("token: %w", err)
	}
	t.Value = creds.NewSecret(value)
	return t, nil
}

// claims are what is said about the subject. What is empty is left out: a
// provider that wants the claim then refuses.
func (i *Issuer) claims(s creds.Subject, extra map[string]string) (map[string]any, error) {
	text, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	claims := map[string]any{}
	if err := json.Unmarshal(text, &claims); err != nil {
		return nil, err
	}
	known := map[string]string{"installation": i.config.Owner}
	if i.config.Facts != nil {
		maps.Copy(known, i.config.Facts())
	}
	for _, more := range []map[string]string{known, extra} {
		for name, value := range more {
			if _, taken := claims[name]; taken || reserved(name) {
				return nil, fmt.Errorf("claim %q is given already", name)
			}
			claims[name] = value
		}
	}
	for name, value := range claims {
		if value == "" {
			delete(claims, name)
		}
	}
	if s.Job == "" {
		claims["sub"] = "installation:" + escape(i.config.Owner)
		return claims, nil
	}
	claims["sub"], err = fill(i.config.subject(), claims, false)
	return claims, err
}

func reserved(name string) bool {
	switch name {
	case "iss", "sub", "aud", "exp", "nbf", "iat", "jti":
		return true
	}
	return false
}

// fill makes a subject of its form. check looks at the form alone.
func fill(form string, claims map[string]any, check bool) (string, error) {
	var b strings.Builder
	for rest := form; rest != ""; {
		always, after, found := strings.Cut(rest, "[")
		maybe, after, closed := strings.Cut(after, "]")
		if found && !closed || strings.ContainsAny(always, "]") || strings.ContainsAny(maybe, "[") {
			return "", fmt.Errorf("%q: brackets come in pairs, and not in one another", form)
		}
		text, missing, err := fillPart(always, claims, check)
		if err != nil {
			return "", err
		}
		if missing != "" && !check {
			return "", fmt.Errorf("sub: the form of subjects names {%s}, which is not known of this job: put it in brackets with what belongs to it, or refuse such jobs", missing)
		}
		b.WriteString(text)
		if text, missing, err = fillPart(maybe, claims, check); err != nil {
			return "", err
		}
		if missing == "" {
			b.WriteString(text)
		}
		rest = after
	}
	if strings.HasPrefix(b.String(), "installation:") {
		return "", errors.New(`a job must not begin with "installation:", as the agent itself does`)
	}
	return b.String(), nil
}

// joined is the first claim of a form that no colon of its part divides from the
// one before it, though people who push name one of the two; "" if there is none.
func joined(form string) string {
	last := ""
	for part := range strings.FieldsFuncSeq(form, func(r rune) bool { return r == '[' || r == ']' }) {
		for {
			before, rest, found := strings.Cut(part, "{")
			if !found {
				break
			}
			name, after, _ := strings.Cut(rest, "}")
			if last != "" && !strings.Contains(before, ":") && (chosen(last) || chosen(name)) {
				return name
			}
			last, part = name, after
		}
	}
	return ""
}

// chosen says whether the value of a claim is what somebody who pushes calls it.
func chosen(claim string) bool {
	return slices.Contains([]string{"ref", "head_ref", "base_ref", "workflow", "workflow_ref", "event", "environment", "actor", "job", "step"}, claim)
}

// fillPart replaces {name} by the claim of that name, and says which is not known. A
// colon inside of a value is escaped: a branch must not be able to say more than its
// name.
func fillPart(form string, claims map[string]any, check bool) (text, missing string, _ error) {
	var b strings.Builder
	for form != "" {
		text, rest, found := strings.Cut(form, "{")
		if strings.Contains(text, "}") {
			return "", "", fmt.Errorf("%q: } without {", text)
		}
		b.WriteString(text)
		if !found {
			break
		}
		name, after, closed := strings.Cut(rest, "}")
		if !closed || name == "" || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz_") != "" {
			return "", "", fmt.Errorf("%q: want the name of a claim in braces", "{"+rest)
		}
		if check && !slices.Contains(claimNames(), name) {
			return "", "", fmt.Errorf("{%s}: no such claim (known: %s)", name, strings.Join(claimNames(), ", "))
		}
		value, _ := claims[name].(string)
		if value == "" {
			missing = name
		}
		b.WriteString(escape(value))
		form = after
	}
	return b.String(), missing, nil
}

// claimNames are the claims that a token has beside those of RFC 7519. What is
// not known of a job is not there.
func claimNames() []string {
	return []string{
		"provider", "repository", "repository_id", "repository_owner_id", "ref", "sha", "head_ref", "base_ref",
		"workflow", "workflow_ref", "workflow_sha", "event", "environment", "actor", "actor_id",
		"run_id", "run_number", "run_attempt", "job", "job_id", "step", "trust", "policy_digest", "runner", "installation", "lease",
	}
}

func escape(value string) string {
	return strings.NewReplacer("%", "%25", ":", "%3A").Replace(value)
}
