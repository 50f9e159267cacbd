package aws_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"

	"github.com/mayfly-ci/mayfly/creds"
	"github.com/mayfly-ci/mayfly/creds/aws"
	"github.com/mayfly-ci/mayfly/creds/credstest"
)

func fakeConfig(f *fakeAWS, id *identity) aws.Config {
	return aws.Config{
		Endpoint: f.URL, Region: fakeRegion, Role: fakeRole, Sign: id.sign, RevokerKey: revokerKey,
		RevokerSecret: func() (creds.Secret, error) { return creds.NewSecret(revokerSecret), nil },
	}
}

// use reads what mainScope lets a job read.
func (f *fakeAWS) use(ctx context.Context, l creds.Lease) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, f.URL+"/app/main/a", nil)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(nil)
	hash := hex.EncodeToString(sum[:])
	req.Header.Set("X-Amz-Content-Sha256", hash)
	if err := v4.NewSigner().SignHTTP(ctx, credentials(l), req, hash, "s3", fakeRegion, time.Now()); err != nil {
		return err
	}
	res, err := f.Client().Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("status %d: %s", res.StatusCode, b)
	}
	return err
}

func TestConformanceOfDenial(t *testing.T) {
	t.Parallel()
	f := newFakeAWS(t)
	i := newIssuer(t, fakeConfig(f, newIdentity(t)))
	down := func(down bool) func(context.Context) error {
		return func(context.Context) error { f.set(func() { f.down = down }); return nil }
	}
	credstest.Run(t, func(*testing.T) credstest.Harness {
		return credstest.Harness{
			Issuer: i, Owner: owner, Scope: json.RawMessage(mainScope), BadScopes: badScopes(), Use: f.use,
			Down: down(true), Up: down(false),
			Freeze: func(context.Context) error { f.set(func() { f.frozen = make(chan struct{}) }); return nil },
			Thaw:   func(context.Context) error { f.set(func() { close(f.frozen); f.frozen = nil }); return nil },
		}
	})
}

// TestDenied: the denial is of one session, works from the name, and is seen late.
func TestDenied(t *testing.T) {
	t.Parallel()
	f := newFakeAWS(t)
	i := newIssuer(t, fakeConfig(f, newIdentity(t)))
	a, b := issue(t, i, "mf-a", mainScope), issue(t, i, "mf-a-b", mainScope)
	if !a.ByName || a.Facts["session"] == "" {
		t.Errorf("got ByName %v and facts %v", a.ByName, a.Facts)
	}
	f.set(func() { f.lag = 2 })
	if err := i.Revoke(t.Context(), "mf-a", nil); err != nil {
		t.Fatal(err)
	}
	for n := range 2 {
		if p, err := i.Probe(t.Context(), "mf-a", a.Handle); !errors.Is(err, creds.ErrStillValid) {
			t.Errorf("probe %d before the policy is everywhere: got %+v and %v, want ErrStillValid", n, p, err)
		}
	}
	p, err := i.Probe(t.Context(), "mf-a", a.Handle)
	if err != nil || !strings.Contains(p.Refusal, "explicit deny") {
		t.Errorf("Probe: got %+v and %v", p, err)
	}
	if err := f.use(t.Context(), a); err == nil {
		t.Error("the denied session is used")
	}
	if err := f.use(t.Context(), b); err != nil {
		t.Errorf("another session: %v", err)
	}
}

// TestNotDenied: what AWS refuses for another reason is no proof, and what it would
// always refuse is not issued.
func TestNotDenied(t *testing.T) {
	t.Parallel()
	f := newFakeAWS(t)
	i := newIssuer(t, fakeConfig(f, newIdentity(t)))
	l := issue(t, i, "narrow", mainScope) // may not list buckets
	if p, err := i.Probe(t.Context(), "narrow", l.Handle); !errors.Is(err, creds.ErrStillValid) {
		t.Errorf("Probe: got %+v and %v, want ErrStillValid", p, err)
	}
	f.set(func() { f.denies = "s3:ListAllMyBuckets" })
	l, err := i.Issue(t.Context(), "blind", grant(mainScope))
	if err == nil || !strings.Contains(err.Error(), "nobody could tell") || l.Handle == nil || l.Values != nil {
		t.Errorf("Issue where the probe is refused at once: got %v, want it refused, with the handle", err)
	}
}

