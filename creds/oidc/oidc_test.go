package oidc_test

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/oidc"
)

const issuer = "https://ci.example.test"

type store struct {
	b    []byte
	fail error
}

func (s *store) Load() ([]byte, error) { return s.b, nil }
func (s *store) Save(b []byte) error {
	if s.fail == nil {
		s.b = b
	}
	return s.fail
}

// A clock that a test turns.
type clock struct{ now time.Time }

func (c *clock) Now() time.Time { return c.now }

func newIssuer(t testing.TB, change func(*oidc.Config)) (*oidc.Issuer, *clock) {
	t.Helper()
	clock := &clock{time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)}
	c := oidc.Config{URL: issuer, Owner: "inst-1", Store: &store{}, Now: clock.Now}
	if change != nil {
		change(&c)
	}
	i, err := oidc.New(c)
	if err != nil {
		t.Fatal(err)
	}
	return i, clock
}

func subject() creds.Subject {
	return creds.Subject{
		Provider: "gitea", Repository: "o/r", Ref: "refs/heads/main", SHA: "abc", Workflow: "ci.yml", Event: "push", Trust: "protected", Job: "build",
		Origin: creds.Origin{JobID: "mf-1", Policy: "sha256:1", RunID: "17", Actor: "mona", RepositoryID: "4"},
	}
}

func keysOf(t testing.TB, i *oidc.Issuer) jose.JSONWebKeySet {
	t.Helper()
	b, err := i.Keys()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(b), `"d"`) {
		t.Error("a private key is published")
	}
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(b, &set); err != nil {
		t.Fatal(err)
	}
	for _, k := range set.Keys {
		if !k.IsPublic() || !k.Valid() {
			t.Errorf("key %s: not a valid public one", k.KeyID)
		}
	}
	return set
}

// verify is what a provider does, with a library that is not ours.
func verify(token oidc.Token, set jose.JSONWebKeySet, audience string, now time.Time) (map[string]any, error) {
	parsed, err := jwt.ParseSigned(token.Value.Reveal(), []jose.SignatureAlgorithm{jose.ES256, jose.RS256})
	if err != nil {
		return nil, err
	}
	var standard jwt.Claims
	all := map[string]any{}
	if err := parsed.Claims(set, &standard, &all); err != nil {
		return nil, err
	}
	return all, standard.ValidateWithLeeway(jwt.Expected{Issuer: issuer, AnyAudience: jwt.Audience{audience}, Time: now}, 0)
}

func TestToken(t *testing.T) {
	t.Parallel()
	for _, algorithm := range []string{"ES256", "RS256"} {
		i, clock := newIssuer(t, func(c *oidc.Config) {
			c.Algorithm = algorithm
			c.Facts = func() map[string]string { return map[string]string{"runner": "host-1", "empty": ""} }
		})
		token, err := i.Mint(subject(), "vault", map[string]string{"lease": "l-1"})
		if err != nil {
			t.Fatal(err)
		}
		set := keysOf(t, i)
		got, err := verify(token, set, "vault", clock.now)
		if err != nil {
			t.Fatalf("%s: %v", algorithm, err)
		}
		for name, want := range map[string]string{
			"sub": "repository:o/r:ref:refs/heads/main:job:mf-1", "provider": "gitea", "repository": "o/r", "ref": "refs/heads/main",
			"sha": "abc", "workflow": "ci.yml", "event": "push", "trust": "protected", "job": "build", "job_id": "mf-1", "run_id": "17", "actor": "mona",
			"repository_id": "4", "runner": "host-1", "installation": "inst-1",
			"policy_digest": "sha256:1", "lease": "l-1", "jti": token.ID,
		} {
			if got[name] != want {
				t.Errorf("%s: claim %s: got %v, want %s", algorithm, name, got[name], want)
			}
		}
		for _, name := range []string{"step", "empty", "environment", "workflow_ref", "workflow_sha", "actor_id"} {
			if v, there := got[name]; there {
				t.Errorf("claim %s, which nobody knows, is there: %q", name, v)
			}
		}
		if _, err := verify(token, set, "other", clock.now); !errors.Is(err, jwt.ErrInvalidAudience) {
			t.Errorf("another audience: got %v", err)
		}
		if _, err := verify(token, set, "vault", token.Expires.Add(time.Second)); !errors.Is(err, jwt.ErrExpired) {
			t.Errorf("a second after its end: got %v", err)
		}
		if !token.Expires.Equal(clock.now.Add(time.Minute)) {
			t.Errorf("ends at %v", token.Expires)
		}
		other, _ := newIssuer(t, nil)
		if _, err := verify(token, keysOf(t, other), "vault", clock.now); err == nil {
			t.Error("accepted with the keys of another issuer")
		}
		again, err := i.Mint(subject(), "vault", nil)
		if err != nil || again.ID == token.ID {
			t.Errorf("a second token: %v, id %s", err, again.ID)
		}
	}
}

// TestSubject: what a job says of itself stays inside of its field.
func TestSubject(t *testing.T) {
	t.Parallel()
	sub := func(i *oidc.Issuer, s creds.Subject) string {
		token, err := i.Mint(s, "a", nil)
		if err != nil {
			t.Fatal(err)
		}
		got, err := verify(token, keysOf(t, i), "a", token.Expires)
		if err != nil {
			t.Fatal(err)
		}
		return got["sub"].(string)
	}
	i, _ := newIssuer(t, nil)
	s := subject()
	s.Repository = "o/r:ref:refs/heads/main:job:x%3A"
	if got, want := sub(i, s), "repository:o/r%3Aref%3Arefs/heads/main%3Ajob%3Ax%253A:ref:refs/heads/main:job:mf-1"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	own, _ := newIssuer(t, func(c *oidc.Config) { c.Subject = "{trust}/{repository}/{run_id}/{job_id}" })
	if got := sub(own, subject()); got != "protected/o/r/17/mf-1" {
		t.Errorf("own form: got %s", got)
	}
	if got := sub(i, creds.Subject{}); got != "installation:inst-1" {
		t.Errorf("the agent itself: got %s", got)
	}
	posing, _ := newIssuer(t, func(c *oidc.Config) { c.Subject = "{provider}:{job_id}" })
	s.Provider, s.JobID = "installation", "inst-1"
	if token, err := posing.Mint(s, "a", nil); err == nil {
		t.Errorf("a job that poses as the agent: got %v, want it refused", token)
	}
	env, _ := newIssuer(t, func(c *oidc.Config) { c.Subject = "{environment}:{job_id}" })
	if token, err := env.Mint(subject(), "a", nil); err == nil || !strings.Contains(err.Error(), "{environment}") {
		t.Errorf("a job of no environment: got %v, %v, want it refused", token, err)
	}
	maybe, _ := newIssuer(t, func(c *oidc.Config) { c.Subject = "r:{repository}[:env:{environment}:{actor}][:run:{run_id}]:{job_id}" })
	if got := sub(maybe, subject()); got != "r:o/r:run:17:mf-1" {
		t.Errorf("what is not known is left out: got %s", got)
	}
	released := subject()
	released.Environment = "prod:run:1"
	if got := sub(maybe, released); got != "r:o/r:env:prod%3Arun%3A1:mona:run:17:mf-1" {
		t.Errorf("what is known is not: got %s", got)
	}
	lost := subject()
	lost.Ref = ""
	if got := sub(i, lost); got != "repository:o/r:job:mf-1" {
		t.Errorf("a job of no ref: got %s", got)
	}
	for _, extra := range []string{"sub", "aud", "exp", "repository", "installation"} {
		if _, err := i.Mint(subject(), "a", map[string]string{extra: "x"}); err == nil {
			t.Errorf("extra claim %s replaced one", extra)
		}
	}
	if _, err := i.Mint(subject(), "", nil); err == nil {
		t.Error("a token for nobody")
	}
}