// TestWithoutRevoker says what holds then.
func TestWithoutRevoker(t *testing.T) {
	t.Parallel()
	f := newFakeAWS(t)
	c := fakeConfig(f, newIdentity(t))
	c.RevokerKey, c.RevokerSecret = "", nil
	clock := time.Now()
	c.Now = func() time.Time { return clock }
	i := newIssuer(t, c)
	l := issue(t, i, "alone", mainScope)
	if l.ByName {
		t.Error("ByName without a way to revoke")
	}
	for _, handle := range [][]byte{nil, l.Handle} {
		if err := i.Revoke(t.Context(), "alone", handle); !errors.Is(err, creds.ErrNotRevocable) {
			t.Errorf("Revoke: got %v, want ErrNotRevocable", err)
		}
	}
	clock = clock.Add(16 * time.Minute)
	if err := i.Revoke(t.Context(), "alone", l.Handle); err != nil {
		t.Errorf("Revoke of a session that is over: %v", err)
	}
}

// TestShortGrant: AWS gives 15 minutes; the session's policy takes them away.
func TestShortGrant(t *testing.T) {
	t.Parallel()
	f := newFakeAWS(t)
	i := newIssuer(t, fakeConfig(f, newIdentity(t)))
	g := grant(`{"whole_role": true}`)
	g.Expires = time.Now().Add(4 * time.Second)
	l, err := i.Issue(t.Context(), "short", g)
	if err != nil {
		t.Fatal(err)
	}
	if l.ExpiresAt.After(g.Expires) {
		t.Errorf("lease ends at %v, grant at %v", l.ExpiresAt, g.Expires)
	}
	wait(t, "the session is refused after its grant", func() bool { return f.use(t.Context(), l) != nil })
	if p, err := i.Probe(t.Context(), "short", l.Handle); err != nil || !strings.Contains(p.Refusal, "session policy") {
		t.Errorf("Probe: got %+v and %v", p, err)
	}
	f.set(func() {
		for _, s := range f.sessions {
			if last := s.policy.Statement[len(s.policy.Statement)-1]; last.Effect != "Deny" || last.Action[0] != "sts:AssumeRole" {
				t.Errorf("session may take another role: %+v", last)
			}
		}
	})
}

// TestLongGrant: what the role does not allow is not asked for, and the lease says
// when it ends.
func TestLongGrant(t *testing.T) {
	t.Parallel()
	f := newFakeAWS(t)
	c := fakeConfig(f, newIdentity(t))
	g := grant(mainScope)
	g.Expires = time.Now().Add(3 * time.Hour)
	l, err := newIssuer(t, c).Issue(t.Context(), "long", g)
	if err != nil || time.Until(l.ExpiresAt) > time.Hour {
		t.Errorf("got a lease until %v and %v, want an hour at most", l.ExpiresAt, err)
	}
	c.MaxSession = 2 * time.Hour
	if _, err := newIssuer(t, c).Issue(t.Context(), "long-2", g); err == nil || !strings.Contains(err.Error(), "max_session") {
		t.Errorf("more than the role allows: got %v, want to read what to set", err)
	}
}

// TestSweep: policies go when their sessions are over, and others stay.
func TestSweep(t *testing.T) {
	t.Parallel()
	f := newFakeAWS(t)
	i := newIssuer(t, fakeConfig(f, newIdentity(t)))
	soon := fmt.Sprintf("mayfly.mf-new.%d", time.Now().Add(-time.Minute).Unix())
	for _, name := range []string{"mayfly.mf-old.1700000000", soon, "mayfly.mf-x.y", "mayfly.UPPER.1700000000", "theirs", "mayfly.theirs"} {
		f.policies[name] = "{}"
	}
	l := issue(t, i, "sweep", mainScope)
	if err := i.Revoke(t.Context(), "sweep", l.Handle); err != nil {
		t.Fatal(err)
	}
	f.set(func() {
		_, old := f.policies["mayfly.mf-old.1700000000"]
		if old || len(f.policies) != 6 {
			t.Errorf("policies after a sweep: %v", f.policies)
		}
	})
}

// TestKilledAtAWS: the next life needs the name and nothing else.
func TestKilledAtAWS(t *testing.T) {
	t.Parallel()
	f, id := newFakeAWS(t), newIdentity(t)
	i := newIssuer(t, fakeConfig(f, id))
	if _, err := id.NextKey(); err != nil { // makes the keys
		t.Fatal(err)
	}
	l := life{Endpoint: f.URL, Region: fakeRegion, Role: fakeRole, RevokerKey: revokerKey, RevokerSecret: revokerSecret, URL: id.url, Keys: id.keys.b}
	credstest.KilledAtEveryPoint(t, l, 2, func(point, name string, _ []byte) {
		if err := i.Revoke(t.Context(), name, nil); err != nil {
			t.Errorf("killed at %s: Revoke: %v", point, err)
		}
		f.set(func() {
			for _, s := range f.sessions {
				if s.name == name && f.judge(s, "s3:GetObject", "arn:aws:s3:::app/main/a") == "" {
					t.Errorf("killed at %s: its session lives", point)
				}
			}
		})
	})
}

// TestOnlyTheServicesWordIsAProof: what a proxy says is not about the credential.
func TestOnlyTheServicesWordIsAProof(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		status int
		body   string
		proof  bool
	}{
		"unknown key":      {403, `<Error><Code>InvalidAccessKeyId</Code><Message>SECRET</Message></Error>`, true},
		"expired":          {400, `<Error><Code>ExpiredToken</Code><Message>x</Message></Error>`, true},
		"explicit deny":    {403, `<Error><Code>AccessDenied</Code><Message>with an explicit deny in an identity-based policy</Message></Error>`, true},
		"denied":           {403, `<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>`, false},
		"clock":            {403, `<Error><Code>RequestTimeTooSkewed</Code><Message>x</Message></Error>`, false},
		"page of a proxy":  {403, "<html><Code>ExpiredToken</Code></html>", false},
		"JSON of a proxy":  {403, `{"message": "no"}`, false},
		"slow down":        {503, `<Error><Code>SlowDown</Code><Message>x</Message></Error>`, false},
		"redirect":         {307, "", false},
		"accepted":         {200, `<ListAllMyBucketsResult/>`, false},
		"endless":          {403, `<Error><Code>ExpiredToken</Code><Message>` + strings.Repeat("x", 2<<20), false},
		"cut in the midst": {403, `<Error><Code>ExpiredToken</Code>`, false},
	} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Location", "http://127.0.0.1:1/")
			w.WriteHeader(c.status)
			_, _ = io.WriteString(w, strings.ReplaceAll(c.body, "SECRET", r.Header.Get("X-Amz-Security-Token")))
		}))
		i := newIssuer(t, aws.Config{Endpoint: server.URL, Region: fakeRegion, Role: fakeRole, Sign: (&identity{}).sign})
		p, err := i.Probe(t.Context(), "l", []byte(`{"key": {"id": "ASIA", "secret": "the-secret", "token": "the-token"}}`))
		if (err == nil) != c.proof {
			t.Errorf("%s: got %+v and %v, proof wanted: %v", name, p, err, c.proof)
		}
		if strings.Contains(fmt.Sprint(p, err), "the-token") {
			t.Errorf("%s: a secret is in %+v, %v", name, p, err)
		}
		server.Close()
	}
}

// TestCheck: what a doctor is told, and that nothing is made.
func TestCheck(t *testing.T) {
	t.Parallel()
	f := newFakeAWS(t)
	c := fakeConfig(f, newIdentity(t))
	if err := newIssuer(t, c).Check(t.Context()); err != nil {
		t.Errorf("Check: %v", err)
	}
	c.RevokerSecret = func() (creds.Secret, error) { return creds.NewSecret("another"), nil }
	if err := newIssuer(t, c).Check(t.Context()); err == nil || !strings.Contains(err.Error(), "SignatureDoesNotMatch") {
		t.Errorf("Check with another key: got %v", err)
	}
	f.set(func() { f.down = true })
	if err := newIssuer(t, c).Check(t.Context()); err == nil {
		t.Error("Check of a service that is down: got nil")
	}
	if len(f.sessions) > 0 {
		t.Errorf("sessions after a check: %v", f.sessions)
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	good := aws.Config{Region: "eu-central-1", Role: fakeRole, Sign: (&identity{}).sign}
	for _, c := range []aws.Config{good, {Service: "minio", Endpoint: "https://minio.internal:9000", Role: "arn:minio:iam:::role/x_-Y", Sign: good.Sign}} {
		if err := c.Validate(); err != nil {
			t.Error(err)
		}
	}
	for want, change := range map[string]func(*aws.Config){
		"service":           func(c *aws.Config) { c.Service = "gcp" },
		"region":            func(c *aws.Config) { c.Region = "" },
		`region "a/b"`:      func(c *aws.Config) { c.Region = "a/b" },
		"role":              func(c *aws.Config) { c.Role = "deploy" },
		"in the clear":      func(c *aws.Config) { c.Endpoint = "http://aws.internal" },
		"job_endpoint":      func(c *aws.Config) { c.JobEndpoint = "https://a/b" },
		"ca_file":           func(c *aws.Config) { c.Endpoint, c.CAFile = "http://127.0.0.1:1", "ca.pem" },
		"max_session":       func(c *aws.Config) { c.MaxSession = time.Minute },
		"both or none":      func(c *aws.Config) { c.RevokerKey = "AKIA" },
		"oidc":              func(c *aws.Config) { c.Sign = nil },
		`endpoint ""`:       func(c *aws.Config) { c.Service, c.Role = "minio", "arn:minio:iam:::role/x" },
		"not used with min": func(c *aws.Config) { c.Service, c.RevokerKey = "minio", "AKIA" },
	} {
		c := good
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v", want, err)
		}
	}
}