// TestRotation: a token is verified with keys that were fetched up to a period
// before, and until its end; afterwards its key goes.
func TestRotation(t *testing.T) {
	t.Parallel()
	i, clock := newIssuer(t, func(c *oidc.Config) { c.Rotate = 10 * 24 * time.Hour })
	for range 60 { // days
		before := keysOf(t, i)
		if n := len(before.Keys); n < 2 || n > 3 {
			t.Fatalf("%v: %d keys, want this, the next and at most one more", clock.now, n)
		}
		clock.now = clock.now.Add(24 * time.Hour)
		token, err := i.Mint(subject(), "a", nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, set := range []jose.JSONWebKeySet{before, keysOf(t, i)} {
			if _, err := verify(token, set, "a", clock.now); err != nil {
				t.Fatalf("%v: %v", clock.now, err)
			}
		}
		clock.now = token.Expires
		if _, err := verify(token, keysOf(t, i), "a", clock.now); err != nil {
			t.Fatalf("at its end: %v", err)
		}
	}
	old, err := i.Mint(subject(), "a", nil)
	if err != nil {
		t.Fatal(err)
	}
	clock.now = clock.now.Add(30 * 24 * time.Hour)
	if _, err := verify(old, keysOf(t, i), "a", old.Expires); err == nil {
		t.Error("a key of three periods ago is published")
	}
}

// TestLives: keys outlive the agent, and are on disk before they sign.
func TestLives(t *testing.T) {
	t.Parallel()
	s := &store{}
	with := func(c *oidc.Config) { c.Store = s }
	first, clock := newIssuer(t, with)
	token, err := first.Mint(subject(), "a", nil)
	if err != nil {
		t.Fatal(err)
	}
	second, _ := newIssuer(t, with)
	if _, err := verify(token, keysOf(t, second), "a", clock.now); err != nil {
		t.Errorf("another life: %v", err)
	}
	broken, _ := newIssuer(t, func(c *oidc.Config) { c.Store = &store{fail: errors.New("disk full")} })
	if _, err := broken.Mint(subject(), "a", nil); err == nil || !strings.Contains(err.Error(), "disk full") {
		t.Errorf("keys that cannot be saved: got %v", err)
	}
	s.fail = errors.New("only for reading")
	reader, late := newIssuer(t, with)
	late.now = late.now.Add(90 * 24 * time.Hour)
	if _, err := reader.Mint(subject(), "a", nil); err != nil {
		t.Errorf("beside the agent that turns the keys: %v", err)
	}
	for _, junk := range []string{"x", `{"keys": [{"id": "a", "algorithm": "ES256", "pkcs8": "AAAA"}]}`} {
		bad, _ := newIssuer(t, func(c *oidc.Config) { c.Store = &store{b: []byte(junk)} })
		if _, err := bad.Keys(); err == nil || !strings.Contains(err.Error(), "remove the file") {
			t.Errorf("keys %q: got %v, want to read what to do", junk, err)
		}
	}
}

// TestAlgorithmChanges: tokens of the old one are good to their end.
func TestAlgorithmChanges(t *testing.T) {
	t.Parallel()
	s := &store{}
	before, clock := newIssuer(t, func(c *oidc.Config) { c.Store = s })
	old, err := before.Mint(subject(), "a", nil)
	if err != nil {
		t.Fatal(err)
	}
	after, _ := newIssuer(t, func(c *oidc.Config) { c.Store, c.Algorithm = s, "RS256" })
	fresh, err := after.Mint(subject(), "a", nil)
	if err != nil {
		t.Fatal(err)
	}
	set := keysOf(t, after)
	for _, token := range []oidc.Token{old, fresh} {
		if _, err := verify(token, set, "a", clock.now); err != nil {
			t.Error(err)
		}
	}
	if a := set.Keys[len(set.Keys)-1].Algorithm; a != "RS256" {
		t.Errorf("next key is of %s", a)
	}
}

func TestDocuments(t *testing.T) {
	t.Parallel()
	i, _ := newIssuer(t, nil)
	server := httptest.NewServer(i)
	defer server.Close()
	for path, want := range map[string]int{oidc.DiscoveryPath: 200, oidc.KeysPath: 200, "/": 404, "/.well-known/": 404} {
		res, err := http.Get(server.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		var body map[string]any
		if want == 200 && json.NewDecoder(res.Body).Decode(&body) != nil {
			t.Errorf("%s: not JSON", path)
		}
		if err := res.Body.Close(); err != nil || res.StatusCode != want {
			t.Errorf("%s: got %d, want %d (%v)", path, res.StatusCode, want, err)
		}
		if path == oidc.DiscoveryPath && (body["issuer"] != issuer || body["jwks_uri"] != issuer+oidc.KeysPath) {
			t.Errorf("discovery: got %v", body)
		}
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	for want, change := range map[string]func(*oidc.Config){
		"in the clear":        func(c *oidc.Config) { c.URL = "http://ci.example.test" },
		"without a slash":     func(c *oidc.Config) { c.URL = "https://ci.example.test/" },
		"url":                 func(c *oidc.Config) { c.URL = "https://u@ci.example.test" },
		"algorithm":           func(c *oidc.Config) { c.Algorithm = "none" },
		"lifetime":            func(c *oidc.Config) { c.Lifetime = time.Hour },
		"rotate":              func(c *oidc.Config) { c.Rotate = time.Minute },
		"{job_id}":            func(c *oidc.Config) { c.Subject = "repository:{repository}" },
		"no such claim":       func(c *oidc.Config) { c.Subject = "{job_id}{secret}" },
		"in braces":           func(c *oidc.Config) { c.Subject = "{job_id}{ref" },
		"installation's id":   func(c *oidc.Config) { c.Owner = "" },
		"must not begin with": func(c *oidc.Config) { c.Subject = "installation:{job_id}" },
		"come in pairs":       func(c *oidc.Config) { c.Subject = "{job_id}[:{ref}" },
		"not in one another":  func(c *oidc.Config) { c.Subject = "{job_id}[:[{ref}]]" },
		"want {job_id} in it": func(c *oidc.Config) { c.Subject = "{repository}[{job_id}:{ref}]" },
		"colon before {ref}":  func(c *oidc.Config) { c.Subject = "{repository}@{ref}:{job_id}" },
		"before {job_id}":     func(c *oidc.Config) { c.Subject = "{repository}[:ref:{ref}:]{job_id}" },
		"} without {":         func(c *oidc.Config) { c.Subject = "{job_id}}" },
	} {
		c := oidc.Config{URL: issuer, Owner: "inst-1", Store: &store{}}
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
}

// FuzzSubject: whatever a job is called, it is neither another job nor the agent.
func FuzzSubject(f *testing.F) {
	f.Add("o/r", "main", "mf-1", "o/r", "main", "mf-2")
	f.Add("a:ref:b", "c", "d", "a", "b:ref:c", "d")
	i, _ := newIssuer(f, nil)
	set := keysOf(f, i)
	f.Fuzz(func(t *testing.T, repo, ref, job, repo2, ref2, job2 string) {
		var subs []string
		for _, s := range []creds.Subject{
			{Repository: repo, Ref: ref, Job: "j", Origin: creds.Origin{JobID: job}}, {Repository: repo2, Ref: ref2, Job: "j", Origin: creds.Origin{JobID: job2}},
		} {
			if s.JobID == "" || s.Repository == "" {
				return
			}
			token, err := i.Mint(s, "a", nil)
			if err != nil {
				t.Fatal(err)
			}
			got, err := verify(token, set, "a", token.Expires)
			if err != nil {
				t.Fatal(err)
			}
			subs = append(subs, got["sub"].(string))
		}
		same := strings.ToValidUTF8(repo, "\ufffd") == strings.ToValidUTF8(repo2, "\ufffd")
		if subs[0] == subs[1] && same && ref != ref2 && strings.ToValidUTF8(ref+job, "") == ref+job && strings.ToValidUTF8(ref2+job2, "") == ref2+job2 {
			t.Errorf("two refs are one subject: %s", subs[0])
		}
		if strings.HasPrefix(subs[0], "installation:") {
			t.Errorf("a job is the agent: %s", subs[0])
		}
	})
}
